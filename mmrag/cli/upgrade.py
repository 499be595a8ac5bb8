"""``mmrag upgrade``."""

from __future__ import annotations

import os

from mmrag.cli.console import errors, print_json, show
from mmrag.cli.options import DEFAULT_COLLECTION, CollectionOption, DebugOption, JsonOption
from mmrag.cli.progress import working
from mmrag.cli.serving import need_no_server


def upgrade(
    collection: CollectionOption = DEFAULT_COLLECTION,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Bring a collection built by an older mmrag up to date; nothing is embedded again.

    It may be stopped at any time: run the same command again to continue.
    """
    with errors(debug, "Stopped. Run the same command again to continue."):
        with working() as step:
            need_no_server(collection)
            step(f"Rebuilding the terms of {collection}")
            from mmrag.store.collection import Collection

            n_nodes = Collection.upgrade(collection, api_key=os.environ.get("QDRANT_API_KEY"))
        if as_json:
            print_json({"collection": collection, "nodes": n_nodes})
        else:
            show(f"{n_nodes} nodes upgraded." if n_nodes else "Already up to date.")
