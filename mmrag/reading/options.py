"""Options and plain records of reading; light, for the worker process imports them too."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from mmrag.errors import ConfigError

Box: TypeAlias = tuple[float, float, float, float]
"""(x0, y0, x1, y1) in points of the page as it is shown, from its top left corner."""

TextLayer: TypeAlias = Literal["pdf", "ocr", "none"]
OcrMode: TypeAlias = Literal["auto", "off", "force"]


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """How files are read.

    dpi: resolution of page images, in pixels per inch.
    max_page_pixels: bound on width times height of a page image; larger pages are scaled down.
    page_seconds: time that one step of a page (text, figures, image) may take; recognition
        of its text and conversion of an Office document get five times as much.
    figures: find figures on PDF pages.
    passage_words: longest passage, in words; pages and texts longer than this are cut.
    passage_overlap: words that neighbouring passages share, at most.
    ocr: ``auto`` recognises the text of pages and images without a usable text layer, where
        the ``ocr`` extra is installed; ``off`` recognises nothing; ``force`` recognises all
        pages, in place of their text layers. True and False mean auto and off.
    clips: embed the pages of videos as clips, a frame a second, and not by their first frames;
        for embedders that take clips.
    max_file_bytes: larger files are refused.
    max_pages: pages of a PDF, frames of a TIFF or stretches of a video that are read; more are
        reported.
    max_memory_bytes: memory that a worker process may take; what needs more is reported. Has
        an effect on Linux only.

    Examples:
        >>> ReadOptions(dpi=96, ocr="off").dpi
        96
    """

    dpi: int = 144
    # A4 at 144 dpi has 2 million; a large plan could have a hundred.
    max_page_pixels: int = 4_000_000
    page_seconds: float = 60.0
    figures: bool = True
    # About 240 tokens: models of sentences, mmrag-nano among them, are at home below 256.
    passage_words: int = 180
    # A sentence or two, so that none is cut off from both of its neighbours.
    passage_overlap: int = 30
    ocr: OcrMode | bool = "auto"
    clips: bool = False
    max_file_bytes: int = 1024 * 1024 * 1024
    max_pages: int = 20_000
    # A crafted PDF can ask for any amount: the worker dies of it, and not the machine.
    max_memory_bytes: int = 2 * 1024 * 1024 * 1024

    def __post_init__(self) -> None:
        if isinstance(self.ocr, bool):  # as collections built by 0.1 have it
            object.__setattr__(self, "ocr", "auto" if self.ocr else "off")
        if self.ocr not in get_args(OcrMode):
            raise ConfigError(f"ReadOptions.ocr={self.ocr!r}; use auto, off or force.")
        for name in _POSITIVE:
            if getattr(self, name) <= 0:
                raise ConfigError(f"ReadOptions.{name} must be above 0.")
        if not 0 <= self.passage_overlap < self.passage_words:
            raise ConfigError(
                f"ReadOptions.passage_overlap={self.passage_overlap} must be from 0 to under "
                f"passage_words={self.passage_words}."
            )


_POSITIVE = (
    *("dpi", "max_page_pixels", "page_seconds", "passage_words", "max_file_bytes", "max_pages"),
    "max_memory_bytes",
)

# Times page_seconds. The first page that is recognised loads the models; a document is converted
# as a whole.
LONG_PATIENCE = 5.0


@dataclass(frozen=True, slots=True)
class Passage:
    """A piece of a page's text, or of a file without pages.

    box: around all of its words. section: None for the page's own.
    page_name: what people call its place where it has no page, such as ``sheet Budget``.
    image: path of an image that stands in a file without pages, with ``text`` for its caption.
    """

    text: str
    box: Box | None
    section: str | None = None
    page_name: str | None = None
    image: str | None = None


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure on a page. image: path of its image; mark: equal for the same art elsewhere.

    box: None where the page has no image of its own.
    """

    box: Box | None
    caption: str
    image: str
    mark: str
    section: str | None = None


@dataclass(frozen=True, slots=True)
class PageRecord:
    """What was read from one page of a PDF, one slide, one frame of an image file or of a video.

    text_layer: where the text comes from; None for a file that is text.
    label: the page number printed on it, as the PDF has it; None for a frame.
    page_name: what people call it where that is not its page number, such as ``slide 3``.
    image: path of its image; None if it cannot be rendered.
    needs_ocr: whether it may hold text that only recognition can read, and was not recognised.
    warnings: what the PDF engine complained about.
    start: when a stretch of a video begins, in seconds.
    clip: paths of its frames, which whoever embeds them removes, and when each is shown, in seconds
        from ``start``.
    """

    page: int
    image: str | None
    text: str
    text_layer: TextLayer | None
    label: str | None = None
    section: str | None = None
    passages: tuple[Passage, ...] = ()
    figures: tuple[Figure, ...] = ()
    needs_ocr: bool = False
    warnings: tuple[str, ...] = ()
    page_name: str | None = None
    start: float | None = None
    clip: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Problem:
    """What went wrong with a page, or with the whole file where ``page`` is None.

    retry: whether the environment failed and not the file; see ``ReadError``.
    """

    page: int | None
    message: str
    retry: bool = False


StepName: TypeAlias = Literal["open", "convert", "text", "figures", "image", "recognition", "clip"]


@dataclass(frozen=True, slots=True)
class Step:
    """Sent before each step, so that a worker that dies is known to have died in it."""

    page: int | None
    name: StepName

    @property
    def patience(self) -> float:
        """How many times ``page_seconds`` the step may take."""
        return LONG_PATIENCE if self.name in ("convert", "recognition") else 1.0


Skipped: TypeAlias = frozenset[tuple[int, StepName]]
"""Steps of pages that a worker died in and that are not tried again."""


@dataclass(frozen=True, slots=True)
class Done:
    """The last answer of a worker to a request.

    error: why it was not carried out, if not. retry: whether the environment failed and not the
        file; see ``ReadError``.
    """

    error: str | None = None
    retry: bool = False


class Refused(Exception):
    """A request to a worker that cannot be carried out; the message says what to do."""


DEADLINE = -signal.SIGALRM if hasattr(signal, "SIGALRM") else 1
"""Exit code of a worker that its watchdog ended: the signal's, or that of ``faulthandler``."""
