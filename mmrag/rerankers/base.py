"""What a reranker's model does: it judges pairs of query and document, each on its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias, TypeVar, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from mmrag.content import Content
from mmrag.errors import ContentError, EndpointError, MMRagError, ModelError

Pair: TypeAlias = tuple[Content | None, Content | None]
"""A query and a document; None stands for one that is not there."""
Outcome: TypeAlias = float | MMRagError
"""Probability in [0, 1] that the document serves the query, or why it could not be judged."""

T = TypeVar("T")


class DeadlineError(EndpointError):
    """A pair that was not judged when the time set for all of them was over."""


@runtime_checkable
class Scorer(Protocol):
    """Judges pairs of query and document. Knows nothing of LlamaIndex.

    name: what it was loaded from: a hub id, a folder, or a server's model name.

    Examples:
        >>> class ByLength:
        ...     name = "by-length"
        ...     def judge(self, pairs, instruction=None):
        ...         return [1 / (1 + len(document.text)) for _, document in pairs]
        >>> isinstance(ByLength(), Scorer)
        True
    """

    name: str

    def judge(self, pairs: Sequence[Pair], instruction: str | None = None) -> list[Outcome]:
        """One outcome for each pair, in order; a pair that fails does not stop the others.

        ``instruction`` says what the query is looking for: free text or the name of a task in
        ``mmrag.instructions``. A query's own instruction overrides it.
        """
        ...


def isolate(
    score: Callable[[Sequence[T]], NDArray[np.floating[Any]]], pairs: Sequence[T]
) -> list[Outcome]:
    """Outcomes by a function that fails as a whole: halved until the pairs at fault are alone."""
    if not pairs:
        return []
    try:
        return [float(value) for value in score(pairs)]
    except (ContentError, ModelError) as error:
        if len(pairs) == 1:  # its place among these pairs says nothing to the caller
            return [type(error)(str(error).removeprefix("pair 0: "))]
    middle = len(pairs) // 2
    return isolate(score, pairs[:middle]) + isolate(score, pairs[middle:])


def refuse_clips(pair: Pair) -> None:
    """Raise ContentError for a pair with a clip, which no reranker takes."""
    if any(side is not None and side.clip is not None for side in pair):
        raise ContentError("Rerankers take no clips: give some of the frames as images.")


def text_pair(pair: Pair) -> tuple[str, str]:
    """Query and document for a model that reads text alone; images beside a text are left out.

    Raises:
        ContentError: If either has no text.
    """
    query, document = pair
    if query is None or not (query.text or "").strip():
        raise ContentError("The query has no text, and this reranker reads nothing else.")
    if document is None or not (document.text or "").strip():
        raise ContentError(
            "There is no text to judge, and this reranker reads nothing else: let one that sees "
            "images judge after it."
        )
    return query.text or "", document.text or ""


def judge_readable(
    judge: Callable[[Sequence[T]], Sequence[Outcome]],
    read: Callable[[Pair], T],
    pairs: Sequence[Pair],
) -> list[Outcome]:
    """Outcomes of what ``read`` makes of each pair, or the ContentError that it raises."""
    outcomes: dict[int, Outcome] = {}
    readable: dict[int, T] = {}
    for place, pair in enumerate(pairs):
        try:
            readable[place] = read(pair)
        except ContentError as error:
            outcomes[place] = error
    if readable:
        judged = judge(list(readable.values()))
        outcomes |= zip(readable, judged, strict=True)
    return [outcomes[place] for place in range(len(pairs))]


def sigmoid(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """The logistic function, by tanh, which does not overflow."""
    return np.asarray((np.tanh(logits / 2) + 1) / 2, dtype=np.float32)
