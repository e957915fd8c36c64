"""Load checkpoints by transformers alone, and print how each answers as JSON, one line each.

Arguments: folders. Beside each, under its name with the ending `.safetensors`, lie the inputs that are
given to the model and the first of the outputs that it is to give.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.modules["hf_sparse"] = None  # type: ignore[assignment]

import torch  # noqa: E402 - where the package cannot be found
import transformers  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

for argument in sys.argv[1:]:
    folder = Path(argument)
    config = json.loads((folder / "config.json").read_text())
    model_class: Any = getattr(transformers, config["architectures"][0])
    model, info = model_class.from_pretrained(folder, output_loading_info=True)
    expected = load_file(folder.with_suffix(".safetensors"))
    with torch.no_grad():
        found = model.eval()(input_ids=expected["input_ids"])[0]
    answer = {
        "class": type(model).__name__,
        "type": config["model_type"],
        "errors": sum(len(info[key]) for key in info if key.endswith("_keys")),
        "difference": float((found - expected["output"]).abs().max()),
    }
    if model.can_generate():
        generated = model.generate(
            expected["input_ids"], max_new_tokens=6, do_sample=False, pad_token_id=1
        )
        answer["generated"] = generated.tolist()
    print(json.dumps(answer))
