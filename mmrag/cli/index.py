"""``mmrag index``."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mmrag.cli import display
from mmrag.cli.console import NOTHING, errors, print_json, say, show
from mmrag.cli.llm import BaseURLOption, chat_model
from mmrag.cli.options import (
    DEFAULT_COLLECTION,
    CollectionOption,
    DebugOption,
    EmbedderOption,
    JsonOption,
    MetaOption,
    QuantizationOption,
    metadata_from,
    open_library,
)
from mmrag.cli.progress import indexing, working
from mmrag.cli.serving import server_of

if TYPE_CHECKING:
    from mmrag.embedders.late import LateInteraction
    from mmrag.index import UniversalIndex
    from mmrag.ingest.progress import IngestReport, Progress
    from mmrag.server.client import ServerClient

# A server has opened its collection and loaded its models already.
_NOT_BY_A_SERVER = (
    *("embedder", "device", "language", "ocr", "clips", "late", "pool_factor", "muvera"),
    *("describe", "base_url", "quantization", "watch"),
)
STOPPED = "Stopped. What is finished is kept; run the same command to go on."


def index(
    context: typer.Context,
    paths: Annotated[
        list[str], typer.Argument(metavar="PATH_OR_URL...", help="Files, folders and URLs.")
    ],
    collection: CollectionOption = DEFAULT_COLLECTION,
    embedder: EmbedderOption = None,
    device: Annotated[
        str,
        typer.Option(
            "--device",
            metavar="NAME",
            help="Where the model runs: cpu, cuda, cuda:1, mps; several, as in cuda:0,cuda:1, "
            "share the work. Default: the first GPU, else the CPU.",
        ),
    ] = "auto",
    language: Annotated[
        str | None,
        typer.Option(
            "--language",
            metavar="NAME",
            help="Language of the documents, for keyword search: english, german, french, ..., "
            "or none for no stemming. Default: detected for each document. Only when the "
            "collection is made.",
        ),
    ] = None,
    ocr: Annotated[
        Literal["auto", "off", "force"] | None,
        typer.Option(
            "--ocr",
            help="Recognise text (needs the extra ocr): auto, the default, where a page has no "
            "usable text layer; off; force on all pages, in place of their text layers.",
        ),
    ] = None,
    clips: Annotated[
        bool,
        typer.Option(
            "--clips",
            help="Embed the pages of videos as clips, a frame a second, by a model that takes "
            "clips. Only when the collection is made.",
        ),
    ] = False,
    late: Annotated[
        str | None,
        typer.Option(
            "--late",
            metavar="NAME_OR_FOLDER",
            help="Also keep a vector of each token by this model (ColPali, ColQwen2, ...), to "
            "compare the pages found first once more. Only when the collection is made.",
        ),
    ] = None,
    pool_factor: Annotated[
        float, typer.Option("--pool-factor", min=1, help="With --late: tokens that become one.")
    ] = 3.0,
    muvera: Annotated[
        bool,
        typer.Option("--muvera", help="With --late: also find pages by MUVERA's single vectors."),
    ] = False,
    describe: Annotated[
        str | None,
        typer.Option(
            "--describe",
            metavar="MODEL",
            help="Describe figures, image files and pages without words by a model that takes "
            "images, at an OpenAI-compatible server (key: OPENAI_API_KEY), or the folder of a "
            "checkpoint. An image is described once; the report has the cost.",
        ),
    ] = None,
    base_url: BaseURLOption = None,
    quantization: QuantizationOption = None,
    prune: Annotated[
        bool, typer.Option("--prune", help="Remove files that are gone from the given folders.")
    ] = False,
    watch: Annotated[
        bool,
        typer.Option("--watch", help="Then index changes of the folders as they come, and prune."),
    ] = False,
    meta: MetaOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Index PDFs, images, text and Office files; unchanged files are skipped.

    A URL that you give is downloaded, and asked for changes by the next run.

    You can stop it at any moment: finished files are kept, and the same command continues.
    """
    with errors(debug, STOPPED):
        with working(log=True) as step:
            step(f"Opening {collection}")
            from mmrag.reading import ReadOptions

            # Given only when asked for: a collection keeps the options that built it.
            reading = ReadOptions(ocr=ocr or "auto", clips=clips) if ocr or clips else None
            metadata = metadata_from(meta)
            if (server := server_of(collection, context, *_NOT_BY_A_SERVER)) is not None:
                step(f"Indexing at {server.address.url}")
                step.stop()
                _finish(_at_server(server, paths, prune, metadata), as_json)
                return
            if watch:
                from mmrag.ingest.watch import require

                require(paths)
            if late:
                step(f"Loading {late}")
            llm = chat_model(describe, base_url, None) if describe else None
            # Before the collection is opened, so that a wrong name leaves no empty one behind.
            interaction = _interaction(late, pool_factor, muvera)
            with open_library(
                collection,
                embedder,
                device=device,
                reading=reading,
                language=language,
                late=interaction,
                quantization=quantization,
            ) as library:
                step("Reading files")
                # The bar takes over the line of the spinner.
                step.stop()
                with indexing() as progress:
                    add = partial(library.add, metadata=metadata, describe=llm)
                    report = add(list(paths), progress=progress, prune=prune or watch)
                if watch:
                    _watch(library, add, paths, report, as_json)
        _finish(report, as_json)


def _at_server(
    server: ServerClient, paths: list[str], prune: bool, metadata: Mapping[str, Any] | None
) -> IngestReport:
    """Have a server index files that it can read itself, and show how far it is."""
    n_waits = 0
    with indexing() as progress:

        def show(now: Progress | None) -> None:
            nonlocal n_waits
            if now is not None:
                progress(now)
                return
            n_waits += 1
            # The first comes at once, whether or not there is anything to wait for.
            if n_waits == 2:
                say("Waiting: the server is indexing other files.")

        return server.index(paths, show, prune=prune, metadata=metadata)


def _finish(report: IngestReport, as_json: bool) -> None:
    """Show the report, and end with its status."""
    _show(report, as_json)
    # A status of its own: a script may go on although some file could not be read.
    if report.failed or report.errors:
        raise typer.Exit(NOTHING)


def _show(report: IngestReport, as_json: bool) -> None:
    if as_json:
        cost = report.descriptions and vars(report.descriptions)
        from mmrag.ingest.progress import error_row

        rows = [error_row(error) for error in report.errors]
        print_json(vars(report) | {"errors": rows, "descriptions": cost})
        return
    show(display.report_view(report))
    if report.errors or report.known_errors:
        # On stderr, so that a pipe gets the counts alone.
        show(display.failures_view(report), stderr=True)


def _watch(
    library: UniversalIndex,
    add: Callable[[list[Path]], IngestReport],
    folders: Sequence[str],
    report: IngestReport,
    as_json: bool,
) -> None:
    """Index what changes, until Ctrl-C. report: of the run before, which is shown first."""
    from mmrag.ingest.watch import watch

    _show(report, as_json)
    say("Watching (Ctrl-C stops)")
    for changed in watch(folders, threading.Event()):
        report = add(list(changed))
        report.removed += library.prune(*folders)
        _show(report, as_json)


def _interaction(name: str | None, pool_factor: float, muvera: bool) -> LateInteraction | None:
    """What --late and the options beside it ask for."""
    if name is None:
        if muvera:
            raise typer.BadParameter("--muvera needs --late.")
        return None
    from mmrag.embedders.late import LateInteraction, load_token_embedder
    from mmrag.embedders.muvera import Muvera

    return LateInteraction(load_token_embedder(name), pool_factor, Muvera() if muvera else None)
