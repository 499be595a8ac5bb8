"""The command line: ``mmrag index | search | ask | list | remove | models``.

Heavy packages are imported inside the commands, so that ``--help`` is there at once.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from mmrag.cli import display
from mmrag.errors import ConfigError, ContentError, MMRagError

if TYPE_CHECKING:
    from llama_index.core.postprocessor.types import BaseNodePostprocessor
    from llama_index.core.schema import NodeWithScore
    from llama_index.llms.openai_like import OpenAILike

    from mmrag.answering.engine import CitedQueryEngine
    from mmrag.answering.planning import PlanningQueryEngine
    from mmrag.answering.response import CitedResponse
    from mmrag.index import UniversalIndex
    from mmrag.ingest.progress import Progress
    from mmrag.llms.local import LocalLLM
    from mmrag.queries import Where

EXIT_CODES = """\
Exit codes: 0 done; 1 nothing found, or some files could not be read; 2 wrong use;
3 the collection, the model or the server failed; 130 stopped by Ctrl-C.
"""
NOTHING, USAGE, FAILURE, STOPPED = 1, 2, 3, 130

app = typer.Typer(
    name="mmrag",
    help="Ask a folder of PDFs and images; every answer cites its pages.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

CollectionOption = Annotated[
    str,
    typer.Option(
        "--collection",
        "-c",
        metavar="FOLDER_OR_URL",
        envvar="MMRAG_COLLECTION",
        help="Folder of the collection, or URL of a Qdrant server (key: QDRANT_API_KEY).",
    ),
]
EmbedderOption = Annotated[
    str | None,
    typer.Option(
        "--embedder",
        "-e",
        metavar="NAME_OR_FOLDER",
        help="Embedding model. Default: the one that built the collection, else mmrag-nano.",
    ),
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout.")
]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
ImageOption = Annotated[
    Path | None,
    typer.Option("--image", "-i", metavar="PATH", help="An image to ask with, or to ask about."),
]
FileOption = Annotated[
    list[str] | None,
    typer.Option("--file", metavar="PATTERN", help="Only this file or glob; may be repeated."),
]
PagesOption = Annotated[
    str | None, typer.Option("--pages", metavar="3-9", help="Only these pages: 5, 3-9, 3- or -9.")
]
KindOption = Annotated[
    list[str] | None,
    typer.Option(
        "--kind",
        metavar="KIND",
        help="Only page, figure, passage, picture or text; may be repeated.",
    ),
]
KINDS = ("page", "figure", "passage", "picture", "text")
DEFAULT_COLLECTION = "./mmrag-library"


def main() -> None:
    """Entry point of the console script."""
    app()


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mmrag {metadata.version('mmrag')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Ask a folder of PDFs and images; every answer cites its pages."""


