"""Save a folder again and again, each time with other contents, and print the version."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

from hf_sparse.files.atomic import replacing

for version in itertools.count(1):
    with replacing(Path(sys.argv[1]), lambda name: name.startswith("w-")) as fresh:
        for name in ("config.json", "a", "b", f"w-{version}"):
            (fresh / name).write_text(str(version))
    print(version, flush=True)
