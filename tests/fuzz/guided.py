"""One subject, driven by coverage: `python -m tests.fuzz.guided SUBJECT FOLDER SECONDS`."""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports(
    include=["hf_sparse.formats", "hf_sparse.checkpoint", "hf_sparse.effort"]
):
    from tests.fuzz.subjects import be_quiet
    from tests.fuzz.trial import honest, trial


def main() -> None:
    """Run libFuzzer; it ends the process with another status than 0 if something is found."""
    name, folder, seconds = sys.argv[1:]
    be_quiet()
    honest(name)
    options = [f"-max_total_time={seconds}", "-timeout=10", "-rss_limit_mb=6000", "-max_len=128"]
    options += [f"-artifact_prefix={folder}/", "-print_final_stats=1", "-verbosity=0", folder]
    atheris.Setup([sys.argv[0], *options], lambda data: trial(name, data) and None)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
