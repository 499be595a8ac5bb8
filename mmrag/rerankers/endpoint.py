"""A server's ``/rerank`` endpoint as a reranker, in the form of Jina and Cohere. No torch.

Jina (``https://api.jina.ai/v1/rerank``), Cohere (``https://api.cohere.com/v2/rerank``), vLLM,
llama.cpp, ``mmrag serve`` and others. All take a query with its documents, and answer with an index
and a score for each.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from mmrag.content import Content, load_image
from mmrag.errors import ConfigError, ContentError, EndpointError
from mmrag.jsonapi import JsonServer, RefusedError, excerpt
from mmrag.prompting import data_url
from mmrag.rerankers.base import (
    DeadlineError,
    Outcome,
    Pair,
    judge_readable,
    refuse_clips,
    text_pair,
)
from mmrag.retries import Deadline

_MAX_PIXELS, _MAX_BYTES = 1024 * 1024, 2 * 1024 * 1024  # of an image
_REFUSED_CONTENT = frozenset((400, 413, 422))  # statuses that may be about one document
# What any reranker takes: it tells whether a refusal is about a document or about the request.
_PLAIN = ("What makes power?", ["Turbines make power."])


class RerankEndpoint:
    """A Scorer that asks a ``/rerank`` endpoint. Safe to call from several threads.

    Documents of one query go in one request, for some models compare them with each other. One
    that is refused is found by halving the request, and fails alone. Instructions are not sent,
    as the form has none.

    Args:
        model: the name the server knows it by.
        url: the endpoint's whole address; it ends in ``/rerank``.
        api_key: sent as a bearer token; never part of a message or a repr.
        logits: the server sends logits, as llama.cpp does, and their sigmoid is the score. Without
            it a score outside [0, 1] is an error.
        images: send the image of a page in place of its text, as a data URL, to models that take
            one (``jina-reranker-m0``). Without it a page that has no text keeps its place.
        timeout: seconds for one request; retries: how often it is repeated after a busy, broken
            or absent answer.
        deadline: seconds for one call of ``judge``; pairs that are not judged by then fail.

    Raises:
        ConfigError: For options that make no sense.

    >>> scorer = RerankEndpoint("rerank-v4.0-fast", "https://api.cohere.com/v2/rerank")
    >>> scorer.judge([(Content("wind"), Content("Turbines make power."))])  # doctest: +SKIP
    [0.97]
    """

    def __init__(
        self,
        model: str,
        url: str,
        *,
        api_key: str | None = None,
        logits: bool = False,
        images: bool = False,
        timeout: float = 60.0,
        retries: int = 3,
        deadline: float | None = None,
    ) -> None:
        if deadline is not None and deadline <= 0:
            raise ConfigError("deadline must be above 0, or None.")
        self.name = model
        self.logits = logits
        self.images = images
        self.deadline = deadline
        self.server = JsonServer(
            url,
            model,
            api_key=api_key,
            hint="check base_url, which ends in /rerank, and the model's name",
            timeout=timeout,
            retries=retries,
        )

    def __repr__(self) -> str:
        return f"RerankEndpoint({self.name!r}, {self.server.shown!r})"

    def judge(self, pairs: Sequence[Pair], instruction: str | None = None) -> list[Outcome]:
        """One outcome for each pair, in order; see ``Scorer.judge``."""
        ends = Deadline(self.deadline)

        def judge(read: Sequence[tuple[Any, Any]]) -> list[Outcome]:
            queries: dict[str, list[int]] = {}
            for place, (query, _document) in enumerate(read):
                # As JSON, since a query with an image is a dict, which cannot be a key.
                queries.setdefault(json.dumps(query), []).append(place)
            outcomes: dict[int, Outcome] = {}
            for query, places in queries.items():
                documents = [read[place][1] for place in places]
                found = self._outcomes(json.loads(query), documents, ends)
                outcomes |= zip(places, found, strict=True)
            return [outcomes[place] for place in range(len(read))]

        return judge_readable(judge, self._read, pairs)

    def _read(self, pair: Pair) -> tuple[Any, Any]:
        """Query and document as they are sent: texts, or images where these are taken."""
        query, document = pair
        refuse_clips(pair)
        if not self.images or query is None or document is None:
            return text_pair(pair)
        return _as_sent(query), _as_sent(document)

    def _outcomes(self, query: Any, documents: list[Any], ends: Deadline) -> list[Outcome]:
        """Outcomes of one query's documents."""
        try:
            return [*self._scores(query, documents, ends)]
        except RefusedError as error:
            # A wrong key or model is refused for every document alike.
            if error.status not in _REFUSED_CONTENT or len(documents) == 1:
                return [error] * len(documents)
            refusal = error
        except EndpointError as error:
            late = ends.left() <= 0
            failure = DeadlineError(f"{error} The deadline passed.") if late else error
            return [failure] * len(documents)
        try:
            self._scores(*_PLAIN, ends)
        except EndpointError:
            return [refusal] * len(documents)
        return self._halves(query, documents, ends)

    def _halves(self, query: Any, documents: list[Any], ends: Deadline) -> list[Outcome]:
        """Outcomes where the server refuses at least one of the documents."""
        # Halving finds one bad document among n with about 2 log n requests.
        middle = len(documents) // 2
        outcomes: list[Outcome] = []
        for half in (documents[:middle], documents[middle:]):
            try:
                outcomes += self._scores(query, half, ends)
            except RefusedError as error:
                split = len(half) > 1
                outcomes += self._halves(query, half, ends) if split else [error]
            except EndpointError as error:
                outcomes += [error] * len(half)
        return outcomes

    def _scores(self, query: Any, documents: list[Any], ends: Deadline) -> list[float]:
        """Scores of documents, in their order. Raises EndpointError."""
        body = {
            "model": self.name,
            "query": query,
            "documents": documents,
            # Without it, Jina and Cohere may send only the best few.
            "top_n": len(documents),
        }
        answer = self.server.post(body, ends)
        try:
            rows = json.loads(answer)["results"]
            scores = {int(row["index"]): float(row["relevance_score"]) for row in rows}
        except (ValueError, TypeError, KeyError) as error:
            raise self.server.error(
                f"answers nonsense, not in the form of Jina or Cohere: {excerpt(answer)}"
            ) from error
        # A document left out, or scored twice, would shift the blame to another.
        if len(rows) != len(documents) or set(scores) != set(range(len(documents))):
            raise self.server.error(
                f"answers with {len(rows)} scores where {len(documents)} were asked for"
            )
        return [self._probability(scores[index]) for index in range(len(documents))]

    def _probability(self, score: float) -> float:
        if not math.isfinite(score):
            raise self.server.error("answers with a score that is not finite")
        if self.logits:
            return (1 + math.tanh(score / 2)) / 2  # the sigmoid, without overflow
        if not -1e-6 <= score <= 1 + 1e-6:  # rounding of half precision
            raise self.server.error(
                f"answers with the score {score:g}, which is not within 0 to 1: if these are "
                "logits, pass logits=True"
            )
        return min(max(score, 0.0), 1.0)


def _as_sent(content: Content) -> Any:
    """A text, or an image in the form of Jina."""
    if content.images:
        image = load_image(content.images[0])
        return {"image": data_url(image, _MAX_PIXELS, _MAX_BYTES)}
    if not (content.text or "").strip():
        raise ContentError("There is neither a text nor an image to judge.")
    return content.text
