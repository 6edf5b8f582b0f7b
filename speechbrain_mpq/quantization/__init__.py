"""What a quantized tensor is: codebooks, fake quantization, bit plans, files.

Knows no speech, no data and no search.
"""
