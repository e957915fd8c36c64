"""The command line with a command that prints more than a pipe holds."""

from __future__ import annotations

import sys
import types
from typing import Any

from hf_sparse_cli import main


def run(options: Any) -> int:
    for _ in range(9999):
        print("x" * 99)
    return 0


fake: Any = types.ModuleType("hf_sparse.cli.commands")
fake.run = run
sys.modules.update({"hf_sparse": fake, "hf_sparse.cli": fake, "hf_sparse.cli.commands": fake})
sys.exit(main(sys.argv[1:]))
