"""Kernels for ARM, run by qemu in place of this machine's: `pytest --arm`.

The kernels are compiled for aarch64 and linked to `tests/programs/run_kernels.c`. `EmulatedCode` has
the face of `Code`; its addresses are those of functions that copy the memory behind a call's
arguments into the emulated process, run the kernel there, and copy the memory back. So everything
that runs on `Code` runs on ARM instructions: single kernels, programs with threads, whole models.

Each call is repeated by x86 code with the same vectors, and fused multiply-adds as ARM's: results are
equal to the last bit, but for kernels that add up the lanes of a vector, whose order LLVM chooses.
"""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_sparse.runtime.kernels import worker
from hf_sparse.runtime.kernels.weight_types import FLOAT32, WEIGHT_TYPES
from hf_sparse.runtime.llvm import jit, target
from hf_sparse.runtime.llvm.ir import Function
from hf_sparse.runtime.weights import rates
from tests.support.memory_in_sight import Block, Image, Sight, blocks_in_sight

# A CPU of the first version of the architecture: what it lacks is an illegal instruction.
QEMU, CPU, COMPILER = "qemu-aarch64", "cortex-a53", "aarch64-linux-gnu-gcc"
# One that has the row's extras.
LATER_CPU = "cortex-a76"
RUNNER = Path(__file__).parents[1] / "programs/run_kernels.c"
# Where the emulated process has the copies; nothing else of it lies there.
_BASE = 0x20_0000_0000

# Kernels that add up the lanes of a vector: no bits are compared.
UNORDERED = ("sparse_rows", "dense_rows", "norm_row", "attention_row", "scored_row")
# Of the largest number; programs carry differences on.
_TOLERANCE, _OF_PROGRAMS = 1e-5, 1e-4

_PARALLEL = {
    worker.name(parallel=True, timed=timed): worker.name(parallel=False, timed=timed)
    for timed in (False, True)
}
_WORKERS = {*_PARALLEL, *_PARALLEL.values()}

failures: list[str] = []
counted: Counter[str] = Counter()

_Entry = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_Native = jit.Code


def missing() -> list[str]:
    """The programs that are needed and not there."""
    return [name for name in (QEMU, COMPILER) if shutil.which(name) is None]


def arm_target(extras: bool = False) -> target.Target:
    """The row for ARM."""
    row = next(row for row in target.INSTRUCTION_SETS if row.name == "neon")
    return target.elsewhere(row, extras=extras)


def install(extras: bool = False) -> None:
    """Make ARM the only target, and let its code run under qemu; of a later CPU with `extras`."""
    chosen = arm_target(extras)
    target.targets = functools.cache(lambda: {chosen.name: chosen})
    target.host = functools.cache(lambda: chosen)
    jit.Code = _code  # type: ignore[assignment, misc]
    # The times of an emulator tell nothing.
    rates.calibrate = lambda chosen, cache: rates.nominal(chosen)  # type: ignore[assignment]


def _code(chosen: target.Target, objects: bytes, functions: Sequence[Function]) -> Any:
    kind = EmulatedCode if chosen.triple else _Native
    return kind(chosen, objects, functions)


