"""The command `report`: models on an HTML page."""

from __future__ import annotations

import argparse
import json

import hf_sparse


def report(options: argparse.Namespace) -> int:
    """Write a page about models, and their pictures."""
    flags = ("figures", "base", "matrix", "latency", "tokens", "repeats")
    given = {name: getattr(options, name) for name in flags}
    made = hf_sparse.report(options.models, options.html, **given)
    size = len(made.html.encode())
    if options.json:
        pictures = {picture.name: picture.title for picture in made.pictures}
        written = {"html": options.html, "bytes": size, "figures": options.figures}
        print(json.dumps({**written, "models": made.titles, "pictures": pictures}, indent=2))
    else:
        count = len(made.titles)
        models = f"{count} {'model' if count == 1 else 'models'}"
        print(f"{options.html}: {models}, {size / 1e6:.2f} MB; open it in a browser")
        if options.figures:
            print(f"{len(made.pictures)} pictures in {options.figures}, as SVG and as PNG")
    return 0