@app.command(epilog=EXIT_CODES)
def index(
    paths: Annotated[list[Path], typer.Argument(metavar="PATH...", help="Files and folders.")],
    collection: CollectionOption = DEFAULT_COLLECTION,
    embedder: EmbedderOption = None,
    ocr: Annotated[
        bool, typer.Option("--ocr", help="Recognise the text of scans (needs mmrag[ocr]).")
    ] = False,
    prune: Annotated[
        bool, typer.Option("--prune", help="Forget files that are gone from the given folders.")
    ] = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Index PDFs, images and text files; unchanged files cost nothing.

    It may be stopped at any moment: what is finished is kept, and the same command goes on.
    """
    with _errors(debug, "Stopped. What is finished is kept; run the same command to go on."):
        from mmrag.reading import ReadOptions

        # Given only when asked for: a collection keeps the reading options that built it.
        reading = ReadOptions(ocr=True) if ocr else None
        with _library(collection, embedder, reading=reading) as library, _progress() as show:
            report = library.add(list(paths), progress=show, prune=prune)
        if as_json:
            _print_json(vars(report) | {"errors": [display.error_row(e) for e in report.errors]})
        else:
            _out().print(display.report_view(report))
        if report.failed or report.errors:
            raise typer.Exit(NOTHING)


@app.command(epilog=EXIT_CODES)
def search(
    query: Annotated[str | None, typer.Argument(help="What to look for.")] = None,
    image: ImageOption = None,
    top_k: Annotated[int, typer.Option("--top-k", "-k", min=1, help="Pages to show.")] = 8,
    file: FileOption = None,
    pages: PagesOption = None,
    kind: KindOption = None,
    collection: CollectionOption = DEFAULT_COLLECTION,
    embedder: EmbedderOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Find the pages nearest to a text, an image, or both."""
    with _errors(debug):
        _need_query(query, image)
        with _library(collection, embedder) as library:
            retriever = library.as_retriever(
                similarity_top_k=top_k, where=_where(file, pages, kind)
            )
            hits = retriever.search(query, image)
        words = query or ""
        if as_json:
            _print_json({"query": query, "hits": [_hit_row(hit, words) for hit in hits]})
        elif hits:
            _out().print(display.hits_view(hits, words))
        else:
            _out().print("Nothing found.")
        if not hits:
            raise typer.Exit(NOTHING)


@app.command(epilog=EXIT_CODES)
def ask(
    question: Annotated[str | None, typer.Argument(help="A question in any language.")] = None,
    image: ImageOption = None,
    llm: Annotated[
        str | None,
        typer.Option(
            "--llm",
            metavar="MODEL",
            envvar="MMRAG_LLM",
            help="Chat model at an OpenAI-compatible server (key: OPENAI_API_KEY), or the folder "
            "of a checkpoint that is to run here. Without one, the best sentences are quoted.",
        ),
    ] = None,
    base_url: Annotated[
        str | None,
        typer.Option(
            "--base-url",
            metavar="URL",
            envvar=["OPENAI_BASE_URL", "OPENAI_API_BASE"],
            help="Its address, up to /v1. Default: OpenAI's.",
        ),
    ] = None,
    context_window: Annotated[
        int | None,
        typer.Option(min=512, help="Tokens the model takes. Default: the server is asked."),
    ] = None,
    no_images: Annotated[
        bool, typer.Option("--no-images", help="Send text alone, to models that take no images.")
    ] = False,
    top_k: Annotated[int, typer.Option("--top-k", "-k", min=1, help="Pages to consider.")] = 8,
    file: FileOption = None,
    pages: PagesOption = None,
    kind: KindOption = None,
    rerank: Annotated[
        str | None,
        typer.Option(
            "--rerank",
            metavar="MODEL",
            help="Let a multimodal model judge three times as many pages first: a reranker or "
            "chat model by name or folder, or 'llm' for the one of --llm.",
        ),
    ] = None,
    plan: Annotated[
        bool,
        typer.Option(
            "--plan", help="Take the question apart where one search is not enough; needs --llm."
        ),
    ] = False,
    save_pages: Annotated[
        Path | None,
        typer.Option(
            "--save-pages",
            metavar="DIR",
            help="Write the cited pages as images, with the matching lines marked.",
        ),
    ] = None,
    collection: CollectionOption = DEFAULT_COLLECTION,
    embedder: EmbedderOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Answer a question from the indexed pages, citing them as [1], [2]."""
    with _errors(debug):
        _need_query(question, image)
        where = _where(file, pages, kind)
        model = _llm(llm, base_url, context_window)
        with _library(collection, embedder) as library:
            out = _out()
            live = model is not None and out.is_terminal and not as_json
            cited = library.as_query_engine(
                model,
                _rerankers(rerank, model, top_k, images=not no_images),
                similarity_top_k=top_k * (3 if rerank else 1),
                where=where,
                streaming=live,
                images=not no_images,
            )
            engine = _planned(cited) if plan else cited
            response = _answer(engine, question or "", image, out if live else None)
        saved = _save_pages(response, save_pages) if save_pages else {}
        trace = {"plan": (response.metadata or {})["plan"]} if plan else {}
        if as_json:
            _print_json(response.to_dict(question or "") | trace)
        else:
            if not live:
                out.print(Text(display.clean(str(response))))
            out.print(display.sources_view(response, saved))
            if trace:
                out.print(display.plan_view(trace["plan"]))
        if not response.found:
            raise typer.Exit(NOTHING)


@app.command("list", epilog=EXIT_CODES)
def list_files(
    collection: CollectionOption = DEFAULT_COLLECTION,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """List the indexed files."""
    with _errors(debug), _library(collection, None) as library:
        files = library.files()
        settings = library.collection.settings
        if as_json:
            rows = [vars(entry) | {"errors": list(entry.errors)} for entry in files]
            _print_json({"collection": collection, "embedder": settings.embedder, "files": rows})
            return
        total = sum(entry.pages for entry in files)
        title = f"{len(files)} files, {total} pages, embedded by {settings.embedder}"
        _out().print(display.files_view(files, title))


@app.command(epilog=EXIT_CODES)
def remove(
    patterns: Annotated[
        list[str], typer.Argument(metavar="FILE...", help="Paths, file names or globs.")
    ],
    collection: CollectionOption = DEFAULT_COLLECTION,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Forget indexed files; the files themselves are not touched."""
    with _errors(debug), _library(collection, None) as library:
        from mmrag.store.collection import matching_paths

        removed = library.remove(*patterns)
        if as_json:
            _print_json({"removed": removed})
        else:
            for path in removed:
                _out().print(Text(f"removed {display.clean(path)}"))
        unmatched = [each for each in patterns if not matching_paths([each], removed)]
        if unmatched:
            _err().print(Text(f"No indexed file matches {', '.join(unmatched)}."), soft_wrap=True)
        if not removed:
            raise typer.Exit(NOTHING)


@app.command()
def models(as_json: JsonOption = False) -> None:
    """Show the embedders that mmrag knows."""
    from dataclasses import asdict

    from mmrag.embedders.known import KNOWN

    if as_json:
        _print_json({"models": [asdict(model) for model in KNOWN]})
    else:
        out = _out()
        out.print(display.models_view(KNOWN, out))


@contextmanager
def _errors(debug: bool, stopped: str = "Stopped.") -> Iterator[None]:
    """One line and an exit code for what goes wrong on purpose; warnings on stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    logger = logging.getLogger("mmrag")
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield
    except KeyboardInterrupt:
        _err().print(f"\n{stopped}")
        raise typer.Exit(STOPPED) from None
    except MMRagError as error:
        if debug:
            raise
        line = Text.assemble(("Error: ", "bold red"), display.clean(str(error)))
        _err().print(line, soft_wrap=True)
        wrong_use = isinstance(error, (ConfigError, ContentError))
        raise typer.Exit(USAGE if wrong_use else FAILURE) from None
    finally:
        logger.removeHandler(handler)
        logger.propagate = True


@contextmanager
def _library(collection: str, embedder: str | None, **options: Any) -> Iterator[UniversalIndex]:
    import os

    from mmrag.index import UniversalIndex

    key = os.environ.get("QDRANT_API_KEY")
    with UniversalIndex(collection, embedder, api_key=key, **options) as library:
        yield library


def _llm(
    model: str | None, base_url: str | None, window: int | None
) -> OpenAILike | LocalLLM | None:
    if model is None and base_url is None:
        return None
    if model is not None and base_url is None and Path(model).is_dir():
        from mmrag.llms.local import LocalLLM

        return LocalLLM(model, context_window=window)
    import os

    from mmrag.llms.endpoint import open_llm

    key = os.environ.get("OPENAI_API_KEY")
    return open_llm(model, base_url, key, context_window=window)


def _planned(engine: CitedQueryEngine) -> PlanningQueryEngine:
    """What --plan asks for."""
    from mmrag.answering.planning import PlanningQueryEngine

    return PlanningQueryEngine(engine)


def _rerankers(
    name: str | None, llm: OpenAILike | LocalLLM | None, top_k: int, images: bool
) -> list[BaseNodePostprocessor]:
    """What --rerank asks for."""
    if name is None:
        return []
    from mmrag.rerankers.postprocessor import MLLMReranker

    if name != "llm":
        return [MLLMReranker(name, top_n=top_k)]
    if llm is None:
        raise typer.BadParameter("--rerank llm needs --llm or --base-url.")
    from llama_index.llms.openai_like import OpenAILike

    if not isinstance(llm, OpenAILike):
        return [MLLMReranker(llm.model_name, top_n=top_k)]
    server: dict[str, Any] = {"base_url": llm.api_base, "api_key": llm.api_key}
    return [MLLMReranker(llm.model, top_k, images=images, **server)]


def _need_query(query: str | None, image: Path | None) -> None:
    if not (query and query.strip()) and image is None:
        raise typer.BadParameter("Give a text, --image, or both.")


def _where(files: list[str] | None, pages: str | None, kinds: list[str] | None) -> Where | None:
    from mmrag.queries import Where

    bounds = None
    if pages is not None:
        found = re.fullmatch(r"(\d*)(\s*-\s*)?(\d*)", pages.strip())
        if not found or not (found[1] or found[3]):
            raise typer.BadParameter(f"{pages!r} is no page range: use 5, 3-9, 3- or -9.")
        first, dash, last = found.groups()
        bounds = (int(first) if first else None, int(last) if last else None)
        bounds = bounds if dash else (bounds[0], bounds[0])
        if first and last and int(first) > int(last):
            raise typer.BadParameter(f"{pages!r} ends before it begins: write {last}-{first}.")
    for kind in kinds or ():
        if kind not in KINDS:
            raise typer.BadParameter(f"{kind!r} is no kind: use {', '.join(KINDS)}.")
    if not (files or bounds or kinds):
        return None
    return Where(files=tuple(files or ()), pages=bounds, kinds=tuple(kinds or ()))


def _answer(
    engine: CitedQueryEngine | PlanningQueryEngine,
    question: str,
    image: Path | None,
    live: Console | None,
) -> CitedResponse:
    """The checked answer; shown word by word on ``live`` where that is given."""
    from mmrag.answering.response import CitedResponse, CitedStreamingResponse
    from mmrag.queries import MultimodalQuery

    reply = engine.query(MultimodalQuery(question, image=image))
    if isinstance(reply, CitedResponse):
        return reply
    assert isinstance(reply, CitedStreamingResponse)
    for token in reply.response_gen:
        if live is not None:
            live.file.write(display.clean(token))
            live.file.flush()
    if live is not None:
        live.print()
    return reply.get_response()


def _save_pages(response: CitedResponse, folder: Path) -> dict[int, str]:
    """Pictures of the cited pages, by source number; a page that has gone is said, not fatal."""
    import shutil

    from mmrag.errors import ReadError
    from mmrag.reading import save_marked_page

    saved: dict[int, str] = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        _err().print(Text(f"Pages cannot be saved: {error}"), soft_wrap=True)
        return saved
    for source in response.cited:
        path = Path(source.file)
        page = "" if source.page is None else f"-p{source.page}"
        out = folder / f"{source.n:02d}-{path.stem}{page}"
        try:
            if path.suffix.lower() == ".pdf" and source.page is not None:
                boxes = source.boxes or ((source.box,) if source.box else ())
                out = save_marked_page(path, source.page, boxes, Path(f"{out}.png"))
            elif source.image is not None:
                out = Path(f"{out}{source.image.suffix}")
                shutil.copyfile(source.image, out)
            else:
                continue
            saved[source.n] = str(out)
        except (ReadError, OSError) as error:
            _err().print(
                Text(f"[{source.n}] cannot be saved: {display.clean(str(error))}"), soft_wrap=True
            )
    return saved


def _hit_row(hit: NodeWithScore, query: str) -> dict[str, Any]:
    values = hit.node.metadata
    return {
        "file": values.get("file"),
        "page": values.get("page"),
        "kind": values.get("kind"),
        "score": round(hit.score or 0.0, 4),
        "snippet": display.snippet(display.node_words(hit), query),
        "box": values.get("box"),
    }


@contextmanager
def _progress() -> Iterator[Callable[[Progress], None]]:
    """A bar on a terminal; else a line every few seconds. Both on stderr."""
    console = _err()
    if not console.is_terminal:
        yield _ProgressLines(console)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn
    from rich.progress import Progress as Bar

    columns = (
        SpinnerColumn(),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("files \u00b7 {task.description}", markup=False),
    )
    with Bar(*columns, console=console, transient=True, expand=True) as bar:
        task = bar.add_task("reading", total=None)

        def show(now: Progress) -> None:
            bar.update(
                task, total=now.files_total, completed=now.files_done, description=_speed(now)
            )

        yield show


class _ProgressLines:
    """Writes where a run is, at most every five seconds."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._last = time.monotonic()

    def __call__(self, now: Progress) -> None:
        """Say how far the run is, if it is time."""
        if time.monotonic() - self._last >= 5:
            self._last = time.monotonic()
            done = f"{now.files_done}/{now.files_total} files, {_speed(now)}"
            self._console.print(Text(done), soft_wrap=True)


def _speed(now: Progress) -> str:
    failed = f", {now.failures} failed" if now.failures else ""
    name = display.clean(Path(now.file).name)
    return f"{now.pages} pages ({now.pages_per_second:.1f}/s){failed}: {name}"


def _out() -> Console:
    return Console(highlight=False)


def _err() -> Console:
    return Console(stderr=True, highlight=False)


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, ensure_ascii=False, indent=2) + "\n")