class Emulated:
    """A process under qemu that has the kernels of an object file.

    Attributes:
        entries: addresses of the kernels.
        helpers: addresses of what tells the thread's number and their count, and of what waits.
    """

    def __init__(self, objects: bytes, names: Sequence[str]) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="hf_sparse_arm")
        folder = Path(self._folder.name)
        (folder / "kernels.o").write_bytes(objects)
        declared = "".join(f"extern kernel {name};\n" for name in names)
        (folder / "table.c").write_text(
            "#include <stdint.h>\ntypedef void kernel(void *);\n"
            f"{declared}kernel *const kernels[] = {{{', '.join(names)}}};\n"
            f"const uint64_t kernel_count = {len(names)};\n"
        )
        self._program = folder / "run"
        command = [COMPILER, "-O2", "-Wall", "-Werror", "-static", "-pthread"]
        files = [RUNNER, folder / "table.c", folder / "kernels.o"]
        subprocess.run([*command, *files, "-o", self._program], check=True)
        self._names = list(names)
        self._start()

    def _start(self) -> None:
        self._process = subprocess.Popen(
            [QEMU, "-cpu", LATER_CPU if target.host().has.signed_dot else CPU, self._program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        (count,) = np.frombuffer(self._read(8), np.int64).tolist()
        assert count == len(self._names)
        entries = np.frombuffer(self._read(8 * count), np.int64).tolist()
        self.entries = dict(zip(self._names, entries, strict=True))
        self.helpers = np.frombuffer(self._read(24), np.int64).tolist()

    def _read(self, nbytes: int) -> bytes:
        assert self._process.stdout is not None
        data = self._process.stdout.read(nbytes)
        if len(data) < nbytes:
            raise BrokenPipeError
        return data

    def run(self, entry: int, argument: int, threads: int, image: Image) -> None:
        """Call a kernel, and bring what it did to its memory.

        Raises:
            ChildProcessError: it read or wrote elsewhere; the process is started anew.
        """
        assert self._process.stdin is not None
        head = [entry, argument, threads, len(image.pieces)]
        for address, page in image.pieces:
            head += [address, len(page)]
        try:
            self._process.stdin.write(np.array(head, np.int64).tobytes())
            for _, page in image.pieces:
                self._process.stdin.write(page.tobytes())
            self._process.stdin.flush()
            for _, page in image.pieces:
                page[:] = np.frombuffer(self._read(len(page)), np.uint8)
        except BrokenPipeError:
            assert self._process.stderr is not None
            errors = self._process.stderr.read().decode()
            self._start()
            raise ChildProcessError(f"the emulated process ended: {errors.strip()}") from None


class EmulatedCode:
    """Compiled kernels of another machine, as `Code` has those of this one.

    Attributes:
        addresses: of functions here that run the kernels there.
        parameters: of each kernel, kind and name.
    """

    def __init__(
        self, chosen: target.Target, objects: bytes, functions: Sequence[Function]
    ) -> None:
        self.parameters = {function.name: function.signature for function in functions}
        self._emulated = Emulated(objects, list(self.parameters))
        self._callbacks = {
            name: _Entry(functools.partial(self._guarded, name)) for name in self.parameters
        }
        self.addresses = {
            name: ctypes.cast(callback, ctypes.c_void_p).value or 0
            for name, callback in self._callbacks.items()
        }
        self._names = {address: name for name, address in self.addresses.items()}

    def _guarded(self, kernel: str, arguments: int) -> None:
        """What goes wrong in a function that C calls would be lost: the test finds it in a list."""
        try:
            self._run(kernel, arguments)
        except Exception as error:
            failures.append(f"{kernel}: {error}")
            print(failures[-1], file=sys.stderr)

    def _run(self, kernel: str, place: int) -> None:
        parameters = self.parameters[kernel]
        arguments = Block(place, 8 * len(parameters), words=True)
        words = arguments.memory().view(np.int64)
        helpers: dict[int, int] = {}
        threads = 0
        if kernel in _PARALLEL:
            helpers, number, threads = self._threads(int(words[0]))
            if number:
                return  # the first one starts as many there
        seen = blocks_in_sight(sys._getframe(1))
        pointers = list(self._pointers(seen, kernel, words))
        if kernel in _WORKERS:
            for operation in _operations(int(words[0])):
                name = self._names[int(operation[0])]
                list(self._pointers(seen, name, operation[1:]))
        found = [block for block in seen.reached(pointers) if not _within(block, place)]
        blocks = sorted([*found, arguments], key=lambda block: block.start)
        functions = {
            self.addresses[name]: entry for name, entry in self._emulated.entries.items()
        } | helpers
        image = Image(blocks, _BASE, functions)
        argument = int(image.translated(np.array([place]))[0])
        twin = self._twin_image(kernel, blocks, place)
        self._emulated.run(self._emulated.entries[kernel], argument, threads, image)
        counted["calls"] += 1
        if damage := image.damaged():
            raise ValueError("; ".join(damage))
        if twin is not None:
            tolerance = _OF_PROGRAMS if kernel in _WORKERS else _TOLERANCE
            ordered = self._is_ordered(kernel, blocks)
            _compare(image, twin, 0.0 if ordered else tolerance, words=kernel not in _WORKERS)
        image.take_back()

    def _pointers(self, seen: Sight, kernel: str, words: NDArray[np.int64]) -> Iterator[int]:
        """The addresses among a kernel's arguments.

        Raises:
            LookupError: no array is there.
        """
        for parameter, word in zip(self.parameters[kernel], words.tolist(), strict=False):
            kind, name = parameter.split()
            if kind == "ptr" and word:
                if not seen.knows(word):
                    raise LookupError(f"no array in sight has the memory at {name} of {kernel}")
                yield word

    def _threads(self, program: int) -> tuple[dict[int, int], int, int]:
        """The functions by which a worker asks for its thread, this one's number, and their count."""
        places = (worker.THREAD_NUMBER, worker.THREAD_COUNT, worker.YIELD)
        here = [ctypes.c_int64.from_address(program + 8 * place).value for place in places]
        ask = ctypes.CFUNCTYPE(ctypes.c_int)
        number, count = (ask(function)() for function in here[:2])
        return dict(zip(here, self._emulated.helpers, strict=True)), number, count

    def _is_ordered(self, kernel: str, blocks: Sequence[Block]) -> bool:
        """Whether no kernel of a call adds up lanes; those of a program stand in its operations."""
        unordered = [name for name in self.addresses if any(part in name for part in UNORDERED)]
        words = [block.memory().view(np.int64) for block in blocks if block.words]
        known = [self.addresses[name] for name in unordered]
        return kernel not in unordered and not any(np.isin(known, part).any() for part in words)

    @functools.cached_property
    def _twin(self) -> jit.Code | None:
        """The same kernels of this machine, or None if it cannot fuse multiplications and sums."""
        from hf_sparse.runtime.kernels.all import kernel_functions

        features = target.llvm().get_host_cpu_features()
        if not all(features.get(name) for name in ("avx2", "fma", "f16c", "bmi2")):
            return None
        row = next(row for row in target.INSTRUCTION_SETS if row.name == "portable")
        wide = replace(target.elsewhere(row), registers=32, cpu="x86-64-v3", triple="")
        kept = FLOAT32
        for one in WEIGHT_TYPES.values():
            if one.suffix and any(name.endswith(one.suffix) for name in self.parameters):
                kept = one
        codes = "quantise_row" in self.parameters
        functions = kernel_functions(wide, kept, codes)
        return jit.compile_kernels(functions, wide)  # type: ignore[no-any-return]

    def _twin_image(self, kernel: str, blocks: Sequence[Block], place: int) -> Image | None:
        """What the kernel of this machine does to the same memory."""
        if self._twin is None:
            return None
        functions = {self.addresses[name]: self._twin.addresses[name] for name in self.addresses}
        size = Image(blocks, 0, functions).end
        memory = np.empty(size + 4096, np.uint8)
        base = -(-memory.ctypes.data // 4096) * 4096
        image = Image(blocks, base, functions)
        for address, page in image.pieces:
            start = address - memory.ctypes.data
            memory[start : start + len(page)] = page
        entry = self._twin.addresses[_PARALLEL.get(kernel, kernel)]
        _Entry(entry)(int(image.translated(np.array([place]))[0]))
        for address, page in image.pieces:
            start = address - memory.ctypes.data
            page[:] = memory[start : start + len(page)]
        return image


def _operations(program: int) -> NDArray[np.int64]:
    """The operations of a program, whose words are at an address."""
    words = Block(program, 8 * 4, words=True).memory().view(np.int64)
    starts = Block(
        int(words[worker.STARTS]),
        8 * int(words[worker.PHASES] * words[worker.LISTS] + 1),
        words=True,
    )
    count = int(starts.memory().view(np.int64)[-1])
    block = Block(int(words[worker.OPERATIONS]), 8 * worker.OPERATION_WORDS * count, words=True)
    return block.memory().view(np.int64).reshape(count, worker.OPERATION_WORDS)


def _within(block: Block, place: int) -> bool:
    return block.start <= place < block.end


def _compare(image: Image, twin: Image, tolerance: float, *, words: bool) -> None:
    """Compare the memory behind a call with that of another machine's code.

    Raises:
        ValueError: floats differ by more than `tolerance` of the largest; or integers do, if `words`.
    """
    counted["within a tolerance" if tolerance else "bit for bit"] += 1
    for number, block in enumerate(image.blocks):
        here, there = twin.content(number), image.content(number)
        if block.words:
            if words and not np.array_equal(twin.written(number), image.written(number)):
                raise ValueError(f"{block} has other integers than after x86 code")
        elif not np.array_equal(here, there):
            if block.nbytes % 4:
                raise ValueError(f"{block} has other bytes than after x86 code")
            _compare_floats(here.view(np.float32), there.view(np.float32), tolerance)


def _compare_floats(
    wanted: NDArray[np.float32], found: NDArray[np.float32], tolerance: float
) -> None:
    nan = np.isnan(wanted) & np.isnan(found)
    limit = tolerance * float(np.abs(wanted[np.isfinite(wanted)]).max(initial=0))
    with np.errstate(invalid="ignore"):
        close = (wanted == found) | (np.abs(wanted - found) <= limit)
    wrong = np.flatnonzero(~close & ~nan)
    if len(wrong):
        at = int(wrong[0])
        raise ValueError(
            f"{len(wrong)} of {wanted.size} floats differ from those of x86 code; the first is number "
            f"{at}: {found[at]!r}, not {wanted[at]!r}"
        )
