"""Files to LlamaIndex nodes, page by page."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmrag.content import Clip
from mmrag.errors import ReadError
from mmrag.reading import client, marking, ocr
from mmrag.reading.files import (
    VIDEO_SUFFIXES,
    FileKind,
    OnError,
    file_kind,
    file_sha256,
    raise_it,
    remove_partial,
    write,
)
from mmrag.reading.options import (
    LONG_PATIENCE,
    Box,
    PageRecord,
    Passage,
    Problem,
    ReadOptions,
    Skipped,
    Step,
    StepName,
)
from mmrag.reading.pagewords import PageWords, load_words

if TYPE_CHECKING:
    from llama_index.core.schema import BaseNode

    from mmrag.reading.nodes import Source

log = logging.getLogger(__name__)

# Stretches of a video that one page may have: a minute, so that the time cited is near.
_LONGEST_STAY = 3
# In a row, without a page between them: such a file is beyond help, and each costs a minute or so.
_MAX_DEATHS = 3


@dataclass(frozen=True, slots=True)
class ReadPage:
    """The nodes of one page, or of a whole text file, where ``page`` is None.

    needs_ocr: whether it may hold text that only recognition can read, and was not recognised.
    warnings: what the PDF engine complained about on this page.
    clip: of a page of a video, with ``ReadOptions(clips=True)``. Its frames are files that
        whoever embeds them removes.

    Examples:
        >>> ReadPage(page=3).nodes
        []
    """

    page: int | None
    nodes: list[BaseNode] = field(default_factory=list)
    needs_ocr: bool = False
    warnings: tuple[str, ...] = ()
    clip: Clip | None = None


def read_file(
    path: str | Path,
    images_dir: str | Path,
    options: ReadOptions | None = None,
    on_error: OnError = raise_it,
    sha256: str | None = None,
    name: str | None = None,
) -> Iterator[ReadPage]:
    """Read a file page by page; images go to ``images_dir/<first 16 of sha256>/``.

    on_error: gets what cannot be read; reading goes on after it unless it raises, as the
    default does. A file gives pages, errors, or both, never nothing.
    sha256: the file's hash, where it is known already.
    name: what the file is called in nodes and errors; default: its path.

    Raises:
        ReadError: By default.
        ConfigError: If ``ocr="force"`` and the extra is not installed.

    Examples:
        >>> for page in read_file("handbook.pdf", "images"):  # doctest: +SKIP
        ...     print(page.page, [node.metadata["kind"] for node in page.nodes])
    """
    path, options = Path(path), options or ReadOptions()
    name = name or path.as_posix()
    if options.ocr == "force":
        # Now, since without it every single page would fail.
        ocr.require()
    if not ocr.available():
        # Here and not in the worker, whose answers then do not depend on what is installed.
        options = replace(options, ocr="off")
    try:
        kind = file_kind(path, options, name)
        sha256 = sha256 or file_sha256(path)
    except ReadError as error:
        on_error(error)
        return
    except OSError as error:
        message = f"the file cannot be read ({error})"
        on_error(ReadError(message, file=name, retry=True))
        return
    from mmrag.reading.nodes import Source

    # By content: a file that moved keeps its images.
    source = Source(path, sha256, Path(images_dir) / sha256[:16], name)
    # What a killed run was writing; nothing else ever looks for it.
    remove_partial(source.folder)

    def report(problem: Problem) -> None:
        on_error(ReadError(problem.message, file=name, page=problem.page, retry=problem.retry))

    yield from _READERS[kind](source, options, report)


Report = Callable[[Problem], None]


def _read_pdf(source: Source, options: ReadOptions, report: Report) -> Iterator[ReadPage]:
    from mmrag.reading.nodes import page_nodes

    before: PageRecord | None = None
    held: PageRecord | None = None
    for record in _records("pdf", source, options, report):
        assert isinstance(record, PageRecord)
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
            # Logos and page frames: no node refers to the image any more.
            Path(figure.image).unlink(missing_ok=True)
    nodes = page_nodes(source, record, repeated)
    return ReadPage(record.page, nodes, record.needs_ocr, record.warnings)


def _records(
    operation: str, source: Source, options: ReadOptions, report: Report
) -> Iterator[PageRecord | Passage]:
    """Pages, or passages of a text, from workers; one that dies costs the step it died in."""
    first, deaths, retry = 1, 0, False
    skipped: Skipped = frozenset()
    while deaths < _MAX_DEATHS:
        step = Step(None, "open")
        arguments = (source.path, source.folder, options, first, skipped)
        try:
            for answer in client.ask(options, operation, *arguments):
                match answer:
                    case Step():
                        step = answer
                    case Problem():
                        report(answer)
                    case PageRecord() | Passage():
                        # Progress: only deaths without a page between them count.
                        deaths, retry = 0, False
                        yield answer
            return
        except client.RequestFailed as error:
            report(Problem(step.page, str(error), error.retry))
            return
        except client.WorkerDied as error:
            deaths, retry = deaths + 1, retry or error.retry
            report(Problem(step.page, _death_message(step, error, options), error.retry))
            # Opening fails the same way each time.
            if step.page is None:
                return
            if step.name in _OPTIONAL:
                # The same page again without the step that killed the worker.
                first, skipped = step.page, skipped | {(step.page, step.name)}
            else:
                first = step.page + 1
    report(Problem(None, f"given up after {_MAX_DEATHS} failures in a row", retry))


# What a worker was doing when it died, and what that costs.
_STEPS: dict[StepName, tuple[str, str]] = {
    "open": ("opening the file", "it is damaged or too complex: save it anew"),
    "convert": ("converting the file", "it is damaged or too complex: save it anew"),
    "text": ("reading the page's text", "the page is left out"),
    "image": ("making the page's image", "the page is kept without it"),
    "figures": ("looking for figures", "the page is kept without its figures"),
    "recognition": ("recognising the page's text", "the page is kept without it"),
    "clip": ("decoding the frames of a clip", "the page is embedded by its first frame"),
}
_OPTIONAL: tuple[StepName, ...] = ("image", "figures", "recognition", "clip")


def _death_message(step: Step, error: client.WorkerDied, options: ReadOptions) -> str:
    doing, outcome = _STEPS[step.name]
    if error.late:
        return f"{doing} took longer than {options.page_seconds * step.patience:g} s; {outcome}"
    if error.killed:
        return f"the worker process was killed while {doing}; {outcome}"
    return f"{doing} crashed the worker process; {outcome}"


def _read_image(source: Source, options: ReadOptions, report: Report) -> Iterator[ReadPage]:
    for record in _records("image", source, options, report):
        assert isinstance(record, PageRecord)
        node = source.node("picture", record.text, page=record.page, image=record.image)
        yield ReadPage(record.page, [node], record.needs_ocr)


def _read_text(source: Source, options: ReadOptions, report: Report) -> Iterator[ReadPage]:
    passages: list[Passage] = []
    try:
        for answer in client.ask(options, "text", source.path, options):
            match answer:
                case Problem():
                    report(answer)
                case Passage():
                    passages.append(answer)
    except (client.RequestFailed, client.WorkerDied) as error:
        report(Problem(None, f"its text cannot be read ({error})", error.retry))
        return
    yield from _text_page(source, passages)


def _text_page(source: Source, passages: Sequence[Passage]) -> Iterator[ReadPage]:
    nodes: list[BaseNode] = []
    counts = Counter[str]()
    for passage in passages:
        kind = "figure" if passage.image else "text"
        caption = passage.text if passage.image else None
        nodes.append(
            source.node(
                kind,
                passage.text,
                index=counts[kind],
                image=passage.image,
                section=passage.section,
                page_name=passage.page_name,
                caption=caption,
            )
        )
        counts[kind] += 1
    if nodes:
        yield ReadPage(None, nodes)


def _read_video(source: Source, options: ReadOptions, report: Report) -> Iterator[ReadPage]:
    """A page for each picture that stays, with what is said while it does."""
    held: PageRecord | None = None
    image: str | None = None
    n_held = 0
    for record in _records("video", source, options, report):
        assert isinstance(record, PageRecord)
        if held is not None and record.image is None and n_held < _LONGEST_STAY:
            held, n_held = _joined(held, record), n_held + 1
            continue
        if held is not None:
            yield _stretch(source, held, options)
        image = record.image or image
        held, n_held = replace(record, image=image), 1
    if held is not None:
        yield _stretch(source, held, options)


def _joined(held: PageRecord, record: PageRecord) -> PageRecord:
    """A stretch with the next one, which shows the same picture."""
    later = (record.start or 0) - (held.start or 0)
    clip = (*held.clip, *((frame, later + seconds) for frame, seconds in record.clip))
    return replace(held, text=f"{held.text}\n\n{record.text}".strip(), clip=clip)


def _stretch(source: Source, record: PageRecord, options: ReadOptions) -> ReadPage:
    from mmrag.reading.nodes import page_nodes
    from mmrag.reading.text import pieces

    cut = pieces(record.text, options.passage_words, options.passage_overlap)
    passages = tuple(Passage(piece, None) for piece in cut)
    record = replace(record, passages=passages if len(passages) > 1 else ())
    nodes = page_nodes(source, record, frozenset())
    clip = Clip(*zip(*record.clip, strict=True)) if record.clip else None
    return ReadPage(record.page, nodes, record.needs_ocr, clip=clip)


def _read_mixed(
    operation: str, source: Source, options: ReadOptions, report: Report
) -> Iterator[ReadPage]:
    """A file of pages or of passages: pages as they come, its passages at the end."""
    from mmrag.reading.nodes import page_nodes

    passages: list[Passage] = []
    for record in _records(operation, source, options, report):
        if isinstance(record, Passage):
            passages.append(record)
            continue
        nodes = page_nodes(source, record, frozenset())
        yield ReadPage(record.page, nodes, record.needs_ocr, record.warnings)
    yield from _text_page(source, passages)


_READERS: dict[FileKind, Callable[[Source, ReadOptions, Report], Iterator[ReadPage]]] = {
    "pdf": _read_pdf,
    "picture": _read_image,
    "text": _read_text,
    "office": partial(_read_mixed, "office"),
    "video": _read_video,
    "plugin": partial(_read_mixed, "plugin"),
}


def count_pages(path: str | Path) -> int:
    """How many pages a PDF, or stretches of ``STRETCH`` seconds a video has.

    Raises:
        ReadError: If it cannot be opened.
    """
    operation = "stretches" if Path(path).suffix.lower() in VIDEO_SUFFIXES else "count"
    count: int = _once(path, None, operation, Path(path))
    return count


def locate_quote(
    path: str | Path,
    page: int,
    quote: str,
    page_image: str | Path | None = None,
    sha256: str | None = None,
) -> list[Box]:
    """Boxes [x0, y0, x1, y1] of a quote on a page, one a line, in points as shown.

    Empty if the quote is not there.

    Args:
        path: the original PDF. It is opened only where ``page_image`` has no words beside it;
            a page whose text layer is of no use is then recognised, if the ``ocr`` extra is
            installed.
        page_image: the image of the page as indexing has made it, beside which the page's words
            are kept.
        sha256: of the content that was indexed: with it, another file at ``path`` is refused.

    Raises:
        ReadError: If the page cannot be read, or the file is another.
    """
    words = _kept_words(path, page_image)
    if words is not None:
        return marking.find_quote(words.tokens, quote)
    check_original(path, sha256)
    boxes: list[Box] = _once(path, page, "locate", Path(path), page, quote, ocr.available())
    return boxes


def save_marked_page(
    path: str | Path,
    page: int,
    boxes: Sequence[Box],
    out: str | Path,
    page_image: str | Path | None = None,
    sha256: str | None = None,
) -> Path:
    """Write a PNG of a page with boxes (in points as shown) marked, and return its path.

    Args:
        path: the original PDF, opened only where ``page_image`` has no words beside it.
        page_image: see ``locate_quote``.
        sha256: see ``locate_quote``.

    Raises:
        ReadError: If the page cannot be read, or the file is another.
    """
    words = _kept_words(path, page_image)
    if words is not None and page_image is not None:
        try:
            write(Path(out), marking.mark_boxes(Path(page_image).read_bytes(), boxes, words.scale))
        except (OSError, ValueError) as error:
            name = Path(path).as_posix()
            message = f"its page image {page_image} cannot be marked ({error})"
            raise ReadError(message, file=name, page=page) from error
        return Path(out)
    check_original(path, sha256)
    result: Path = _once(path, page, "mark", Path(path), page, list(boxes), Path(out))
    return result


def check_original(path: str | Path, sha256: str | None) -> None:
    """Refuse a file that is not the one that was indexed; a collection may name any.

    sha256: of the content that was indexed; None refuses nothing.

    Raises:
        ReadError: If the file has gone, or has another content.
    """
    if sha256 is None:
        return
    if not Path(path).is_file():
        raise ReadError("the file has gone", file=Path(path).as_posix())
    if file_sha256(path) != sha256:
        raise ReadError(
            "the file at this path is not the one that was indexed, and is not opened; if it has "
            "changed, index it again",
            file=Path(path).as_posix(),
        )


def _kept_words(path: str | Path, page_image: str | Path | None) -> PageWords | None:
    """The words that indexing kept of a page; None, with a message, if it kept none."""
    if page_image is None:
        return None
    words = load_words(Path(page_image))
    if words is None:
        log.warning(
            "No words are kept beside %s, which an earlier version indexed; %s is opened instead. "
            "Index it again to do without it.",
            page_image,
            path,
        )
    return words


def _once(path: str | Path, page: int | None, operation: str, *arguments: object) -> Any:
    """The one answer of an operation on a page, or on the file where ``page`` is None."""
    # One step may be recognition, whose patience the worker only grants to steps that name it.
    options = ReadOptions(page_seconds=ReadOptions().page_seconds * LONG_PATIENCE)
    try:
        (answer,) = client.ask(options, operation, *arguments)
    except (client.RequestFailed, client.WorkerDied) as error:
        name = Path(path).as_posix()
        what = "file" if page is None else "page"
        message = f"the {what} cannot be read ({error})"
        raise ReadError(message, file=name, page=page, retry=error.retry) from error
    return answer
