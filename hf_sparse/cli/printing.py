"""What the commands print of a model that they have saved."""

from __future__ import annotations

import argparse
import json
from typing import Any

from hf_sparse.cli.loading import weight_bytes


def without(tokenizer: Any) -> str:
    """What a line about a folder ends with if no tokenizer is in it."""
    return ", without a tokenizer" if tokenizer is None else ""


def print_saved(report: Any, options: argparse.Namespace, source: str, tokenizer: Any) -> int:
    """Print a report as the options want it, and where the model was saved; the exit code."""
    before = weight_bytes(source, options.gguf_file)
    after = weight_bytes(options.output)
    if options.json:
        print_json(report, options, file_bytes={"before": before, "after": after})
    else:
        print(report.table() if options.tensors else report.summary())
        ratio = after / max(before, 1)
        print(
            f"weight files: {before / 1e6:.2f} MB before, {after / 1e6:.2f} MB after ({ratio:.2f}x)"
        )
        print(f"saved to {options.output}{without(tokenizer)}")
    return 0


def print_json(report: Any, options: argparse.Namespace, **more: Any) -> None:
    """Print a report as JSON, with the folder that was written."""
    print(json.dumps({**json.loads(report.to_json()), "folder": options.output, **more}, indent=2))
