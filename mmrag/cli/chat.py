"""``mmrag chat``."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import typer
from rich.live import Live
from rich.markdown import Markdown
from rich.text import Text

from mmrag.cli import display
from mmrag.cli.ask import save_page
from mmrag.cli.console import errors, out, say, show
from mmrag.cli.inline import image_codes, protocol
from mmrag.cli.llm import BaseURLOption, LLMOption, NoImagesOption, WindowOption, chat_model
from mmrag.cli.options import (
    DEFAULT_COLLECTION,
    CollectionOption,
    DebugOption,
    EmbedderOption,
    open_library,
)
from mmrag.cli.progress import working
from mmrag.cli.serving import server_of
from mmrag.cli.streaming import LinkedMarkdown, Tail
from mmrag.errors import EndpointError, MMRagError, ReadError

if TYPE_CHECKING:
    from mmrag.answering.context import Source
    from mmrag.answering.response import CitedResponse, CitedStreamingResponse
    from mmrag.index import UniversalIndex
    from mmrag.queries import MultimodalQuery

    Ask: TypeAlias = Callable[
        [MultimodalQuery, Sequence[tuple[str, str]]], tuple[str, CitedStreamingResponse]
    ]

HELP = """\
Ask in plain words; a question may build on those before it.

- `/sources` shows the pages of the last answer again
- `/open 1` shows page [1] with its evidence marked
- `/new` begins a new conversation
- `/quit`, or Ctrl-D, ends
"""
_COLUMNS = 72  # of an image in the terminal


def chat(
    context: typer.Context,
    collection: CollectionOption = DEFAULT_COLLECTION,
    llm: LLMOption = None,
    base_url: BaseURLOption = None,
    context_window: WindowOption = None,
    no_images: NoImagesOption = False,
    embedder: EmbedderOption = None,
    debug: DebugOption = False,
) -> None:
    """Talk with the indexed documents; every answer cites its pages."""
    with errors(debug), contextlib.ExitStack() as stack:
        with working() as step:
            step(f"Opening {collection}")
            ask: Ask
            options = ("llm", "base_url", "context_window", "no_images", "embedder")
            server = server_of(collection, context, *options)
            if server is not None:
                ask = server.ask
                say(f"Asking the server at {server.address.url}.")
            else:
                model = chat_model(llm, base_url, context_window)
                library = stack.enter_context(open_library(collection, embedder))
                step("Loading the embedder")
                ask = _local(library, model, images=not no_images)
        show(Text("Ask a question; /help tells more.", style="dim"))
        Conversation(ask).run()


def _local(library: UniversalIndex, model: object, *, images: bool) -> Ask:
    """Answers of a collection that is open here."""
    from mmrag.server.library import ask_engine

    library.warm_up()  # now, and not with the first question
    engine = library.as_query_engine(model, streaming=True, images=images)  # type: ignore[arg-type]
    return lambda query, history: ask_engine(engine, query, history)


@dataclass
class Conversation:
    """Questions and answers until the user leaves."""

    ask: Ask
    history: list[tuple[str, str]] = field(default_factory=list)
    last: CitedResponse | None = None

    def run(self) -> None:
        """Read lines until the end of the input, or /quit."""
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - input() then edits lines and recalls earlier ones
        while True:
            try:
                line = input("\n> ").strip()
            except EOFError:
                return
            if line in ("/quit", "/exit", "/q"):
                return
            try:
                self.take(line)
            except MMRagError as error:  # one question that fails does not end the rest
                say(f"Error: {error}")

    def take(self, line: str) -> None:
        """Deal with one line."""
        command, _, rest = line.partition(" ")
        if not line:
            return
        if command == "/help":
            show(Markdown(HELP))
        elif command == "/new":
            self.history.clear()
            self.last = None
            show(Text("A new conversation.", style="dim"))
        elif command == "/sources":
            self._sources()
        elif command == "/open":
            self._open(rest.strip(" []"))
        elif command.startswith("/"):
            say(f"There is no command {command}; /help lists them.")
        else:
            self._answer(line)

    def _answer(self, question: str) -> None:
        from mmrag.queries import MultimodalQuery

        with working() as step:
            step("Searching")
            searched, stream = self.ask(MultimodalQuery(question), self.history)
            step("Reading the pages")
            tokens = stream.response_gen
            # Within the spinner: until the first word, nothing else shows that something happens.
            first = next(tokens, "")
        if searched != question:
            show(Text(f"Searched for: {display.clean(searched)}", style="dim"))
        text = _show_stream(stream, first)
        self.last = response = stream.get_response()
        self.history += [("user", question), ("assistant", response.response or text)]
        show(display.sources_view(response, {}))

    def _sources(self) -> None:
        if self.last is None:
            say("Ask something first.")
        else:
            show(display.sources_view(self.last, {}))

    def _open(self, number: str) -> None:
        sources = {str(source.n): source for source in self.last.sources} if self.last else {}
        if number not in sources:
            say(f"Which page? /open with one of {', '.join(sources) or 'an answer to come'}.")
            return
        source = sources[number]
        try:
            path = _page_file(source)
        except (ReadError, OSError) as error:
            raise EndpointError(f"{source.place} cannot be shown: {error}") from error
        show_page(path, os.environ)


def _show_stream(stream: CitedStreamingResponse, first: str) -> str:
    """The answer as Markdown while it comes; its marks are links to the files."""
    from mmrag.server.markdown import Linker

    console = out()
    if not console.is_terminal:
        text = first + "".join(stream.response_gen)
        show(Text(display.clean(text)))
        return text
    links = {source.n: _file_url(source) for source in stream.sources}
    linker, files = Linker(links), set(links.values())
    text = linker.add(display.clean(first))
    begun = Tail(LinkedMarkdown(text, files))
    with Live(begun, console=console, vertical_overflow="visible") as live:
        for token in stream.response_gen:
            text += linker.add(display.clean(token))
            live.update(Tail(LinkedMarkdown(text, files)))
        text += linker.end()
        live.update(LinkedMarkdown(text, files))
    return text


def _has_windows(environ: Mapping[str, str]) -> bool:
    """Whether a viewer can open a window; over SSH its launcher would only print errors."""
    return sys.platform != "linux" or "DISPLAY" in environ or "WAYLAND_DISPLAY" in environ


def _file_url(source: Source) -> str:
    """A link that a PDF viewer opens at the page."""
    page = "" if source.page is None else f"#page={source.page}"
    # A bracket would end a Markdown link.
    return Path(source.file).absolute().as_uri().replace("(", "%28").replace(")", "%29") + page


def _page_file(source: Source) -> Path:
    """An image of a source's page with its evidence marked, or the file itself."""
    from mmrag.reading import check_original

    # Not removed at the end: the system's viewer still shows it.
    folder = Path(tempfile.mkdtemp(prefix="mmrag-page-"))
    stem = Path(source.file).stem
    name = stem if source.page is None else f"{stem}-{source.page}"
    path = save_page(source, folder / name)
    if path is not None:
        return path
    check_original(source.path, str(source.node.node.metadata.get("sha256", "")))
    return source.path


def show_page(path: Path, environ: Mapping[str, str]) -> None:
    """An image in the terminal where it can, else in the system's viewer; its link in any case."""
    from mmrag.content import load_image

    console, how = out(), protocol(environ)
    is_image = path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tiff")
    if how is not None and is_image and console.is_terminal:
        console.file.write(image_codes(load_image(path), how, min(_COLUMNS, console.width)))
    elif console.is_terminal and _has_windows(environ):
        # Only on a terminal: in a pipe nobody would see the window.
        typer.launch(str(path))
    show(Text(str(path), style=f"link {path.absolute().as_uri()}"))
