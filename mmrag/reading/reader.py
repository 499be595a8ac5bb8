"""Files to LlamaIndex nodes, page by page."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmrag.errors import ReadError
from mmrag.reading import client, ocr
from mmrag.reading.files import OnError, file_kind, file_sha256, raise_it, remove_partial
from mmrag.reading.options import RECOGNITION_PATIENCE, Box, PageRecord, Problem, ReadOptions, Step

if TYPE_CHECKING:
    from llama_index.core.schema import BaseNode

    from mmrag.reading.nodes import Source

_MAX_DEATHS = 3


@dataclass(frozen=True, slots=True)
class ReadPage:
    """The nodes of one page, or of a whole text file, where ``page`` is None.

    warnings: what the PDF engine complained about on this page.
    """

    page: int | None
    nodes: list[BaseNode] = field(default_factory=list)
    warnings: tuple[str, ...] = ()


def read_file(
    path: str | Path,
    images_dir: str | Path,
    options: ReadOptions | None = None,
    on_error: OnError = raise_it,
    sha256: str | None = None,
) -> Iterator[ReadPage]:
    """Read a file page by page; images go to ``images_dir/<first 16 of sha256>/``.

    on_error: gets what cannot be read; reading goes on after it unless it raises, as the
    default does. A file gives pages, errors, or both, never nothing.
    sha256: the file's hash, where it is known already.

    Raises: ReadError by default; ConfigError if ``ocr`` is asked for and not installed.
    """
    path, options = Path(path), options or ReadOptions()
    if options.ocr:
        ocr.require()
    try:
        kind = file_kind(path, options)
        sha256 = sha256 or file_sha256(path)
    except ReadError as error:
        on_error(error)
        return
    except OSError as error:
        message = f"the file cannot be read ({error})"
        on_error(ReadError(message, file=path.as_posix(), retry=True))
        return
    from mmrag.reading.nodes import Source

    source = Source(path, sha256, Path(images_dir) / sha256[:16])
    remove_partial(source.folder)

    def report(problem: Problem) -> None:
        name = path.as_posix()
        on_error(ReadError(problem.message, file=name, page=problem.page, retry=problem.retry))

    yield from _READERS[kind](source, options, report)


Report = Callable[[Problem], None]


def _read_pdf(source: Source, options: ReadOptions, report: Report) -> Iterator[ReadPage]:
    from mmrag.reading.nodes import page_nodes

    before: PageRecord | None = None
    held: PageRecord | None = None
    for record in _records(source, options, report):
        # A page is held back until the next is known, to tell logos from figures.
        if held is not None:
            yield _page(source, held, before, record, page_nodes)
        before, held = held, record
    if held is not None:
        yield _page(source, held, before, None, page_nodes)


def _page(
    source: Source,
    record: PageRecord,
    before: PageRecord | None,
    after: PageRecord | None,
    page_nodes: Callable[[Source, PageRecord, frozenset[str]], list[BaseNode]],
) -> ReadPage:
    repeated = frozenset(
        figure.mark for page in (before, after) if page is not None for figure in page.figures
    )
    for figure in record.figures:
        if figure.mark in repeated:
            Path(figure.image).unlink(missing_ok=True)
    return ReadPage(record.page, page_nodes(source, record, repeated), record.warnings)


def _records(source: Source, options: ReadOptions, report: Report) -> Iterator[PageRecord]:
    """Pages from worker processes; one that dies costs the step it died in."""
    first, deaths, plain, retry = 1, 0, frozenset[int](), False
    while deaths < _MAX_DEATHS:
        step = Step(None, "open")
        arguments = (source.path, source.folder, options, first, plain)
        try:
            for answer in client.ask(options.page_seconds, "read", *arguments):
                match answer:
                    case Step():
                        step = answer
                    case Problem():
                        report(answer)
                    case PageRecord():
                        deaths, retry = 0, False
                        yield answer
            return
        except client.RequestFailed as error:
            report(Problem(step.page, str(error), error.retry))
            return
        except client.WorkerDied as error:
            deaths, retry = deaths + 1, retry or error.retry
            report(Problem(step.page, _obituary(step, error, options), error.retry))
            if step.page is None:
                return
            if step.name == "figures":
                first, plain = step.page, plain | {step.page}
            else:
                first = step.page + 1
    report(Problem(None, f"given up after {_MAX_DEATHS} pages in a row that cannot be read", retry))


_STEPS = {
    "open": ("opening the file", "it is damaged or too complex: save it anew"),
    "text": ("reading the page's text", "the page is left out"),
    "picture": ("rendering the page", "the page is left out"),
    "figures": ("looking for figures", "the page is kept without its figures"),
    "recognition": ("recognising the page's text", "the page is left out"),
}


def _obituary(step: Step, error: client.WorkerDied, options: ReadOptions) -> str:
    doing, outcome = _STEPS[step.name]
    if error.late:
        return f"{doing} took longer than {options.page_seconds * step.patience:g} s; {outcome}"
    if error.killed:
        return f"the worker process was killed while {doing}; {outcome}"
    return f"{doing} crashed the PDF engine; {outcome}"


def _read_image(source: Source, options: ReadOptions, report: Report) -> Iterator[ReadPage]:
    from mmrag.reading.images import read_frames

    seconds = options.page_seconds * RECOGNITION_PATIENCE
    for frame in read_frames(source.path, source.folder, options):
        if isinstance(frame, Problem):
            report(frame)
            continue
        page, image = frame
        text = ""
        if options.ocr:
            try:
                text = next(client.ask(seconds, "recognise", image))
            except (client.RequestFailed, client.WorkerDied) as error:
                message = f"recognising its text failed ({error}); it has none"
                report(Problem(page, message, error.retry))
        node = source.node("picture", text, page=page, image=image.as_posix())
        yield ReadPage(page, [node])


def _read_text(source: Source, options: ReadOptions, report: Report) -> Iterator[ReadPage]:
    from mmrag.reading.text import NotText, read_passages

    try:
        nodes = [
            source.node("text", passage.text, index=index, section=passage.section)
            for index, passage in enumerate(read_passages(source.path, options))
        ]
    except NotText:
        report(Problem(None, "the content is not text; convert it or give it its right suffix"))
        return
    if nodes:
        yield ReadPage(None, nodes)
    else:
        report(Problem(None, "the file holds no text, only white space"))


_READERS = {"pdf": _read_pdf, "picture": _read_image, "text": _read_text}


def count_pages(path: str | Path) -> int:
    """How many pages a PDF has.

    Raises: ReadError if it cannot be opened.
    """
    count: int = _once(path, None, "count", Path(path))
    return count


def locate_quote(path: str | Path, page: int, quote: str) -> list[Box]:
    """Boxes [x0, y0, x1, y1] of a quote on a PDF page, one a line, in points as shown.

    Empty if the quote is not there. A page without a text layer is read by OCR, if the ``ocr``
    extra is installed.

    Raises: ReadError if the page cannot be read.
    """
    boxes: list[Box] = _once(path, page, "locate", Path(path), page, quote, ocr.available())
    return boxes


def save_marked_page(path: str | Path, page: int, boxes: Sequence[Box], out: str | Path) -> Path:
    """Write a PNG of a PDF page with boxes (in points as shown) marked, and return its path.

    Raises: ReadError if the page cannot be read.
    """
    result: Path = _once(path, page, "mark", Path(path), page, list(boxes), Path(out))
    return result


def _once(path: str | Path, page: int | None, operation: str, *arguments: object) -> Any:
    """The one answer of an operation on a page, or on the file where ``page`` is None."""
    try:
        seconds = ReadOptions().page_seconds * RECOGNITION_PATIENCE
        (answer,) = client.ask(seconds, operation, *arguments)
    except (client.RequestFailed, client.WorkerDied) as error:
        name = Path(path).as_posix()
        what = "file" if page is None else "page"
        message = f"the {what} cannot be read ({error})"
        raise ReadError(message, file=name, page=page, retry=error.retry) from error
    return answer
