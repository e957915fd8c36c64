"""Memory that ends where no process may read: a kernel that goes too far ends its process."""

from __future__ import annotations

import ctypes
import mmap
import weakref
from typing import Any

import numpy as np
import pytest
import torch

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_LIBC.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_PAGE = mmap.PAGESIZE


def guarded(nbytes: int, alignment: int = 1) -> Any:
    """Bytes between two pages without access, as close to the second one as the alignment allows."""
    body = max(-(-nbytes // _PAGE), 1) * _PAGE
    base = between_guards(body)
    start = (base + body - nbytes) // alignment * alignment
    room = (ctypes.c_ubyte * nbytes).from_address(start)
    weakref.finalize(room, _LIBC.munmap, base - _PAGE, body + 2 * _PAGE)
    return np.frombuffer(memoryview(room), np.uint8, nbytes)


def between_guards(body: int) -> int:
    """The address of `body` bytes between two pages without access."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    base = _LIBC.mmap(None, body + 2 * _PAGE, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
    assert base != ctypes.c_void_p(-1).value
    for page in (base, base + _PAGE + body):
        assert protect(page, _PAGE, 0)
    return int(base) + _PAGE


def protect(address: int, nbytes: int, access: int) -> bool:
    """Allow some access to pages, and no other."""
    return bool(_LIBC.mprotect(address, nbytes, access) == 0)


def guard_the_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put every packed weight, bias and norm of loaded models, and all buffers, in guarded memory."""
    from hf_sparse.runtime.model import single_layers
    from hf_sparse.runtime.programs import (
        distances,
        one_token,
        row_buffers,
        seen_keys,
        tile_buffers,
    )
    from hf_sparse.runtime.weights import linear, memory

    def aligned(*shape: int) -> torch.Tensor:
        memory = guarded(4 * int(np.prod(shape)), 64).view(np.float32)
        return torch.from_numpy(memory).view(shape)

    def room(shelf: Any, nbytes: int) -> Any:
        return guarded(nbytes)

    programs = (distances, one_token, row_buffers, seen_keys, tile_buffers)
    for module in (linear, *programs, single_layers):
        monkeypatch.setattr(module, "aligned", aligned)
    linear._no_bias.cache_clear()
    monkeypatch.setattr(memory.Shelf, "room", room)
