"""From a full-precision model in a Brain to a packed one: the one pipeline."""
