"""Fusion: several rankings of nodes become one ranking of pages."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from mmrag.store.engine import Scored

BM25 = "bm25"


DEFAULT_WEIGHTS: Mapping[str, float] = {"image": 1.0, "text": 1.0, "fused": 1.0, BM25: 3.0}
"""Weight of each ranking. The views come from one model and err together; BM25 errs elsewhere,
so it weighs as much as the three of them. Measured in ``docs/benchmarks.md``."""


RRF_K = 5
"""How slowly the credit of a rank falls off. The paper's 60 suits lists of a thousand: the first
ten places then count almost alike. For the handful of pages that an answer takes, the first
places have to tell."""


Rankings: TypeAlias = Mapping[str, Sequence[Scored]]


@dataclass(frozen=True)
class Fused:
    """One page (or node) after fusion.

    score: in (0, 1]; 1 means first in every ranking.
    ranks: its place in each ranking that has it, from 1.
    scores: the raw score of its best node in each ranking: cosine, or BM25.
    best: the node of it that the rankings together place highest.
    shown: the node that stands for it: ``best``, or its page if that is a passage of a page
        that was found too; the page has the passage's text, and the image.
    """

    key: Hashable
    score: float
    best: Scored
    shown: Scored
    ranks: dict[str, int] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)


def page_key(hit: Scored) -> Hashable:
    """The page a node is on; a node of a file without pages stands for itself."""
    page = hit.payload.get("page")
    return (hit.payload.get("sha256"), page) if page is not None else hit.id


def fuse(
    rankings: Rankings,
    weights: Mapping[str, float] = DEFAULT_WEIGHTS,
    *,
    key: Callable[[Scored], Hashable] = page_key,
    k: int = RRF_K,
) -> list[Fused]:
    """Weighted reciprocal-rank fusion, best first; equal scores in the order of their keys.

    Nodes with the same ``key`` are one entry, at the place of the best of them in each ranking.
    """
    ranks: dict[Hashable, dict[str, int]] = {}
    scores: dict[Hashable, dict[str, float]] = {}
    credit: dict[Hashable, dict[str, float]] = {}
    nodes: dict[str, Scored] = {}
    for name, hits in rankings.items():
        place = 0
        for position, hit in enumerate(hits, start=1):
            entry = key(hit)
            if name not in ranks.setdefault(entry, {}):
                place += 1
                ranks[entry][name] = place
                scores.setdefault(entry, {})[name] = hit.score
            nodes.setdefault(hit.id, hit)
            votes = credit.setdefault(entry, {})
            votes[hit.id] = votes.get(hit.id, 0.0) + weights[name] / (k + position)
    best_possible = sum(weights[name] for name in rankings) / (k + 1)
    fused: list[Fused] = []
    for entry, places in ranks.items():
        order = sorted(credit[entry], key=lambda id_: (-credit[entry][id_], id_))
        found = [nodes[id_] for id_ in order]
        score = sum(weights[name] / (k + rank) for name, rank in places.items())
        fused.append(
            Fused(
                key=entry,
                score=score / best_possible,
                best=found[0],
                shown=_shown(found),
                ranks=places,
                scores=scores[entry],
            )
        )
    return sorted(fused, key=lambda entry: (-entry.score, str(entry.key)))


def _shown(found: Sequence[Scored]) -> Scored:
    """The best of a page's nodes; for a passage the page itself, if that was found."""
    if found[0].payload.get("kind") != "passage":
        return found[0]
    return next((hit for hit in found if hit.payload.get("kind") == "page"), found[0])
