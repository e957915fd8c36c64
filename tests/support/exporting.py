"""Whether ONNX graphs can be exported here: transformers exports from 5.23 on."""

from __future__ import annotations

import pytest

from hf_sparse.exporters.can_export import check_packages

try:
    check_packages()
    WHY_NOT = ""
except ImportError as error:
    WHY_NOT = str(error)

needs_export = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT or "exports work here")


def skip_unless_exports(call: str) -> None:
    """Skip a case of a test of several calls where `export_onnx` or `export_gguf` does not work."""
    if call == "export_onnx" and WHY_NOT:
        pytest.skip(WHY_NOT)
    if call == "export_gguf":
        pytest.importorskip("gguf")
