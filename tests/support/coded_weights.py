"""Random codes of few bits that keep to a format, and their scales."""

from __future__ import annotations

import numpy as np

from hf_sparse.runtime.kernels.code_formats import CodeFormat


def random_codes(
    rows: int, columns: int, form: CodeFormat, extreme: bool = False, fewer: float = 0.2
) -> np.ndarray:
    """Codes `(rows, columns)` int8.

    Args:
        rows, columns, form: of the weight.
        extreme: the largest and the lowest only.
        fewer: the share of windows that have fewer than they may.
    """
    random = np.random.default_rng(rows * columns)
    lowest, highest = (-127, 127) if form.bits == 8 else (-8, 7)
    codes = random.integers(lowest, highest + 1, (rows, columns))
    if extreme:
        codes = random.choice([lowest, highest], (rows, columns))
    if form.is_masked:  # some blocks have none, and some all
        kept = random.random((rows, columns)) < random.choice([0.0, 0.3, 0.5, 1.0], (rows, 1))
        return np.where(kept, codes, 0).astype(np.int8)
    windows = -(-columns // form.window)
    order = random.random((rows, windows, form.window)).argsort(axis=-1)
    most = form.kept - (random.random((rows, windows, 1)) < fewer)
    codes[(order >= most).reshape(rows, -1)[:, :columns]] = 0
    return codes.astype(np.int8)


def random_scales(rows: int, groups: int, *, signs: bool = False) -> np.ndarray:
    """Scales `(rows, groups)` float32, each a bfloat16; with signs half of them negative."""
    random = np.random.default_rng(rows)
    scales = random.random((rows, groups)).astype(np.float32) + 0.5
    scales = np.asarray((scales.view(np.uint32) & 0xFFFF0000).view(np.float32))
    return np.where(random.random(scales.shape) < 0.5, -scales, scales) if signs else scales
