"""Simulate speech, rooms, mixtures and talking faces: data for experiments."""
