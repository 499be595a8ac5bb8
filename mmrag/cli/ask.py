"""``mmrag ask``."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmrag.cli import display
from mmrag.cli.console import NOTHING, errors, out, print_json, say, show
from mmrag.cli.llm import BaseURLOption, LLMOption, NoImagesOption, WindowOption, chat_model
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
from mmrag.cli.progress import Step, working
from mmrag.cli.reranking import RerankOption, rerankers
from mmrag.cli.serving import server_of

if TYPE_CHECKING:
    from mmrag.answering.context import Source
    from mmrag.answering.engine import CitedQueryEngine
    from mmrag.answering.planning import PlanningQueryEngine
    from mmrag.answering.response import CitedResponse

# What a server has been told when it was started.
_OF_THE_SERVER = ["llm", "base_url", "context_window", "no_images", "rerank", "plan", "embedder"]


def ask(
    context: typer.Context,
    question: Annotated[str | None, typer.Argument(help="A question in any language.")] = None,
    image: ImageOption = None,
    llm: LLMOption = None,
    base_url: BaseURLOption = None,
    context_window: WindowOption = None,
    no_images: NoImagesOption = False,
    top_k: Annotated[int, typer.Option("--top-k", "-k", min=1, help="Pages to consider.")] = 8,
    file: FileOption = None,
    pages: PagesOption = None,
    kind: KindOption = None,
    condition: WhereOption = None,
    rerank: RerankOption = None,
    plan: Annotated[
        bool,
        typer.Option(
            "--plan", help="Split the question where one search is not enough; needs --llm."
        ),
    ] = False,
    save_pages: Annotated[
        Path | None,
        typer.Option(
            "--save-pages",
            metavar="DIR",
            help="Save the cited pages as images, with the matching lines marked.",
        ),
    ] = None,
    collection: CollectionOption = DEFAULT_COLLECTION,
    embedder: EmbedderOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Answer a question from the indexed pages, citing them as [1], [2]."""
    with errors(debug):
        need_query(question, image)
        text = question or ""
        live = out().is_terminal and not as_json
        with working() as step:
            step(f"Opening {collection}")
            from mmrag.queries import MultimodalQuery

            where = where_from(file, pages, kind, condition)
            query = MultimodalQuery(text, image=image, where=where, top_k=top_k)
            server = server_of(collection, context, *_OF_THE_SERVER)
            if server is not None:
                step(f"Asking {server.address.url}")
                streaming = live
                response = _finished(server.ask(query)[1], step, live=live)
            else:
                model = chat_model(llm, base_url, context_window)
                # Extracts are there at once: nothing to stream.
                streaming = live and model is not None
                with open_library(collection, embedder) as library:
                    step("Loading the embedder")
                    # Each reranker keeps a third of what it is given.
                    query.top_k = top_k * 3 ** len(rerank or ())
                    cited = library.as_query_engine(
                        model,
                        rerankers(rerank, model, top_k, images=not no_images),
                        streaming=streaming,
                        images=not no_images,
                    )
                    step("Searching and answering")
                    engine = _planned(cited) if plan else cited
                    # Within the library: a stream reads pages while it runs.
                    response = _finished(engine.query(query), step, live=live)
        saved = _save_pages(response, save_pages) if save_pages else {}
        planned = (response.metadata or {}).get("plan")
        if as_json:
            print_json(response.to_dict(text) | ({"plan": planned} if planned else {}))
        else:
            _print_answer(response, saved, planned, streamed=streaming)
        # After the answer was printed: scripts tell by the exit code.
        if not response.found:
            raise typer.Exit(NOTHING)


def _print_answer(
    response: CitedResponse,
    saved: dict[int, str],
    plan: Mapping[str, Any] | None,
    *,
    streamed: bool,
) -> None:
    """The answer unless it was streamed, its sources, and the plan behind it."""
    if not streamed:
        show(display.answer_view(response))
    show(display.sources_view(response, saved))
    if plan:
        show(display.plan_view(plan))


def _planned(engine: CitedQueryEngine) -> PlanningQueryEngine:
    from mmrag.answering.planning import PlanningQueryEngine

    return PlanningQueryEngine(engine)


def _finished(reply: object, step: Step, *, live: bool) -> CitedResponse:
    """The checked answer; a stream is shown word by word where ``live``."""
    from mmrag.answering.response import CitedResponse, CitedStreamingResponse

    if isinstance(reply, CitedResponse):
        return reply
    assert isinstance(reply, CitedStreamingResponse)
    if live:
        console = out()
        for token in reply.response_gen:
            # The spinner and the words would overwrite each other.
            step.stop()
            console.file.write(display.clean(token))
            console.file.flush()
        console.print()
    return reply.get_response()


def save_page(source: Source, to: Path) -> Path | None:
    """Save the image of a source's page, marked in a PDF, as ``to`` with a suffix.

    Returns:
        Where it is; None for a source without an image.

    Raises:
        ReadError: If the page cannot be read, or its file is not the one that was indexed.
    """
    from mmrag.reading import save_marked_page

    if source.path.suffix.lower() == ".pdf" and source.page is not None:
        boxes = source.boxes or ((source.box,) if source.box else ())
        metadata = source.node.node.metadata
        image, indexed = metadata.get("page_image"), str(metadata.get("sha256", ""))
        out = to.with_name(f"{to.name}.png")
        return save_marked_page(source.path, source.page, boxes, out, image, indexed)
    if source.image is None:
        return None
    out = to.with_name(f"{to.name}{source.image.suffix}")
    return Path(shutil.copyfile(source.image, out))


def _save_pages(response: CitedResponse, folder: Path) -> dict[int, str]:
    """Images of the cited pages, by source number; a page that cannot be saved is reported."""
    from mmrag.errors import ReadError

    saved: dict[int, str] = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        say(f"Pages cannot be saved: {error}")
        return saved
    for source in response.cited:
        page = "" if source.page is None else f"-p{source.page}"
        # Numbered as cited, so that two files of one name do not meet.
        name = f"{source.n:02d}-{display.clean(Path(source.file).stem)}{page}"
        try:
            if (path := save_page(source, folder / name)) is not None:
                saved[source.n] = str(path)
        except (ReadError, OSError) as error:
            say(f"[{source.n}] cannot be saved: {error}")
    return saved
