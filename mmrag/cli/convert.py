"""``mmrag convert``."""

from __future__ import annotations

import os
from typing import Annotated

import typer
from rich.text import Text

from mmrag.cli.console import errors, print_json, show
from mmrag.cli.display import clean
from mmrag.cli.options import (
    DEFAULT_COLLECTION,
    CollectionOption,
    DebugOption,
    JsonOption,
    QuantizationOption,
    open_library,
)
from mmrag.cli.progress import working


def convert(
    target: Annotated[
        str,
        typer.Argument(
            metavar="FOLDER_OR_URL", help="Where the new collection goes: nothing may be there yet."
        ),
    ],
    collection: CollectionOption = DEFAULT_COLLECTION,
    dim: Annotated[
        int | None,
        typer.Option(
            "--dim",
            min=1,
            help="Keep this many leading dimensions, for embedders that were trained for it "
            "(Matryoshka).",
        ),
    ] = None,
    quantization: QuantizationOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Copy a collection to a folder or server, or to shorter or quantized vectors.

    Nothing is embedded again. It may be stopped at any time: run the same command again to
    continue.
    """
    with errors(debug, "Stopped. Run the same command again to continue."):
        with working() as step:
            step(f"Opening {collection}")
            with open_library(collection) as library:
                n_points = library.convert(
                    target,
                    # One key for both: two servers with different keys are converted in Python.
                    api_key=os.environ.get("QDRANT_API_KEY"),
                    dim=dim,
                    quantization=quantization,
                    progress=lambda done, total: step.often(f"Copied {done} of {total} points"),
                )
        if as_json:
            print_json({"collection": target, "points": n_points})
        else:
            show(Text(clean(f"{n_points} points copied to {target}.")))
