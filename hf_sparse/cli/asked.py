"""The config that the flags of `hf-sparse prune` tell."""

from __future__ import annotations

import argparse

import hf_sparse
from hf_sparse_cli.quantizing import grid_options


def asked_config(options: argparse.Namespace) -> hf_sparse.SparsityConfig:
    """Pattern, sparsity, places, storage and bits of what is to be made."""
    return hf_sparse.SparsityConfig(
        options.pattern,
        options.sparsity,
        options.targets,
        options.ignore,
        options.format,
        options.uniform,
        **grid_options(options),
    )
