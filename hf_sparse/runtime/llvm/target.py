"""The CPU that code is made for: its vectors, its registers, and what LLVM is told about it."""

from __future__ import annotations

import functools
import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any


@dataclass(frozen=True)
class Instructions:
    """LLVM's names of instructions that kernels use where a CPU has them; empty where it has not.

    Attributes:
        shuffle: 16 bytes, each of which takes the byte that a table names, or 0 for 128 and above.
        clock: ticks since some time, the same on all cores and at an even rate.
        pause: tells the core that it waits in a loop.
        half: there is one that turns float16 into float32; LLVM finds it by itself.
        expand: spreads packed values over the lanes that a mask names; of `{lanes}` and `{lane}`.
        deposit: spreads the bits of an i32 over the bits that a mask names.
        scale: multiplies by a power of two. Masked, as `Function.in_registers` calls it.
        reciprocal: 14 bits of 1 / x. Masked as well.
        permute: a register of floats, each lane of which takes the one that a register of i32 names;
            bits beyond the number of lanes do not count.
        lookup: as `shuffle`, from `{tables}` registers, up to 4, that stand behind one another.
        wide_shuffle: as `shuffle`, in each 16 bytes of a register.
        unsigned_dot: u8 times s8, the sums of four added to i32.
        pair_products: u8 times s8, the sums of two as i16, which saturate.
        pair_sums: i16 times i16, the sums of two as i32.
        signed_as: bytes times the signs of others.
        signed_dot: s8 times s8, the sums of four added to i32.
        long_product, long_pairs, add_pairs: s8 times s8 as i16; the sums of pairs of i16 as i32; those
            of pairs of i32.
    """

    shuffle: str
    clock: str
    pause: str = ""
    half: bool = False
    expand: str = ""
    deposit: str = ""
    scale: str = ""
    reciprocal: str = ""
    permute: str = ""
    lookup: str = ""
    wide_shuffle: str = ""
    unsigned_dot: str = ""
    pair_products: str = ""
    pair_sums: str = ""
    signed_as: str = ""
    signed_dot: str = ""
    long_product: str = ""
    long_pairs: str = ""
    add_pairs: str = ""


@dataclass(frozen=True)
class InstructionSet:
    """What a name of a target stands for.

    Attributes:
        name: of the target; on machines of one kind, of one row only.
        machines: as `platform.machine()` calls them.
        lanes: float32 numbers in a vector register.
        registers: vector registers.
        needs: LLVM's features without which a CPU does not run the code.
        has: the instructions.
        cpu: LLVM's CPU, or empty for this machine's own with all its features.
        features: more of LLVM's features.
        without: beginnings of the features that are switched off.
        extras: features of LLVM's that some of these CPUs have beyond the row, with the field of
            `Instructions` that each fills, and by what.
    """

    name: str
    machines: tuple[str, ...]
    lanes: int
    registers: int
    needs: tuple[str, ...]
    has: Instructions
    cpu: str = ""
    features: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    extras: tuple[tuple[str, str, str], ...] = ()


_X86, _ARM = ("x86_64", "amd64"), ("aarch64", "arm64")
_PSHUFB, _PAUSE = "llvm.x86.ssse3.pshuf.b.128", "llvm.x86.sse2.pause"
_TBL = "llvm.aarch64.neon.tbl{tables}.v16i8"
_TSC, _STEADY = "llvm.readcyclecounter", "llvm.readsteadycounter"

# Of a machine, the best first: a CPU that runs one also runs those below it.
INSTRUCTION_SETS = (
    InstructionSet(
        "avx512",
        _X86,
        lanes=16,
        registers=32,
        needs=(
            *("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vbmi2", "avx512vnni"),
            *("bmi2", "fma"),
        ),
        has=Instructions(
            _PSHUFB,
            _TSC,
            _PAUSE,
            half=True,
            expand="llvm.x86.avx512.mask.expand.v{lanes}{lane}",
            deposit="llvm.x86.bmi.pdep.32",
            scale="llvm.x86.avx512.mask.scalef.ps.512",
            reciprocal="llvm.x86.avx512.rcp14.ps.512",
            permute="llvm.x86.avx512.permvar.sf.512",
            wide_shuffle="llvm.x86.avx512.pshuf.b.512",
            unsigned_dot="llvm.x86.avx512.vpdpbusd.512",
        ),
        # Full 512-bit vectors, or half of the registers' width is lost.
        features=("-prefer-256-bit",),
    ),
    InstructionSet(
        "avx2",
        _X86,
        lanes=8,
        registers=16,
        needs=("avx2", "fma", "f16c", "bmi2"),
        has=Instructions(
            _PSHUFB,
            _TSC,
            _PAUSE,
            half=True,
            permute="llvm.x86.avx2.permps",
            wide_shuffle="llvm.x86.avx2.pshuf.b",
            pair_products="llvm.x86.avx2.pmadd.ub.sw",
            pair_sums="llvm.x86.avx2.pmadd.wd",
            signed_as="llvm.x86.avx2.psign.b",
        ),
        cpu="x86-64-v3",
        without=("avx512", "avx10"),
        extras=(("avxvnni", "unsigned_dot", "llvm.x86.avx512.vpdpbusd.256"),),
    ),
    InstructionSet(
        "portable",
        _X86,
        lanes=4,
        registers=16,
        needs=("ssse3", "sse4.1", "sse4.2"),
        has=Instructions(
            _PSHUFB,
            _TSC,
            _PAUSE,
            wide_shuffle=_PSHUFB,
            pair_products="llvm.x86.ssse3.pmadd.ub.sw.128",
            pair_sums="llvm.x86.sse2.pmadd.wd",
            signed_as="llvm.x86.ssse3.psign.b.128",
        ),
        cpu="x86-64-v2",
    ),
    InstructionSet(
        "neon",
        _ARM,
        lanes=4,
        registers=32,
        needs=(),  # NEON is in every CPU of this architecture
        has=Instructions(
            _TBL.format(tables=1),
            _STEADY,
            half=True,
            lookup=_TBL,
            wide_shuffle=_TBL.format(tables=1),
            long_product="llvm.aarch64.neon.smull.v8i16",
            long_pairs="llvm.aarch64.neon.saddlp.v4i32.v8i16",
            add_pairs="llvm.aarch64.neon.addp.v4i32",
        ),
        extras=(("dotprod", "signed_dot", "llvm.aarch64.neon.sdot.v4i32.v16i8"),),
    ),
)


