"""``mmrag remove``."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.text import Text

from mmrag.cli.console import NOTHING, errors, print_json, say, show
from mmrag.cli.display import clean
from mmrag.cli.options import (
    DEFAULT_COLLECTION,
    CollectionOption,
    DebugOption,
    JsonOption,
    open_library,
)
from mmrag.cli.progress import working
from mmrag.cli.serving import server_of


def remove(
    patterns: Annotated[
        list[str], typer.Argument(metavar="FILE...", help="Paths, file names or globs.")
    ],
    collection: CollectionOption = DEFAULT_COLLECTION,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Remove files from the collection; the files themselves are not touched."""
    with errors(debug):
        with working() as step:
            step(f"Opening {collection}")
            from mmrag.store.matching import matching_paths

            if (server := server_of(collection)) is not None:
                step("Removing")
                removed = server.remove(patterns)
            else:
                with open_library(collection) as library:
                    step("Removing")
                    removed = library.remove(*patterns)
        if as_json:
            print_json({"removed": removed})
        for path in () if as_json else removed:
            show(Text(f"removed {clean(path)}"))
        # A pattern that matched nothing is most often a slip, also beside others that did.
        unmatched = [each for each in patterns if not matching_paths([each], removed)]
        if unmatched:
            say(f"No indexed file matches {', '.join(unmatched)}.")
        if not removed:
            raise typer.Exit(NOTHING)
