"""Sparse models as ONNX graphs: `export_onnx`."""

QUANTIZATIONS = ("dynamic", "static")  # of ONNX Runtime's quantizer
