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
