"""Networks, one file each below models."""
