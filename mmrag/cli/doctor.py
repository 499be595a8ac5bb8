"""``mmrag doctor``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from mmrag.cli.console import NOTHING, errors, print_json, show
from mmrag.cli.display import clean
from mmrag.cli.options import (
    DEFAULT_COLLECTION,
    CollectionOption,
    DebugOption,
    JsonOption,
    open_library,
)
from mmrag.cli.progress import working

if TYPE_CHECKING:
    from mmrag.store.damage import Examination


def doctor(
    collection: CollectionOption = DEFAULT_COLLECTION,
    repair: Annotated[
        bool,
        typer.Option("--repair", help="Read and embed again what is damaged, from its files."),
    ] = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Say what runs here and what can be reached, and check every point of the collection.

    Each point is compared with its checksum, and what is missing is counted.
    """
    with errors(debug):
        with working() as step:
            from mmrag.cli.machine import machine, machine_lines

            about = machine(collection, step)
            step.stop()
            if not as_json:
                # At once: it is of use also where the collection cannot be opened.
                show(*(Text(clean(line)) for line in machine_lines(about)))
        with working() as step:
            step(f"Opening {collection}")
            with open_library(collection) as library:
                step("Reading every point")
                found = library.collection.examine()
                left, n_untraced = found, 0
                if repair and (found.damaged or found.unfinished):
                    step("Reading files")
                    n_untraced = library.repair(found)
                    step("Reading every point")
                    # Looked at again: what a repair reports is what is there, not what was tried.
                    left = library.collection.examine()
        if as_json:
            print_json(
                {
                    "collection": collection,
                    "machine": about,
                    "found": _row(found),
                    "left": _row(left) | {"untraced": n_untraced},
                }
            )
        else:
            _print(found, left, repair, n_untraced)
        if left.damaged or n_untraced:
            raise typer.Exit(NOTHING)


def _row(found: Examination) -> dict[str, object]:
    return {
        "damaged": found.damaged,
        "lost": {entry.file: n_nodes for entry, n_nodes in found.lost.items()},
        "altered": len(found.altered),
        "misplaced": [entry.file for entry in found.misplaced],
        "indexes": found.indexes,
        "missing": found.missing,
        "unfinished": [entry.file for entry in found.unfinished],
    }


def _print(found: Examination, left: Examination, repair: bool, n_untraced: int) -> None:
    lines = list(_lines(found))
    if repair and lines:
        lines += ["", "After the repair:", *(list(_lines(left)) or ["Nothing is damaged."])]
        if n_untraced:
            lines.append(
                f"{n_untraced} points are gone of files that nothing is left of. Run mmrag index "
                "again over all that you have indexed."
            )
    elif found.damaged:
        lines += ["Run mmrag doctor --repair; the files are read again."]
    show(*(Text(clean(line)) for line in ["", *(lines or ["Nothing is damaged."])]))


def _lines(found: Examination) -> Iterator[str]:
    """What was found, one line each."""
    if found.missing > 0:
        yield f"{found.missing} points fewer than when the collection was last closed."
    if found.missing < 0:
        yield f"{-found.missing} points more than when the collection was last closed."
    if found.altered:
        yield f"{len(found.altered)} points are not as they were written."
    for key in found.indexes:
        yield f"The index of {key} does not match the points."
    for entry, n_nodes in found.lost.items():
        yield f"{entry.file}: {n_nodes} of {entry.nodes} nodes are lost."
    for entry in found.misplaced:
        yield f"{entry.file}: nodes have another path."
    for entry in found.unfinished:
        yield f"{entry.file}: is not finished; run mmrag index again."
