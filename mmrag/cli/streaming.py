"""An answer as Markdown in the terminal, while it comes."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from markdown_it import MarkdownIt
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.markdown import Markdown
from rich.segment import Segment


class LinkedMarkdown(Markdown):
    """Markdown that may link to these files; rich shows no other ``file:`` URL as a link.

    Examples:
        >>> shown = LinkedMarkdown("It rained [[1]](file:///a.pdf).", {"file:///a.pdf"})
        >>> any(child.type == "link_open" for child in shown.parsed[1].children or [])
        True
    """

    def __init__(self, text: str, files: Collection[str]) -> None:
        super().__init__(text)
        self.parsed = _Parser(files).enable(["strikethrough", "table"]).parse(text)


class _Parser(MarkdownIt):
    """files: the addresses that links may have beside those of the web."""

    def __init__(self, files: Collection[str]) -> None:
        super().__init__()
        self._files = files

    def validateLink(self, url: str) -> bool:
        # A model may have been told by a document to write a link to some other file.
        return url in self._files or super().validateLink(url)


@dataclass(frozen=True)
class Tail:
    """The last lines of a view, as many as the terminal has.

    What has left the screen cannot be drawn again: each new word would repeat it above.
    """

    view: RenderableType

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The segments of the lines that have room, one line kept for the cursor."""
        lines = console.render_lines(self.view, options.update(height=None), pad=False)
        for line in lines[-(console.height - 1) :]:
            yield from line
            yield Segment.line()
