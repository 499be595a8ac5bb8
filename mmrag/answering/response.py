"""What a cited answer is, whole or as a stream."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Callable, Generator
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import quote

from llama_index.core.base.response.schema import (
    AsyncStreamingResponse,
    Response,
    StreamingResponse,
)

from mmrag.answering.citations import Claim, parse_marks
from mmrag.answering.context import Source
from mmrag.llms.replies import LONGEST_END, REASONING_END, REASONING_TAGS

SENTINEL = "NOT_FOUND_IN_SOURCES"
"""What the model is told to reply when the sources do not answer the question."""
NOT_FOUND = "Not found in these documents."
_HEAD = 100  # characters after which the beginning of an answer is decided
_ACTIVE = re.compile(r"!(?=\[)|<(?=[A-Za-z/!?])")
_SENTINEL = re.compile(SENTINEL.replace("_", r"\\?_"), re.IGNORECASE)  # Markdown escapes it


@dataclass
class CitedResponse(Response):
    """A LlamaIndex Response whose ``[n]`` are ``sources``.

    sources: all that the model was shown; ``cited`` marks those that the answer cites.
    found: False where the documents do not answer the question.
    claims: the sentences of the answer, checked; ``problems`` says what is wrong with them.
    notes: what was cut, left out or missing on the way to the model.
    extractive: passages quoted from the documents, because there is no language model.
    certain: False where these passages may answer the question, and may not.

    Examples:
        >>> from mmrag.answering.citations import Claim
        >>> claim = Claim("Nine metres.", dangling=(2,))
        >>> response = CitedResponse("Nine metres [2].", claims=(claim,))
        >>> response.claims[0].dangling
        (2,)
    """

    sources: list[Source] = field(default_factory=list)
    found: bool = True
    claims: tuple[Claim, ...] = ()
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    extractive: bool = False
    certain: bool = True

    @property
    def notice(self) -> str | None:
        """What to show above an extract, which is no part of the answer; None for others."""
        if not self.extractive:
            return None
        if self.certain:
            return "No language model is configured. Quoted from the documents:"
        return "No language model is configured. These passages may answer the question:"

    @property
    def cited(self) -> list[Source]:
        """The sources that the answer rests on: those it cites, or all if it cites none."""
        if not self.found:
            return []
        return [source for source in self.sources if source.cited] or self.sources

    def to_dict(self, question: str) -> dict[str, Any]:
        """The answer for JSON."""
        return {
            "question": question,
            "found": self.found,
            "answer": self.response,
            "extractive": self.extractive,
            "certain": self.certain,
            "sources": [source.to_dict() for source in self.cited],
        }

    def markdown(self, *, images: bool = False) -> str:
        """The answer with a list of its sources, as Markdown.

        images: show each cited figure or image behind the line, or the table, that cites it
            first.

        Images and HTML that the model itself wrote are escaped.
        """
        shown: set[int] = set()
        parts: list[str] = []
        by_number = {source.n: source for source in self.cited if source.cited}
        waiting: list[str] = []
        lines = harmless(self.response or "").splitlines()
        for line, following in zip(lines, [*lines[1:], ""], strict=True):
            parts.append(line)
            for n in parse_marks(line) if images else ():
                if n in by_number and n not in shown and (figure := _figure(by_number[n])):
                    shown.add(n)
                    waiting += ["", figure, ""]
            if not following.lstrip().startswith("|"):  # nothing may stand between a table's rows
                parts += waiting
                waiting = []
        listed = [_listed(source) for source in self.cited]
        return "\n".join([*parts, "", *listed] if listed else parts).strip() + "\n"


@dataclass
class CitedStreamingResponse(StreamingResponse):
    """A stream of text; ``sources`` are there at once, ``get_response()`` has the checks.

    Examples:
        >>> stream = CitedStreamingResponse(iter(["Nine ", "metres."]), finish=CitedResponse)
        >>> "".join(stream.response_gen)
        'Nine metres.'
    """

    sources: list[Source] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    finish: Callable[[str], CitedResponse] = field(kw_only=True)

    def __post_init__(self) -> None:
        self.response_gen = self._recorded(self.response_gen)

    def __str__(self) -> str:
        """The whole text. Reads the stream to its end first."""
        for _ in self.response_gen:
            pass
        return self.response_txt or ""

    def get_response(self) -> CitedResponse:
        """The whole answer, checked. Reads the stream to its end first."""
        return self.finish(str(self))

    def _recorded(self, tokens: Generator[str, None, None]) -> Generator[str, None, None]:
        text = ""
        for token in tokens:
            text += token
            yield token
        self.response_txt = text


@dataclass
class AsyncCitedStreamingResponse(AsyncStreamingResponse):
    """As CitedStreamingResponse, for ``aquery``.

    Examples:
        >>> async def words():
        ...     yield "Nine metres."
        >>> stream = AsyncCitedStreamingResponse(words(), finish=CitedResponse)
        >>> stream.sources
        []
    """

    sources: list[Source] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    finish: Callable[[str], CitedResponse] = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.response_gen = self._recorded(self.response_gen)

    async def get_response(self) -> CitedResponse:
        """The whole answer, checked. Reads the stream to its end first."""
        async for _ in self.response_gen:
            pass
        return await asyncio.to_thread(self.finish, self.response_txt or "")

    async def _recorded(self, tokens: AsyncGenerator[str, None]) -> AsyncGenerator[str, None]:
        text = ""
        async for token in tokens:
            text += token
            yield token
        self.response_txt = text


def says_not_found(text: str) -> bool:
    """Whether a model's answer is the sentinel, or says no more than it or what stands for it."""
    bare = text.replace("\\", "").strip().strip("*_`\"'[]. \n")
    # Models go on after it to explain what is missing; the answer is still none.
    if bare.upper().startswith(SENTINEL):
        return True
    # With a citation it is a partial answer: "NOT_FOUND for 2019; in 2020 it was 5 [1]".
    return NOT_FOUND in in_words(text) and not parse_marks(text)


