"""From outputs to words: lexica and graphs."""
