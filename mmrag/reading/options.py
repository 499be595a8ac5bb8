"""Options and plain records of reading; light, for the worker process imports them too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from mmrag.errors import ConfigError

Box: TypeAlias = tuple[float, float, float, float]
"""(x0, y0, x1, y1) in points of the page as it is shown, from its top left corner."""

TextLayer: TypeAlias = Literal["pdf", "ocr", "none"]


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """How files are read.

    dpi: resolution of page images, in pixels per inch.
    max_page_pixels: bound on width times height of a page image; larger pages are scaled down.
    page_seconds: time that one step of a page (text, figures, image) may take; recognition
        of its text gets five times as much.
    figures: find figures on PDF pages.
    passage_words: longest passage, in words; pages and texts longer than this are cut.
    passage_overlap: words that neighbouring passages share, at most.
    ocr: recognise the text of pages and images that have none; needs the ``ocr`` extra.
    max_file_bytes: larger files are refused.
    """

    dpi: int = 144
    max_page_pixels: int = 4_000_000
    page_seconds: float = 60.0
    figures: bool = True
    passage_words: int = 180
    passage_overlap: int = 30
    ocr: bool = False
    max_file_bytes: int = 1024 * 1024 * 1024

    def __post_init__(self) -> None:
        numbers = ("dpi", "max_page_pixels", "page_seconds", "passage_words", "max_file_bytes")
        for name in numbers:
            if getattr(self, name) <= 0:
                raise ConfigError(f"ReadOptions.{name} must be above 0.")
        if not 0 <= self.passage_overlap < self.passage_words:
            raise ConfigError(
                f"ReadOptions.passage_overlap={self.passage_overlap} must be from 0 to under "
                f"passage_words={self.passage_words}."
            )


RECOGNITION_PATIENCE = 5.0


@dataclass(frozen=True, slots=True)
class Passage:
    """A piece of a page's text. box: around all of its words; section: None for the page's own."""

    text: str
    box: Box | None
    section: str | None = None


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure on a page. image: path of its image; mark: equal for the same art elsewhere."""

    box: Box
    caption: str
    image: str
    mark: str
    section: str | None = None


@dataclass(frozen=True, slots=True)
class PageRecord:
    """What was read from one PDF page; ``image`` is the path of its image."""

    page: int
    label: str
    section: str | None
    image: str
    text: str
    text_layer: TextLayer
    passages: tuple[Passage, ...] = ()
    figures: tuple[Figure, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Problem:
    """What went wrong with a page, or with the whole file where ``page`` is None.

    retry: whether the environment failed and not the file; see ``ReadError``.
    """

    page: int | None
    message: str
    retry: bool = False


@dataclass(frozen=True, slots=True)
class Step:
    """Sent before each step, so that a worker that dies is known to have died in it."""

    page: int | None
    name: Literal["open", "text", "figures", "picture", "recognition"]

    @property
    def patience(self) -> float:
        """How many times ``page_seconds`` the step may take."""
        return RECOGNITION_PATIENCE if self.name == "recognition" else 1.0


@dataclass(frozen=True, slots=True)
class Done:
    """The last answer of a worker to a request.

    error: why it was not carried out, if not. retry: whether the environment failed and not the
        file; see ``ReadError``.
    """

    error: str | None = None
    retry: bool = False


DEADLINE = 1
"""Exit code of a worker that its watchdog ended (``faulthandler`` fixes it)."""
