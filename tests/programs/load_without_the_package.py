"""Load a sparse checkpoint where hf_sparse cannot be imported, and print how each call ends."""

from __future__ import annotations

import sys

sys.modules["hf_sparse"] = None  # type: ignore[assignment]

import transformers  # noqa: E402 - where the package cannot be found

for loader in (transformers.AutoModelForCausalLM, transformers.LlamaForCausalLM):
    for trust in (False, True):
        try:
            loader.from_pretrained(sys.argv[1], trust_remote_code=trust)
        except Exception as error:
            print(trust, type(error).__name__, str(error).replace("\n", " "))
        else:
            print("LOADED")
