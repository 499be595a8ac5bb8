"""``mmrag snapshot``."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from mmrag.cli.console import EXIT_CODES, MARKUP, errors, print_json, show
from mmrag.cli.display import clean, plain_table
from mmrag.cli.options import DEFAULT_COLLECTION, CollectionOption, DebugOption, JsonOption
from mmrag.cli.progress import working
from mmrag.cli.serving import need_no_server, server_of

if TYPE_CHECKING:
    from mmrag.store.snapshots import Snapshot, Snapshots

snapshots = typer.Typer(
    name="snapshot",
    help="Keep versions of a collection, and go back to one.",
    epilog=EXIT_CODES,
    rich_markup_mode=MARKUP,
    no_args_is_help=True,
)


@snapshots.command("create", epilog=EXIT_CODES)
def create(
    name: Annotated[str | None, typer.Argument(help="Default: date and time (UTC).")] = None,
    collection: CollectionOption = DEFAULT_COLLECTION,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Keep the collection as it is now: vectors, texts, page images and uploaded files.

    In a folder it takes the space of the vectors and texts; images are linked.
    """
    with errors(debug):
        with working() as step:
            step(f"Keeping {collection}")
            server = server_of(collection)
            made = server.create_snapshot(name) if server else _of(collection).create(name)
        _done(made, "kept", as_json)


@snapshots.command("list", epilog=EXIT_CODES)
def list_snapshots(
    collection: CollectionOption = DEFAULT_COLLECTION,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """List the snapshots of a collection, oldest first."""
    with errors(debug):
        with working() as step:
            step(f"Opening {collection}")
            versions = _of(collection)
            found = versions.list()
        if as_json:
            print_json([asdict(each) for each in found])
            return
        table = plain_table(f"{len(found)} snapshots in {versions.folder}")
        table.add_column("name", overflow="fold")
        table.add_column("made (UTC)")
        for heading in ("files", "pages", "points"):
            table.add_column(heading, justify="right")
        for each in found:
            when = clean(each.created[:19].replace("T", " "))
            table.add_row(each.name, when, str(each.files), str(each.pages), str(each.points))
        show(table)


@snapshots.command("restore", epilog=EXIT_CODES)
def restore(
    name: Annotated[str, typer.Argument(help="As mmrag snapshot list shows it.")],
    collection: CollectionOption = DEFAULT_COLLECTION,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Go back to a snapshot; what was stored since is lost unless it is in another one.

    It may be stopped at any moment: the collection is then the old one or the restored one.
    """
    with errors(debug, "Stopped. The collection is as before, or restored."):
        with working() as step:
            step(f"Restoring {collection}")
            need_no_server(collection)
            restored = _of(collection).restore(name)
        _done(restored, "restored", as_json)


def _of(collection: str) -> Snapshots:
    # Imported late: --help has no use for Qdrant.
    from mmrag.store.snapshots import Snapshots

    return Snapshots.of(collection, api_key=os.environ.get("QDRANT_API_KEY"))


def _done(snapshot: Snapshot, verb: str, as_json: bool) -> None:
    if as_json:
        print_json(asdict(snapshot))
    else:
        show(Text(f"{snapshot.name}: {snapshot.files} files, {snapshot.pages} pages {verb}."))
