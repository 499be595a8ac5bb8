"""``mmrag search``."""

from __future__ import annotations

from typing import Annotated

import typer

from mmrag.cli import display
from mmrag.cli.console import NOTHING, errors, print_json, show
from mmrag.cli.options import (
    DEFAULT_COLLECTION,
    CollectionOption,
    DebugOption,
    EmbedderOption,
    FileOption,
    ImageOption,
    JsonOption,
    KindOption,
    PagesOption,
    WhereOption,
    need_query,
    open_library,
    where_from,
)
from mmrag.cli.progress import working
from mmrag.cli.serving import server_of


def search(
    context: typer.Context,
    query: Annotated[str | None, typer.Argument(help="What to look for.")] = None,
    image: ImageOption = None,
    top_k: Annotated[int, typer.Option("--top-k", "-k", min=1, help="Pages to show.")] = 8,
    file: FileOption = None,
    pages: PagesOption = None,
    kind: KindOption = None,
    condition: WhereOption = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Show rank, score and credit in each ranking.")
    ] = False,
    collection: CollectionOption = DEFAULT_COLLECTION,
    embedder: EmbedderOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Find the pages that match a text, an image, or both."""
    with errors(debug):
        need_query(query, image)
        with working() as step:
            step(f"Opening {collection}")
            from mmrag.queries import MultimodalQuery

            where = where_from(file, pages, kind, condition)
            server = server_of(collection, context, "embedder")
            if server is not None:
                step(f"Searching at {server.address.url}")
                asked = MultimodalQuery(query or "", image=image, where=where, top_k=top_k)
                hits = server.search(asked, explain=explain)
            else:
                with open_library(collection, embedder) as library:
                    step("Loading the embedder")
                    retriever = library.as_retriever(
                        similarity_top_k=top_k, where=where, explain=explain
                    )
                    step("Searching")
                    hits = retriever.search(query, image)
        words = query or ""
        if as_json:
            print_json({"query": query, "hits": [display.hit_row(hit, words) for hit in hits]})
        elif hits:
            show(display.hits_view(hits, words))
        else:
            show("Nothing found.")
        if not hits:
            raise typer.Exit(NOTHING)
