"""``mmrag report``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmrag.cli.console import errors, print_json, say, show
from mmrag.cli.options import (
    DEFAULT_COLLECTION,
    CollectionOption,
    DebugOption,
    EmbedderOption,
    JsonOption,
    open_library,
)
from mmrag.cli.progress import working

if TYPE_CHECKING:
    from rich.table import Table

    from mmrag.evaluation.storage import StorageSetting


def report(
    questions: Annotated[
        Path | None,
        typer.Argument(
            metavar="[QUESTIONS.jsonl]",
            exists=True,
            dir_okay=False,
            help='Lines of {"question": ...} to search with. Default: 200 stored vectors.',
        ),
    ] = None,
    collection: CollectionOption = DEFAULT_COLLECTION,
    embedder: EmbedderOption = None,
    dim: Annotated[
        list[int] | None,
        typer.Option(
            "--dim",
            min=1,
            help="Measure with this many leading dimensions as well (Matryoshka); may be repeated.",
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            "--plot", metavar="FILE", help="Draw recall by memory: .png or .svg (extra eval)."
        ),
    ] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Measure what int8 and binary codes, and fewer dimensions, would cost and save.

    Recall against exact search, bytes of a vector in memory, and latency, on the vectors of the
    collection, which is only read. mmrag convert applies what you choose.
    """
    with errors(debug):
        with working() as step:
            step(f"Opening {collection}")
            from mmrag.embedders.base import check_dim
            from mmrag.errors import ConfigError
            from mmrag.evaluation.questions import read_questions
            from mmrag.evaluation.storage import measure_storage, plot_storage

            with open_library(collection, embedder) as library:
                full = library.collection.settings.dim
                queries = None
                # The model is loaded only for what cannot be known without it.
                trained = getattr(library.embedder, "matryoshka_dims", ()) if dim else ()
                dims = sorted({full, *(check_dim(each, full, trained) for each in dim or ())})
                if questions is not None:
                    step("Embedding the questions")
                    texts = [each.text for each in read_questions(questions)]
                    queries = library.embedder.encode(
                        # Whole: each dimension measured is a cut of these.
                        list(texts),
                        instruction="page_for_question",
                        dim=full,
                    )
                settings, too_few = [], []
                for view in library.collection.settings.views:
                    try:
                        settings += measure_storage(
                            library.collection, view, queries=queries, dims=dims, progress=step
                        )
                    except ConfigError as error:
                        # One view may have too few vectors where another has enough.
                        too_few.append(error)
                if not settings:
                    raise too_few[0]
        # After the spinner, which would overwrite it.
        for left_out in too_few:
            say(str(left_out))
        if plot is not None:
            plot_storage(settings, plot)
        if as_json:
            print_json([dataclasses.asdict(each) for each in settings])
        else:
            show(_table(settings))


def _table(settings: list[StorageSetting]) -> Table:
    from rich.table import Table

    table = Table("view", "dimensions", "codes", box=None)
    for heading in ("recall of the 10 nearest", "bytes a vector", "p50 ms", "p99 ms"):
        table.add_column(heading, justify="right")
    for each in settings:
        table.add_row(
            each.view,
            str(each.dim),
            each.quantization,
            f"{each.recall:.3f}",
            f"{each.bytes_per_vector:,.0f}",
            f"{each.p50_ms:.2f}",
            f"{each.p99_ms:.2f}",
        )
    return table
