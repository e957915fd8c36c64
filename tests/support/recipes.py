"""Prunings that give the same masks wherever they run: in several processes, on a GPU."""

from __future__ import annotations

from typing import Any

RECIPES: list[tuple[str, float | None, dict[str, Any]]] = [
    ("unstructured", 0.5, {"method": "wanda"}),
    ("unstructured", 0.5, {"method": "sparsegpt", "allocation": "owl"}),
    ("2:4", None, {"method": "alps", "refine": "swaps"}),
    ("2:4", None, {"method": "prox_local"}),
    ("unstructured", 0.5, {"method": "sparsellm", "rounds": 1}),
    ("unstructured", 0.5, {"method": "wanda", "reconstruct": 1}),
    ("2:4", None, {"method": "proxsparse", "accumulate": 1}),
]
# Two processes see the batches in other orders when they train.
TRAINED = ("reconstruct", "accumulate")
