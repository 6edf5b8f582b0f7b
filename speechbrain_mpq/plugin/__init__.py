"""Quantization of any SpeechBrain recipe, from its own hparams file.

Nothing here replaces a module, subclasses a Brain or patches SpeechBrain:
quantizers are attached in place, and what has to happen later hangs on hooks
that torch offers.
"""