@dataclass(frozen=True)
class Capability:
    """What some CPUs have, to be told to people: some of it kernels use, by the table above.

    Attributes:
        name: for people.
        machines: as `InstructionSet`'s.
        needs: LLVM's features.
    """

    name: str
    machines: tuple[str, ...]
    needs: tuple[str, ...]


CAPABILITIES = (
    Capability("AVX-512", _X86, ("avx512f",)),
    Capability("AVX-512 VBMI2", _X86, ("avx512vbmi2",)),
    Capability("AVX-512 VNNI", _X86, ("avx512vnni",)),
    Capability("AVX-512 BF16", _X86, ("avx512bf16",)),
    Capability("AVX-VNNI", _X86, ("avxvnni",)),
    Capability("AMX int8", _X86, ("amx-tile", "amx-int8")),
    Capability("AMX bf16", _X86, ("amx-tile", "amx-bf16")),
    Capability("dot products", _ARM, ("dotprod",)),
    Capability("SVE", _ARM, ("sve",)),
)


@dataclass(frozen=True)
class Target:
    """What a kernel is generated for. Everything that changes the code is a field.

    Attributes:
        name: of its row in `INSTRUCTION_SETS`.
        lanes, registers, has: of the row.
        cpu, features: for LLVM.
        triple: LLVM's name of another machine, for which code is made but not run; empty for this one.
    """

    name: str
    lanes: int
    registers: int
    has: Instructions
    cpu: str
    features: str
    triple: str = ""

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


@functools.cache
def host() -> Target:
    """The best target that this CPU can run.

    Raises:
        ValueError: there is none.
    """
    has, rows = llvm().get_host_cpu_features(), _rows()
    for row in rows:
        if all(has.get(feature) for feature in row.needs):
            return targets()[row.name]
    wanted = "; ".join(f"{row.name}: {', '.join(row.needs)}" for row in rows)
    raise ValueError(
        f"this CPU ({llvm().get_host_cpu_name()}) has the instructions of no target. Wanted those of "
        f"one of these. {wanted}."
    )


@functools.cache
def targets() -> dict[str, Target]:
    """Every target of this machine's architecture, best first; `host()` tells what it can run.

    Raises:
        ValueError: there are no kernels for this architecture.
    """
    return {row.name: _target(row) for row in _rows()}


def capabilities() -> tuple[str, ...]:
    """The names of `CAPABILITIES` that this CPU has."""
    has, machine = llvm().get_host_cpu_features(), platform.machine().lower()
    return tuple(
        row.name
        for row in CAPABILITIES
        if machine in row.machines and all(has.get(feature) for feature in row.needs)
    )


def _rows() -> list[InstructionSet]:
    """The rows for this machine."""
    machine = platform.machine().lower()
    rows = [row for row in INSTRUCTION_SETS if machine in row.machines]
    if not rows:
        known = dict.fromkeys(name for row in INSTRUCTION_SETS for name in row.machines)
        raise ValueError(
            f"this machine is a {machine!r}, for which there are no kernels. "
            f"Wanted one of {', '.join(known)}."
        )
    return rows


def _target(row: InstructionSet) -> Target:
    """The target of a row, on this machine."""
    binding = llvm()
    flags = binding.get_host_cpu_features()
    features = [] if row.cpu else [flags.flatten()]
    features += row.features
    has, found = _has(row, [flag for flag, _, _ in row.extras if flags.get(flag)])
    features += found
    features += [f"-{flag}" for flag in flags if flag.startswith(row.without)]
    cpu = row.cpu or binding.get_host_cpu_name()
    return Target(row.name, row.lanes, row.registers, has, cpu, ",".join(features))


def _has(row: InstructionSet, flags: Sequence[str]) -> tuple[Instructions, list[str]]:
    """The instructions of a row with the extras of some features, and these for LLVM."""
    more: dict[str, Any] = {name: told for flag, name, told in row.extras if flag in flags}
    return replace(row.has, **more), [f"+{flag}" for flag in flags]


def elsewhere(row: InstructionSet, *, extras: bool = False) -> Target:
    """The target of a row on any machine with Linux: of a CPU that has what the row needs, and no more.

    With `extras`, of one that has these, too. Kernels for it are made by `jit.object_code`; this
    process does not run them.
    """
    has, found = _has(row, [flag for flag, _, _ in row.extras if extras])
    features = ",".join([*(f"+{feature}" for feature in row.needs), *found, *row.features])
    triple, cpu = f"{row.machines[0]}-unknown-linux-gnu", row.cpu or "generic"
    return Target(row.name, row.lanes, row.registers, has, cpu, features, triple)


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
