# /// script
# requires-python = ">=3.11"
# dependencies = ["hf_sparse[onnx]"]
#
# [tool.uv.sources]
# hf_sparse = { path = ".." }
# ///
"""Export a sparse classifier as an ONNX graph and classify texts with ONNX Runtime alone.

    python examples/export_onnx.py MODEL OUTPUT --text "a gripping film" --text "two dull hours"
    python examples/export_onnx.py MODEL OUTPUT --quantize dynamic

MODEL is a checkpoint of a sequence classifier with its tokenizer, sparse or not. The graph is
compared with the model before it is put in place.
"""

from __future__ import annotations

import argparse
from pathlib import Path

if __name__ == "__main__":  # help and wrong usage need no slow import
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", help="folder or Hub name")
    parser.add_argument("output", type=Path, help="folder for the graph")
    parser.add_argument("--text", action="append", default=[], help="to classify; several times")
    parser.add_argument("--quantize", choices=["dynamic"], help="8-bit weights and activations")
    options = parser.parse_args()
    options.text = options.text or ["a gripping film", "two dull hours"]

from transformers import AutoModelForSequenceClassification, AutoTokenizer

import hf_sparse

try:
    import onnxruntime as ort
except ImportError as error:
    raise SystemExit("ONNX Runtime is needed: pip install 'hf_sparse[onnx]'") from error


def main(options: argparse.Namespace) -> None:
    """Export, open, classify."""
    model = AutoModelForSequenceClassification.from_pretrained(options.model)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    report = hf_sparse.export_onnx(
        model, options.output, tokenizer=tokenizer, quantize=options.quantize
    )
    print(report)

    session = ort.InferenceSession(options.output / "model.onnx")
    inputs = tokenizer(options.text, padding=True, return_tensors="np")
    names = [spec.name for spec in session.get_inputs()]
    if "token_type_ids" in names and "token_type_ids" not in inputs:
        inputs["token_type_ids"] = 0 * inputs["input_ids"]
    (scores,) = session.run(None, {name: inputs[name] for name in names})
    for text, row in zip(options.text, scores, strict=True):
        print(f"{model.config.id2label[int(row.argmax())]}: {text}")


if __name__ == "__main__":
    main(options)
