"""From IR to callable machine code, with the object code kept on disk.

The cache holds one file per set of kernels, target and LLVM version. A file that is not exactly
what this user wrote (cut off, foreign, of another version) is ignored and written anew;
`code_cache.py` tells by what it is known.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_sparse.runtime.llvm import code_cache
from hf_sparse.runtime.llvm.code_cache import DEFAULT_CACHE as DEFAULT_CACHE
from hf_sparse.runtime.llvm.ir import Function
from hf_sparse.runtime.llvm.target import Target, llvm

# What object code in the cache begins with.
_MAGIC = b"hf_sparse object code 3\n"
_LOCK = threading.Lock()  # LLVM's set-up is not safe in two threads at once


class Code:
    """Compiled kernels. They live as long as this object does.

    Attributes:
        addresses: of each kernel's entry.
        parameters: of each kernel, kind and name.
        extents: what calls of each kernel read and write; None for what is called by none.
    """

    def __init__(self, target: Target, object_code: bytes, functions: Sequence[Function]) -> None:
        binding = llvm()
        empty = binding.parse_assembly("")
        self._engine = binding.create_mcjit_compiler(empty, _machine(target))
        self._engine.add_object_file(binding.ObjectFileRef.from_data(object_code))
        self._engine.finalize_object()
        self.parameters = {function.name: function.signature for function in functions}
        self.extents = {function.name: function.extents for function in functions}
        self.addresses = {name: self._engine.get_function_address(name) for name in self.parameters}
        missing = [name for name, address in self.addresses.items() if not address]
        if missing:
            raise ValueError(f"the object code lacks the kernels {', '.join(missing)}")


def compile_kernels(
    functions: Sequence[Function], target: Target, cache: Path | None = DEFAULT_CACHE
) -> Code:
    """Machine code for `functions`, from the cache where it is there.

    Args:
        functions: the kernels; their names differ.
        target: what the code is for.
        cache: folder of the object code, or None to keep none; `~` is the home folder.
    """
    text = module_text(functions)
    version = ".".join(map(str, llvm().llvm_version_info))
    key = hashlib.sha256(f"{version}\n{target}\n{text}".encode()).hexdigest()
    with _LOCK:
        stored = _read(cache / key) if cache else None
        if stored is None:
            stored = _compile(text, target)
            if cache:
                _write(cache / key, stored)
        return Code(target, stored, functions)


def object_code(functions: Sequence[Function], target: Target) -> bytes:
    """An object file with `functions`, for this machine or another (`target.elsewhere`)."""
    with _LOCK:
        return _compile(module_text(functions), target)


def module_text(functions: Sequence[Function]) -> str:
    """The IR of a module."""
    declared = sorted(set().union(*(function.declarations for function in functions)))
    return "\n".join([*declared, *(function.text() for function in functions)])


def _machine(target: Target) -> Any:
    """A new one for each use: an engine frees the one that it was made with."""
    binding = llvm()
    if target.triple:
        binding.initialize_all_targets()
        binding.initialize_all_asmprinters()
    else:
        binding.initialize_native_target()
        binding.initialize_native_asmprinter()
    triple = target.triple or binding.get_process_triple()
    return binding.Target.from_triple(triple).create_target_machine(
        cpu=target.cpu, features=target.features, opt=3
    )


def _compile(text: str, target: Target) -> bytes:
    binding = llvm()
    machine = _machine(target)
    module = binding.parse_assembly(text)
    module.verify()
    options = binding.create_pipeline_tuning_options(speed_level=3)
    # The kernels are unrolled and vectorised as they are written.
    options.loop_unrolling = False
    options.loop_vectorization = False
    options.slp_vectorization = False
    builder = binding.create_pass_builder(machine, options)
    builder.getModulePassManager().run(module, builder)
    code: bytes = machine.emit_object(module)
    return code


def _read(file: Path) -> bytes | None:
    """The object code that this user kept in a file, if any."""
    data = code_cache.read(file.parent, file.name)
    return data.removeprefix(_MAGIC) if data and data.startswith(_MAGIC) else None


def _write(file: Path, code: bytes) -> None:
    """Keep object code in a file; a cache that cannot be written is no error, the code is there."""
    code_cache.write(file.parent, file.name, _MAGIC + code)