def in_words(text: str) -> str:
    """A text with the sentinel replaced by a sentence for people."""
    return _SENTINEL.sub(NOT_FOUND, text)


def inert(text: str) -> str:
    """A model's text with its images and HTML taken apart, so that showing it loads nothing."""
    # A document can tell a model to write an image whose address carries the conversation away.
    return _ACTIVE.sub(r"\g<0> ", text)


def shown(tokens: Generator[str, None, None]) -> Generator[str, None, None]:
    """The stream without reasoning in front, the sentinel put in words."""
    filtered = _Shown()
    for token in tokens:
        if piece := filtered.add(token):
            yield piece
    if rest := filtered.end():
        yield rest


async def ashown(tokens: AsyncGenerator[str, None]) -> AsyncGenerator[str, None]:
    """As ``shown``."""
    filtered = _Shown()
    async for token in tokens:
        if piece := filtered.add(token):
            yield piece
    if rest := filtered.end():
        yield rest


class _Shown:
    """Holds back of a stream what may turn out to be reasoning, the sentinel or an image.

    What is held is never longer than a few marks, so that a long stream costs no more per token.
    """

    def __init__(self) -> None:
        self._held = ""
        self._state: Literal["start", "reasoning", "answer"] = "start"

    def add(self, token: str) -> str:
        """What may be shown after a further token."""
        self._held += token
        if self._state == "reasoning":
            end = 0
            for found in REASONING_END.finditer(self._held):
                end = found.end()
            if not end:
                self._held = self._held[-LONGEST_END:]
                return ""
            self._held, self._state = self._held[end:], "start"
        if self._state == "start":
            self._held = self._held.lstrip()
            if self._held[:_HEAD].lower().startswith(REASONING_TAGS):
                self._state = "reasoning"
                return self.add("")
            if len(self._held) < _HEAD and _undecided(self._held):
                return ""
            self._state = "answer"
        whole = inert(in_words(self._held))
        # The next token may complete the sentinel, or turn ! and < into an image or a tag.
        kept = max(_sentinel_begun(whole), whole.endswith(("!", "<")))
        self._held = whole[len(whole) - kept :]
        return whole[: len(whole) - kept]

    def end(self) -> str:
        """What is left to show."""
        rest = "" if self._state == "reasoning" else self._held
        if self._state == "start" and says_not_found(rest):
            return NOT_FOUND
        return inert(in_words(rest))


def _undecided(head: str) -> bool:
    """Whether the first characters of an answer may begin reasoning or the sentinel."""
    reasons = any(tag.startswith(head.lower()) for tag in REASONING_TAGS)
    # Models put the sentinel in quotes or in bold, and escape its underscores for Markdown.
    bare = head.strip().lstrip("*_`\"'[").upper().replace("\\", "")
    return reasons or SENTINEL.startswith(bare[: len(SENTINEL)])


def as_stream(response: CitedResponse) -> CitedStreamingResponse:
    """An answer that is known already, as a stream of one piece."""

    def once() -> Generator[str, None, None]:
        yield str(response)

    return CitedStreamingResponse(
        response_gen=once(),
        source_nodes=response.source_nodes,
        metadata=response.metadata,
        sources=response.sources,
        notes=response.notes,
        finish=lambda _: response,
    )


def as_async_stream(response: CitedResponse) -> AsyncCitedStreamingResponse:
    """As ``as_stream``."""

    async def once() -> AsyncGenerator[str, None]:
        yield str(response)

    return AsyncCitedStreamingResponse(
        response_gen=once(),
        source_nodes=response.source_nodes,
        metadata=response.metadata,
        sources=response.sources,
        notes=response.notes,
        finish=lambda _: response,
    )


def _sentinel_begun(text: str) -> int:
    """Length of the end of a text that may go on to be the sentinel."""
    tail = text[-len(SENTINEL) - 4 :].upper()  # its underscores may be escaped, and count twice
    for i in range(len(tail)):
        bare = tail[i:].replace("\\", "")
        if bare and SENTINEL.startswith(bare):
            return len(tail) - i
    return 0


# Entities: a backslash of ours could be undone by one of the model's in front of it.
_ESCAPED = {"![": "&#33;[", "<": "&lt;"}
_MARKUP = re.compile(r"([\\`*_\[\]<>!#|])")


def harmless(text: str) -> str:
    """Markdown in which images and HTML are text, whatever ``inert`` left: all of it is escaped."""
    for active, escaped in _ESCAPED.items():
        text = text.replace(active, escaped)
    return text


def _figure(source: Source) -> str | None:
    """The image of a source that is a figure or an image; None where its file is gone."""
    values = source.node.node.metadata
    # "picture" is how collections store an image file; pages are too large to show inside an
    # answer.
    if values.get("kind") not in ("figure", "picture"):
        return None
    if source.image is None or not source.image.is_file():
        return None
    caption = " ".join(str(values.get("caption") or source.place).split())
    return f"![{literal(caption)}]({quote(source.image.as_posix(), safe='/:')})"


def _listed(source: Source) -> str:
    words = f": \u201c{literal(source.quote)}\u201d" if source.quote else ""
    return f"- \\[{source.n}\\] {literal(source.place)}{words}"


def literal(text: str) -> str:
    """Plain text for Markdown, its marks escaped."""
    return _MARKUP.sub(r"\\\1", text)
