"""Answers without a language model: the passages of the found pages that answer best.

A passage is judged by the question's words that it has, weighted by how rare they are, and by
its cosine to the question where an embedder is given. Nothing is written that the documents do
not say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mmrag.answering.citations import CheckedAnswer, Claim, locate
from mmrag.answering.context import Source
from mmrag.answering.passages import Passage, passages, running_lines
from mmrag.content import Content
from mmrag.embedders.base import Embedder
from mmrag.lexical import Idf, sentences, terms, words
from mmrag.prompting import sanitize

FOUND = 0.4
"""Least ``evidence`` that the pages may answer the question. docs/answering.md has the error
rates at both limits, and the command that measures them."""
SURE = 0.55
"""``evidence`` from which on the passages are taken for the answer."""
_NEAR = 0.75  # share of the best passage's score that a further passage must reach
_TO_EMBED = 64  # passages that are compared by meaning, those with most words first
_PLACE_WORTH = 0.02  # lost with each place of the page in the ranking; decides between equals


@dataclass(frozen=True)
class Extract:
    """Quoted passages.

    answer: with claims and marked sources. certain: False where they may not answer the question.
    """

    answer: CheckedAnswer
    certain: bool


@dataclass(frozen=True)
class _Candidate:
    source: Source
    passage: Passage


def extract(
    question: Content,
    sources: Sequence[Source],
    embedder: Embedder | None = None,
    max_passages: int = 3,
    least_evidence: float = FOUND,
    sure_evidence: float = SURE,
) -> Extract | None:
    """The best passages, each with its ``[n]``; None below ``least_evidence``.

    A question without content words (an image alone, say) is answered by what the embedder
    finds nearest, and never with certainty. One of marks alone (``?``) asks nothing.
    """
    wanted = terms(question.text or "")
    asks = bool(question.images or words(question.text or ""))
    if not wanted and (embedder is None or not asks):
        return None
    found = evidence(wanted, sources) if wanted else 0.0
    # Before any embedding: most questions that the pages cannot answer stop here.
    if wanted and found < least_evidence:
        return None
    # A running head repeats the title on each page and would match every question about it.
    running = running_lines([source.text for source in sources])
    candidates = [
        _Candidate(source, passage)
        for source in sources
        for passage in passages(source.text, running)
    ]
    if not candidates:
        return None
    scores = _scores(question, wanted, candidates, embedder)
    chosen = _choose(candidates, scores, max_passages)
    return Extract(_answer(chosen, sources), bool(wanted) and found >= sure_evidence)


def evidence(wanted: Sequence[str], sources: Sequence[Source]) -> float:
    """How far the pages have the words ``wanted`` of a question, in [0, 1].

    The share of their weight that a page's text and the name of its file have, of the page
    ranked first and of the best page, averaged: one of several pages on a subject has the words
    by chance, the first seldom. A word weighs more the fewer sentences of all pages have it.
    """
    read = [source for source in sources if source.text.strip()]
    if not read:
        return 0.0
    idf = Idf([terms(sentence) for source in read for sentence in sentences(source.text)])
    shared = [idf.coverage(wanted, terms(f"{Path(each.file).stem} {each.text}")) for each in read]
    return (shared[0] + max(shared)) / 2


def _scores(
    question: Content,
    wanted: list[str],
    candidates: Sequence[_Candidate],
    embedder: Embedder | None,
) -> NDArray[np.float32]:
    """Mean of word coverage and cosine, less a little for each place in the ranking."""
    idf = Idf([candidate.passage.words for candidate in candidates])
    # All rows of a table have the words of its head: their own decide between them.
    shared = [
        (idf.coverage(wanted, c.passage.words) + idf.coverage(wanted, terms(c.passage.quote))) / 2
        for c in candidates
    ]
    covered = np.asarray(shared, dtype=np.float32)
    places = np.asarray([c.source.n - 1 for c in candidates], dtype=np.float32)
    if embedder is None:
        return covered - _PLACE_WORTH * places
    likely = np.argsort(-(covered - _PLACE_WORTH * places), kind="stable")[:_TO_EMBED]
    vectors = embedder.encode([candidates[i].passage.text for i in likely])
    task = "passage_for_question" if question.modality == "text" else "passage_for_image"
    asked = embedder.encode([question], instruction=task)[0]
    alike = np.zeros_like(covered)
    # Opposed vectors are no worse than unrelated ones: both have nothing to do with the question.
    alike[likely] = np.clip(vectors @ asked, 0, 1)
    both = (covered + alike) / 2 if wanted else alike
    return np.asarray(both - _PLACE_WORTH * places, dtype=np.float32)


def _choose(
    candidates: Sequence[_Candidate], scores: NDArray[np.float32], limit: int
) -> list[_Candidate]:
    """The best passages, none of which repeats another."""
    order = sorted(range(len(candidates)), key=lambda i: (-float(scores[i]), i))
    best = float(scores[order[0]])
    chosen: list[_Candidate] = []
    for i in order:
        if len(chosen) == limit or float(scores[i]) < _NEAR * best:
            break
        own = set(candidates[i].passage.words)
        others = [set(each.passage.words) for each in chosen]
        # Pages of one report repeat their sentences, often with a word changed.
        if all(len(own & other) < 0.8 * len(own | other) for other in others):
            chosen.append(candidates[i])
    return chosen


def _answer(chosen: Sequence[_Candidate], sources: Sequence[Source]) -> CheckedAnswer:
    claims = tuple(Claim(c.passage.text, (c.source.n,), supported=True) for c in chosen)
    first: dict[int, str] = {}
    for candidate in chosen:
        # A source has room for one quote: its best passage, which comes first.
        first.setdefault(candidate.source.n, candidate.passage.quote)
    marked = tuple(
        locate(replace(source, cited=True), first[source.n]) if source.n in first else source
        for source in sources
    )
    lines = []
    for candidate in chosen:
        # A document's own [3] must not be taken for one of ours.
        text = sanitize(candidate.passage.text)
        # A row of a table is put together from heads and cells: it is no literal quote.
        quoted = text if candidate.passage.heads else f"\u201c{text}\u201d"
        lines.append(f"{quoted} [{candidate.source.n}]")
    return CheckedAnswer("\n".join(lines), claims, marked)
