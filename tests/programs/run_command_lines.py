"""Run command lines, a JSON list from stdin; print exit codes, outputs and slow modules as JSON."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from typing import Any

from hf_sparse_cli import main

told = []
for line in json.load(sys.stdin):
    out = io.StringIO()
    code: Any
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            code = main(line.split())
        except SystemExit as end:
            code = end.code
    told.append([code, out.getvalue()])
slow = [name for name in ("torch", "transformers", "numpy", "hf_sparse") if name in sys.modules]
print(json.dumps([told, slow]))
