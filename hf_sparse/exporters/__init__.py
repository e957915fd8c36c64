"""Sparse models in files of other runtimes: ONNX graphs, and GGUF."""

QUANTIZATIONS = ("dynamic", "static")  # of ONNX Runtime's quantizer
