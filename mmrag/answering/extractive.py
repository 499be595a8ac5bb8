"""Answers without a language model: the sentences of the found pages that answer best.

A sentence is judged by the question's words that it has, weighted by how rare they are, and by
its cosine to the question where an embedder is given. Nothing is written that the documents do
not say word for word.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from mmrag.answering.citations import CheckedAnswer, Claim, locate, strip_bullet
from mmrag.answering.context import Source
from mmrag.content import Content
from mmrag.embedders.base import Embedder
from mmrag.lexical import Idf, sentences, terms
from mmrag.nodes import as_hit
from mmrag.prompting import sanitize

FOUND = 0.4
"""Least ``evidence`` that the pages answer the question; set for ``mmrag-nano``."""
_NEAR = 0.75  # share of the best sentence's score that a further sentence must reach
_WITH_LIST = 320  # characters of a sentence with the list that it announces
_TO_EMBED = 64  # sentences that are compared by meaning, those with most words first
_PLACE_WORTH = 0.02  # lost with each place of the page in the ranking; decides between equals


@dataclass(frozen=True)
class _Candidate:
    source: Source
    text: str
    words: list[str]


def extract(
    question: Content,
    sources: Sequence[Source],
    embedder: Embedder | None = None,
    max_sentences: int = 3,
    least_evidence: float = FOUND,
) -> CheckedAnswer | None:
    """The best sentences, each with its ``[n]``; None if no page has ``least_evidence``.

    A question without content words (an image alone, say) is answered by what the embedder
    finds nearest.
    """
    candidates = [
        _Candidate(source, text, terms(text))
        for source in sources
        for text in _quotable(sentences(source.text))
    ]
    wanted = terms(question.text or "")
    if not candidates or (not wanted and embedder is None):
        return None
    idf = Idf([candidate.words for candidate in candidates])
    if wanted and evidence(wanted, sources, idf) < least_evidence:
        return None
    scores = _scores(question, wanted, candidates, idf, embedder)
    return _answer(_choose(candidates, scores, max_sentences), sources)


def _quotable(pieces: Sequence[str]) -> list[str]:
    """Sentences that can stand alone: one that announces a list is followed by the list."""
    found: list[str] = []
    for i, piece in enumerate(pieces):
        whole = strip_bullet(piece)
        if whole.endswith(":"):
            for item in pieces[i + 1 :]:
                if len(whole) + len(item) >= _WITH_LIST:
                    break
                whole += f" {item}"
        found.append(whole)
    return found


def evidence(wanted: Sequence[str], sources: Sequence[Source], idf: Idf) -> float:
    """How likely it is that the pages answer a question with the content words ``wanted``.

    The share of the weight of its words that the best page has; where our retriever ranked the
    text view, the mean of that and the best cosine there.
    """
    words = max(idf.coverage(wanted, terms(f"{each.file} {each.text}")) for each in sources)
    scores = (as_hit(each.node).view_scores.get("text") for each in sources)
    known = [float(score) for score in scores if score is not None]
    return (words + max(known)) / 2 if known else words


def _scores(
    question: Content,
    wanted: list[str],
    candidates: Sequence[_Candidate],
    idf: Idf,
    embedder: Embedder | None,
) -> NDArray[np.float32]:
    """Mean of word coverage and cosine, less a little for each place in the ranking."""
    words = np.asarray([idf.coverage(wanted, c.words) for c in candidates], dtype=np.float32)
    places = np.asarray([c.source.n - 1 for c in candidates], dtype=np.float32)
    if embedder is None:
        return words - _PLACE_WORTH * places
    likely = np.argsort(-(words - _PLACE_WORTH * places), kind="stable")[:_TO_EMBED]
    vectors = embedder.encode([candidates[i].text for i in likely])
    task = "passage_for_question" if question.modality == "text" else "passage_for_image"
    asked = embedder.encode([question], instruction=task)[0]
    alike = np.zeros_like(words)
    alike[likely] = np.clip(vectors @ asked, 0, 1)
    both = (words + alike) / 2 if wanted else alike
    return np.asarray(both - _PLACE_WORTH * places, dtype=np.float32)


def _choose(
    candidates: Sequence[_Candidate], scores: NDArray[np.float32], limit: int
) -> list[_Candidate]:
    """The best sentences, none of which repeats another."""
    order = sorted(range(len(candidates)), key=lambda i: (-float(scores[i]), i))
    best = float(scores[order[0]])
    chosen: list[_Candidate] = []
    for i in order:
        if len(chosen) == limit or float(scores[i]) < _NEAR * best:
            break
        words = set(candidates[i].words)
        if all(len(words & set(c.words)) < 0.8 * len(words | set(c.words)) for c in chosen):
            chosen.append(candidates[i])
    return chosen


def _answer(chosen: Sequence[_Candidate], sources: Sequence[Source]) -> CheckedAnswer:
    claims = tuple(Claim(c.text, (c.source.n,), supported=True) for c in chosen)
    first: dict[int, str] = {}
    for candidate in chosen:
        first.setdefault(candidate.source.n, candidate.text)
    marked = tuple(
        locate(replace(source, cited=True), first[source.n]) if source.n in first else source
        for source in sources
    )
    # A document's own [3] must not pass for one of ours.
    lines = [f"\u201c{sanitize(c.text)}\u201d [{c.source.n}]" for c in chosen]
    return CheckedAnswer("\n".join(lines), claims, marked)
