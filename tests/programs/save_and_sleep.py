"""Begin to save a folder, print where, and sleep."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from hf_sparse.files.atomic import replacing

with replacing(Path(sys.argv[1])) as fresh:
    (fresh / "config.json").write_text("killed")
    print(fresh, flush=True)
    time.sleep(600)
