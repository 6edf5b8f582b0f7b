"""One file a network, as in `speechbrain.lobes.models`."""
