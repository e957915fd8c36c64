"""The digests of a compiled model's two files, in its description.

They find what was damaged or edited where every count still fits: a weight, a scale, the grid of the
head. They are no signature: whoever can write the files can write their digests, too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hf_sparse.checkpoint.digests import digest_of

# The entry of the description.
DIGESTS = "digests"


def digests(described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """What the entry holds.

    Args:
        described: the description, as JSON gives it back.
        tensors: all that are stored.
    """
    rest = {key: value for key, value in described.items() if key != DIGESTS}
    text = json.dumps(rest, sort_keys=True)
    return {
        "description": hashlib.sha256(text.encode()).hexdigest(),
        "weights": digest_of(tensors),
    }


def check_digests(described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Compare a compiled model with the digests that it was saved with.

    Files of earlier versions have none, and pass.

    Raises:
        ValueError: it was changed since.
    """
    if DIGESTS not in described:
        return
    told, found = described[DIGESTS], digests(described, tensors)
    for part, digest in found.items():
        promised = told.get(part) if isinstance(told, dict) else told
        if promised != digest:
            raise ValueError(
                f"its {part} were changed since the model was saved: the digest is {digest}, and "
                f"compiled.json tells {str(promised)[:80]}. Compile the model again."
            )
