"""Links in a checkpoint folder: a copy of one that leads out of it would publish a foreign file."""

from __future__ import annotations

from pathlib import Path


def check_links(folder: Path, files: list[Path] | None = None) -> None:
    """Refuse files that are to be copied from a folder, but are links that lead out of it.

    The cache of the Hub is made of links from `snapshots/<revision>` to `blobs` beside it: those
    stay in the repository.

    Args:
        folder: of the checkpoint.
        files: in it, that are to be copied; None: all of them.

    Raises:
        ValueError: one leads elsewhere.
    """
    root = folder.resolve()
    roots = [root]
    roots += [
        place.parent / "blobs"
        for place in root.parents
        if place.name == "snapshots" and place.parent.name.startswith("models--")
    ]
    for file in sorted(folder.rglob("*")) if files is None else files:
        target = file.resolve()
        if not any(target.is_relative_to(allowed) for allowed in roots):
            raise ValueError(
                f"{file} is a link to {target}, out of its folder: copying it would take a file along "
                "that does not belong to the checkpoint. Replace the link by the file, or remove it."
            )
