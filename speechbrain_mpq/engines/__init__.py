"""A packed separator's mask network outside PyTorch: OpenVINO, ONNX Runtime.

`lowering` reads a packed folder into plain numbers (`lowered`), the engines
build their models from them, `loading` chooses one.
"""
