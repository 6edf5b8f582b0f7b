"""Layers and losses that SpeechBrain lacks."""
