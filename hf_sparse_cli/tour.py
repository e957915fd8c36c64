"""What `hf-sparse` without arguments shows: a first run, and the commands by what they are for."""

from __future__ import annotations

from hf_sparse_cli.names import Parser
from hf_sparse_cli.upstream import commands_of

_FIRST_RUN = """\
hf-sparse makes language models sparse, stores them small, and runs them faster on CPUs.

a first run, with a text file of yours:
  hf-sparse prune HuggingFaceTB/SmolLM2-135M sparse --pattern 2:4 --calibration text.txt
  hf-sparse eval sparse --dense HuggingFaceTB/SmolLM2-135M --text held_out.txt
  hf-sparse bench sparse --explain
"""
# The commands by what they are for; a command that is in no row is listed under the last one.
PURPOSES = {
    "make weights zero, or of few bits, and train what is left": ("prune", "quantize", "recover"),
    "make a smaller model that needs no zeros": ("shrink", "slim"),
    "look and measure": ("inspect", "eval", "bench"),
    "hand it on": ("export", "push", "convert"),
}


def tour(parser: Parser) -> str:
    """The tour, from the commands of a parser."""
    commands = commands_of(parser)
    width = max(map(len, commands))
    grouped = {name for names in PURPOSES.values() for name in names}
    purposes = {**PURPOSES, "more": tuple(name for name in commands if name not in grouped)}
    lines = [_FIRST_RUN]
    for purpose, names in purposes.items():
        if names:
            told = (f"  {name:{width}}  {commands[name].description[:-1]}" for name in names)
            lines += [f"{purpose}:", *told, ""]
    lines += [
        "hf-sparse COMMAND --help tells the flags of a command, with examples.",
        "hf-sparse --help tells exit codes and how the shell completes commands.",
    ]
    return "\n".join(lines)
