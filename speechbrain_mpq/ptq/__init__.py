"""Quantization of pretrained SpeechBrain interfaces, without training."""
