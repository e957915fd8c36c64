"""Print the modules that importing the package loads."""

from __future__ import annotations

import sys

import hf_sparse

assert hf_sparse.__name__ in sys.modules
print(*sys.modules)
