"""A packed separator's mask network outside PyTorch: OpenVINO, ONNX Runtime.

`lowered` reads a packed folder into plain numbers, the engines build their
models from them, `engine` chooses one.
"""
