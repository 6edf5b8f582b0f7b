"""Networks, as in `speechbrain.lobes`."""
