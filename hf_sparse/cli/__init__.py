"""The `hf-sparse` command."""

from hf_sparse.cli.parser import main

__all__ = ["main"]
