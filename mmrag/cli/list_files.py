"""``mmrag list``."""

from __future__ import annotations

from mmrag.cli import display
from mmrag.cli.console import errors, print_json, show
from mmrag.cli.options import (
    DEFAULT_COLLECTION,
    CollectionOption,
    DebugOption,
    JsonOption,
    open_library,
)
from mmrag.cli.progress import working
from mmrag.cli.serving import server_of


def list_files(
    collection: CollectionOption = DEFAULT_COLLECTION,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """List the indexed files."""
    with errors(debug):
        with working() as step:
            step(f"Opening {collection}")
            if (server := server_of(collection)) is not None:
                embedder, files = server.files()
            else:
                with open_library(collection) as library:
                    embedder, files = library.collection.settings.embedder, library.files()
        if as_json:
            rows = [vars(entry) | {"errors": list(entry.errors)} for entry in files]
            print_json({"collection": collection, "embedder": embedder, "files": rows})
            return
        total = sum(entry.pages for entry in files)
        title = f"{len(files)} files, {total} pages, embedded by {embedder}"
        show(display.files_view(files, title))
