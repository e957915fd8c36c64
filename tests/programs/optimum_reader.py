"""Open an export with Optimum and print what it computes; runs in the environment of Optimum."""

import json
import sys
from pathlib import Path

import optimum.onnxruntime
import torch


def main() -> None:
    """`optimum_reader.py FOLDER READER INPUTS`: a folder, the name of a class, JSON of inputs."""
    folder, reader, inputs = sys.argv[1:]
    model = getattr(optimum.onnxruntime, reader).from_pretrained(Path(folder))
    given = {name: torch.tensor(value) for name, value in json.loads(inputs).items()}
    if reader == "ORTModelForCausalLM":
        found = model.generate(**given, max_new_tokens=12, do_sample=False)
        print(json.dumps({"ids": found.tolist()}))
        return
    outputs = model(**given)
    print(
        json.dumps({name: value.tolist() for name, value in outputs.items() if value is not None})
    )


if __name__ == "__main__":
    main()
