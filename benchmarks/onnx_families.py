"""Which model types can be exported to ONNX: a tiny random model of each, pruned, written and compared.

    python benchmarks/onnx_families.py [--types bert roberta ...] [--json FILE]

For each type of AutoConfig: the first head that `hf_sparse.export_onnx` takes, of a config that
`tests/support/any_models.py` makes small. `passes`: the graph runs in ONNX Runtime and gives what the
model gives in torch; else the reason is the exporter's own, or ours where the model takes other inputs
than token ids. Prints a row for each type, then the counts.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # help and wrong usage need no slow import
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--types", nargs="*", help="default: all")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args()

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import hf_sparse
from hf_sparse import SparsityConfig
from hf_sparse.exporters.heads import head_of
from tests.support.any_models import build, classes_of, model_types, tiny_config


def tried(model_type: str) -> tuple[str, str]:
    """The class that was exported, and what came of it."""
    try:
        config = tiny_config(model_type)
    except ValueError as error:
        return "", f"not built: {error}"
    refused = ""
    for model_class in classes_of(config):
        model = build(config, model_class)
        try:
            head_of(model)
        except ValueError as error:
            refused = refused or f"refused: {error}"
            continue
        return model_class.__name__, _exported(model)
    return "", refused or "refused: no class"


def _exported(model: Any) -> str:
    try:
        hf_sparse.prune_(model, SparsityConfig("unstructured", 0.5), "magnitude")
        with tempfile.TemporaryDirectory() as folder:
            hf_sparse.export_onnx(model, Path(folder) / "graph")
    except Exception as error:  # the table is about what exporters raise, whatever it is
        text = " ".join(str(error).split())
        kind = "refused" if isinstance(error, ValueError) else "fails"
        return f"{kind}: {type(error).__name__}: {text[:160]}"
    return "passes"


def main(options: argparse.Namespace) -> None:
    """Print the table."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, transformers {transformers.__version__}")
    rows = []
    for model_type in options.types or model_types():
        name, result = tried(model_type)
        rows.append({"type": model_type, "class": name, "result": result})
        print(f"| {model_type} | {name} | {result} |", flush=True)
    print(Counter(row["result"].partition(":")[0] for row in rows))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main(options)
