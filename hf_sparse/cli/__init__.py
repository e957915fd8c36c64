"""What the commands of `hf-sparse` do; `hf_sparse_cli` reads their flags, without torch."""

from hf_sparse_cli import main

__all__ = ["main"]
