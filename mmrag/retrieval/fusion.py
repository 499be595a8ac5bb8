"""Fusion: several rankings of nodes become one ranking of pages."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeAlias, get_args

from mmrag.errors import ConfigError
from mmrag.store.engine import MUVERA, TOKENS, Scored

BM25 = "bm25"
REFERENCE = "reference"
"""The ranking of the nodes that a question names: see ``mmrag.retrieval.references``."""

DEFAULT_WEIGHTS: Mapping[str, float] = {
    "image": 1.0,
    "text": 1.0,
    "fused": 1.0,
    MUVERA: 1.0,
    BM25: 3.0,
    REFERENCE: 4.0,
    TOKENS: 5.0,
}
"""Weight of each ranking for an embedder of which nothing is known. The views come from one model
and err together; BM25 errs elsewhere; measured in ``docs/benchmarks.md``. The table of known
checkpoints has others for large models. A page that the question names outright counts as much as
one that is first in words and text. Tokens, where they are kept, count as much as image, text and
words together, for they are compared one by one; no measurement stands behind that number."""

ZEROS: Mapping[str, float] = {BM25: 0.0, REFERENCE: 0.0}
"""The score that says nothing, of each ranking that has one: no word in common."""

PAGE_FIELDS = ("sha256", "page", "kind", "file", "box", "node_id")
"""The fields of a payload that rankings carry: all that is asked of nodes that are not shown."""

FuseBy: TypeAlias = Literal["scores", "ranks"]

_FAINT = 0.01  # of its weight has a ranking that says nothing, for there may be no other

RRF_K = 5
"""How slowly the credit of a rank falls off. The paper's 60 suits lists of a thousand: the first
ten places then count almost alike. For the handful of pages that an answer takes, the first
places have to tell."""

_SCALE_OVER = 100  # hits that the scores of a ranking are scaled over

Rankings: TypeAlias = Mapping[str, Sequence[Scored]]


@dataclass(slots=True)
class Fused:
    """One page (or node) after fusion.

    score: in [0, 1]; 1 means first in every ranking.
    ranks: its rank in each ranking that has it, from 1.
    scores: the raw score of its best node in each ranking: cosine, BM25 or MaxSim.
    credits: what each ranking contributed to ``score``; they add up to it.
    nodes: every node of it that was found, best first: the page, its passages, its figures.

    Examples:
        >>> (page,) = fuse({"text": [Scored("a", 0.9, {})]})
        >>> page.score, page.ranks
        (1.0, {'text': 1})
    """

    key: Hashable
    score: float = 0.0
    nodes: list[Scored] = field(default_factory=list)
    ranks: dict[str, int] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)
    credits: dict[str, float] = field(default_factory=dict)

    @property
    def best(self) -> Scored:
        """The node that the rankings together place highest."""
        return self.nodes[0]

    @property
    def shown(self) -> Scored:
        """The node that stands for it: ``best``, or its page if that is a passage.

        The page, where it was found too, has the passage's text, and the image. A description
        stands for it only where nothing else of the page was found.
        """
        # What stands on the page before what a model wrote of it.
        own = [hit for hit in self.nodes if hit.payload.get("kind") != "description"]
        first = own[0] if own else self.best
        if first is self.best and first.payload.get("kind") != "passage":
            return first
        return next((hit for hit in own if hit.payload.get("kind") == "page"), first)

    @property
    def description(self) -> Scored | None:
        """The best node of it that a model wrote of what is on the page."""
        return next((hit for hit in self.nodes if hit.payload.get("kind") == "description"), None)


def page_key(hit: Scored) -> Hashable:
    """The page of a file a node is on; other nodes, and those inserted, stand for themselves."""
    payload = hit.payload
    page, sha256 = payload.get("page"), payload.get("sha256")
    return hit.id if page is None or sha256 is None else (sha256, page)


def fuse(
    rankings: Rankings,
    weights: Mapping[str, float] = DEFAULT_WEIGHTS,
    *,
    by: FuseBy = "scores",
    zeros: Mapping[str, float] = ZEROS,
    key: Callable[[Scored], Hashable] = page_key,
    k: int = RRF_K,
    limit: int | None = None,
) -> list[Fused]:
    """Weighted sum of the rankings, best first; equal scores in the order of their keys.

    Nodes with the same ``key`` are one entry, with the credit of the best of them in each
    ranking; a node has one key in all of them.

    Args:
        by: ``"scores"`` adds scores that are scaled to [0, 1] (see ``scaled``); ``"ranks"`` is
            reciprocal rank fusion (Cormack, Clarke and Buettcher, SIGIR 2009).
        zeros: the score of each ranking that counts as nothing; see ``scaled``. A ranking whose
            best is no more breaks ties of the others, as texts do where a picture is asked for.
        k: of reciprocal rank fusion.
        limit: how many entries are wanted, at least 1; None: all.

    Raises:
        ConfigError: For another ``by``.

    Examples:
        >>> hits = [Scored("a", 0.9, {}), Scored("b", 0.5, {}), Scored("c", 0.1, {})]
        >>> [(each.key, round(each.score, 3)) for each in fuse({"text": hits})]
        [('a', 1.0), ('b', 0.5), ('c', 0.0)]
    """
    if by not in get_args(FuseBy):
        raise ConfigError(f"by={by!r}: use one of {', '.join(get_args(FuseBy))}.")
    shares = _shares(rankings, weights, zeros if by == "scores" else {})
    parts = {}
    for name, hits in rankings.items():
        values = scaled(hits, zeros.get(name, math.inf)) if by == "scores" else _reciprocal(hits, k)
        parts[name] = _part(hits, [key(hit) for hit in hits], values, shares[name], by)
    scores: dict[Hashable, float] = {}
    for part in parts.values():
        for page, credit in part.credits.items():
            scores[page] = scores.get(page, 0.0) + credit
    # Most of the time goes into entries, and most callers want few of them.
    entries = _entries(parts, {page: scores[page] for page in _highest(scores, limit)})
    # By key, so that a query gives the same order in every run.
    return sorted(entries, key=lambda entry: (-entry.score, str(entry.key)))[:limit]


class _Part(NamedTuple):
    """A ranking, best first: the page and the worth of each hit, and the credit of each page."""

    hits: Sequence[Scored]
    pages: Sequence[Hashable]
    worths: Sequence[float]
    credits: Mapping[Hashable, float]


def _part(
    hits: Sequence[Scored],
    pages: Sequence[Hashable],
    values: Sequence[float],
    share: float,
    by: FuseBy,
) -> _Part:
    worths = [share * value for value in values]
    distinct = dict.fromkeys(pages)
    if by == "ranks":
        # A page counts by its place among pages, not among nodes.
        return _Part(hits, pages, worths, dict(zip(distinct, worths, strict=False)))
    # Hits come best first, and a page has the credit of its first: the last one set from behind.
    firsts = dict(zip(reversed(pages), reversed(worths), strict=True))
    return _Part(hits, pages, worths, {page: firsts[page] for page in distinct})


def _entries(parts: Mapping[str, _Part], scores: Mapping[Hashable, float]) -> list[Fused]:
    """The entries of the pages that have a score here."""
    entries = {page: Fused(page, score) for page, score in scores.items()}
    votes: dict[str, float] = {}
    for name, part in parts.items():
        for rank, (page, credit) in enumerate(part.credits.items(), 1):
            if page in entries:
                entries[page].ranks[name], entries[page].credits[name] = rank, credit
        for hit, page, worth in zip(part.hits, part.pages, part.worths, strict=True):
            if page not in entries:
                continue
            # The first node of a page sets its score, others only vote which is shown.
            entries[page].scores.setdefault(name, hit.score)
            if hit.id not in votes:
                votes[hit.id] = 0.0
                entries[page].nodes.append(hit)
            votes[hit.id] += worth
    for entry in entries.values():
        entry.nodes.sort(key=lambda hit: (-votes[hit.id], hit.id))
    return list(entries.values())


def _highest(scores: Mapping[Hashable, float], limit: int | None) -> Iterable[Hashable]:
    """The pages with the highest scores: ``limit``, and those that are as good as the last."""
    if limit is None or limit >= len(scores):
        return scores
    least = heapq.nlargest(limit, scores.values())[-1]
    return [page for page, score in scores.items() if score >= least]


def _shares(
    rankings: Rankings, weights: Mapping[str, float], zeros: Mapping[str, float]
) -> dict[str, float]:
    """The share of each ranking in the sum of them."""
    counted = {}
    for name, hits in rankings.items():
        says_nothing = bool(hits) and hits[0].score <= zeros.get(name, -math.inf)
        counted[name] = weights[name] * (_FAINT if says_nothing else 1.0)
    total = sum(counted.values())
    return {name: weight / total if total else 0.0 for name, weight in counted.items()}


def scaled(hits: Sequence[Scored], zero: float = math.inf) -> list[float]:
    """The scores of a ranking, scaled so that the best is 1, and ``zero`` or the 100th hit is 0.

    The lower of the two, so that the first hundred keep their order. A zero that does not depend
    on the hits keeps small differences small where all pages are alike (Bruch, Gai and Ingber,
    arXiv 2210.11934, section 4). Where none is known, the hundredth hit takes its place, or the
    last: each model spreads its cosines otherwise.
    """
    if not hits:
        return []
    high = hits[0].score
    low = min(zero, hits[:_SCALE_OVER][-1].score)
    # One hit, or all alike: nothing tells them apart.
    if high <= low:
        return [1.0] * len(hits)
    return [max(0.0, (hit.score - low) / (high - low)) for hit in hits]


def _reciprocal(hits: Sequence[Scored], k: int) -> list[float]:
    """Credit of each rank, scaled so that the first is 1."""
    return [(k + 1) / (k + rank) for rank in range(1, len(hits) + 1)]
