"""``mmrag serve``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from mmrag.cli.console import errors, say
from mmrag.cli.llm import BaseURLOption, LLMOption, NoImagesOption, WindowOption, chat_model
from mmrag.cli.options import DEFAULT_COLLECTION, DebugOption, EmbedderOption
from mmrag.cli.progress import working
from mmrag.cli.reranking import RerankOption, rerankers
from mmrag.errors import ConfigError
from mmrag.server import require

MIB = 1024 * 1024


def serve(
    collection: Annotated[
        list[str] | None,
        typer.Option(
            "--collection",
            "-c",
            metavar="[NAME=]FOLDER_OR_URL",
            envvar="MMRAG_COLLECTION",
            help="A collection to serve; may be repeated. Made, empty, if it is not there. "
            f"Default: {DEFAULT_COLLECTION}.",
        ),
    ] = None,
    # Nobody else on the network reaches it unless asked for.
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8321,
    api_keys: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="File with one API key a line. Or set MMRAG_API_KEYS, with commas between keys.",
        ),
    ] = None,
    without_keys: Annotated[
        bool, typer.Option("--without-keys", help="Let others on the network ask without a key.")
    ] = False,
    llm: LLMOption = None,
    base_url: BaseURLOption = None,
    context_window: WindowOption = None,
    no_images: NoImagesOption = False,
    rerank: RerankOption = None,
    embedder: EmbedderOption = None,
    watch: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FOLDER",
            help="Index a folder into the first collection, and its changes as they come (needs "
            "the extra watch); may be repeated.",
        ),
    ] = None,
    max_upload_mib: Annotated[int, typer.Option(min=1, help="Largest file taken.")] = 200,
    max_upload_pages: Annotated[int, typer.Option(min=1, help="Longest PDF taken.")] = 2000,
    slots: Annotated[int, typer.Option(min=1, help="Requests answered at once.")] = 4,
    waiting: Annotated[
        int, typer.Option(min=0, help="Requests that may wait; more get status 429.")
    ] = 64,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A further name the server is reached by."),
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(metavar="ORIGIN", help="A web page, by its origin, that may call the API."),
    ] = None,
    public_url: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Start of links in answers. Default: as requested."),
    ] = None,
    debug: DebugOption = False,
) -> None:
    """Serve collections over HTTP: a web page, a JSON API, and the OpenAI API."""
    with errors(debug), working(log=True) as step:
        step("Starting the server")
        require("serve")
        # After require: a missing extra is named, in place of an ImportError.
        from mmrag.server.library import Answering, open_libraries
        from mmrag.server.metrics import Metrics
        from mmrag.server.options import ServerOptions
        from mmrag.server.run import serve as run

        options = ServerOptions(
            host=host,
            port=port,
            api_keys=_keys(api_keys),
            without_keys=without_keys,
            allowed_hosts=tuple(allow_host or ()),
            cors_origins=tuple(cors_origin or ()),
            public_url=public_url,
            slots=slots,
            waiting=waiting,
            max_upload_bytes=max_upload_mib * MIB,
            max_upload_pages=max_upload_pages,
        )
        if watch:
            from mmrag.ingest.watch import require as require_folders

            # Before the models are loaded, which takes long.
            require_folders(watch)
        model = chat_model(llm, base_url, context_window)
        # As many as the page shows at once.
        judges = rerankers(rerank, model, top_k=8, images=not no_images)
        step("Loading the embedder")
        metrics = Metrics()
        libraries = open_libraries(
            collection or [DEFAULT_COLLECTION],
            embedder=embedder,
            answering=Answering(model, judges, images=not no_images),
            batch_ms=options.batch_ms,
            api_key=os.environ.get("QDRANT_API_KEY"),
            observe_batch=metrics.batches.observe,
        )

        if watch:
            libraries.get().watch(watch)

        def ready(address: str) -> None:
            step.stop()
            say(f"Serving on {options.public_url or address} (Ctrl-C stops)")

        run(libraries, options, metrics, ready)


def _keys(file: Path | None) -> tuple[str, ...]:
    """API keys of a file, or of the environment."""
    if file is None:
        # No option takes a key itself: command lines can be read by every user of the machine.
        lines = os.environ.get("MMRAG_API_KEYS", "").split(",")
    else:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise ConfigError(f"{file} cannot be read ({error.strerror}).") from error
    return tuple(line.strip() for line in lines if line.strip())
