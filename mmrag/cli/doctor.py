"""``mmrag doctor``."""

from __future__ import annotations

from typing import Annotated

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


def doctor(
    collection: CollectionOption = DEFAULT_COLLECTION,
    repair: Annotated[
        bool, typer.Option("--repair", help="Read the files again that have lost something.")
    ] = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Find files of which pages are missing from the collection."""
    with errors(debug):
        with working() as step:
            step(f"Opening {collection}")
            with open_library(collection) as library:
                step("Counting")
                damaged = library.collection.damaged()
                if damaged and repair:
                    step("Reading files")
                    library.add([entry.path for entry in damaged])
                    damaged = library.collection.damaged()
        if as_json:
            print_json({"collection": collection, "damaged": [entry.file for entry in damaged]})
        elif not damaged:
            show("Nothing is missing.")
        for entry in () if as_json else damaged:
            show(Text(f"{clean(entry.file)} has lost nodes; run mmrag doctor --repair"))
        if damaged:
            raise typer.Exit(NOTHING)
