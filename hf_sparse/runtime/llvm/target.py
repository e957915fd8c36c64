"""The CPU that code is made for: its vectors, its registers, and what LLVM is told about it."""

from __future__ import annotations

import functools
import platform
from dataclasses import dataclass
from types import ModuleType

# What AVX-512 code here needs; a CPU that lacks one of them gets AVX2 code.
_AVX512 = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vbmi2", "bmi2", "fma")
_AVX2 = ("avx2", "fma", "f16c", "bmi2")


@dataclass(frozen=True)
class Target:
    """What a kernel is generated for. Everything that changes the code is a field.

    Attributes:
        name: `avx512`, `avx2` or `portable`.
        lanes: float32 numbers in a vector register.
        registers: vector registers.
        cpu, features: for LLVM.
    """

    name: str
    lanes: int
    registers: int
    cpu: str
    features: str

    @property
    def has_expand(self) -> bool:
        """Whether one instruction spreads packed values over the set bits of a mask."""
        return self.name == "avx512"

    @property
    def has_half(self) -> bool:
        """Whether one instruction turns float16 into float32."""
        return self.name != "portable" or not is_x86()

    @property
    def has_scale(self) -> bool:
        """Whether instructions multiply by powers of two and guess reciprocals."""
        return self.name == "avx512"

    @property
    def widths(self) -> tuple[int, ...]:
        """Tokens in a tile, widest first: the last tile of a sequence may be narrower."""
        return tuple(self.lanes * vectors for vectors in (4, 2, 1))


def llvm() -> ModuleType:
    """The binding layer of llvmlite.

    Raises:
        ImportError: llvmlite is not installed.
    """
    try:
        import llvmlite.binding as binding
    except ImportError as error:
        raise ImportError(
            "hf_sparse.compile makes machine code through llvmlite, which is not installed: "
            "pip install 'hf_sparse[runtime]'"
        ) from error
    module: ModuleType = binding
    return module


def is_x86() -> bool:
    """Whether this machine has x86-64 instructions."""
    return platform.machine().lower() in ("x86_64", "amd64")


@functools.cache
def host() -> Target:
    """The best target that this CPU can run."""
    has = llvm().get_host_cpu_features()
    if all(has.get(feature) for feature in _AVX512):
        return targets()["avx512"]
    if all(has.get(feature) for feature in _AVX2):
        return targets()["avx2"]
    return targets()["portable"]


@functools.cache
def targets() -> dict[str, Target]:
    """Every target of this machine's architecture, best first; `host()` tells what it can run."""
    binding = llvm()
    cpu = binding.get_host_cpu_name()
    flags = binding.get_host_cpu_features()
    if not is_x86():
        # NEON and its kin: 128-bit vectors, 32 registers.
        return {"portable": Target("portable", 4, 32, cpu, flags.flatten())}
    # Full 512-bit vectors, or half of the registers' width is lost.
    wide = flags.flatten() + ",-prefer-256-bit"
    narrow = ",".join(f"-{name}" for name in flags if name.startswith(("avx512", "avx10")))
    return {
        "avx512": Target("avx512", 16, 32, cpu, wide),
        "avx2": Target("avx2", 8, 16, "x86-64-v3", narrow),
        "portable": Target("portable", 4, 16, "x86-64-v2", ""),
    }


def named(name: str | None) -> Target:
    """A target by its name, or the host's for None.

    Raises:
        ValueError: there is no such target, or this CPU cannot run its instructions.
    """
    if name is None:
        return host()
    known = targets()
    if name not in known:
        raise ValueError(f"target {name!r} is unknown. Wanted one of {', '.join(known)}.")
    order = list(known)
    if order.index(name) < order.index(host().name):
        raise ValueError(
            f"target {name!r} needs instructions that this CPU ({known[name].cpu}) does not have. "
            f"The best it can run is {host().name!r}: leave `target` out."
        )
    return known[name]
