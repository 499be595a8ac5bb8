"""Weights of the rankings, fitted to a few questions whose right pages are known."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mmrag.errors import ContentError
from mmrag.evaluation.asking import page_of
from mmrag.evaluation.bootstrap import interval
from mmrag.evaluation.questions import Question
from mmrag.retrieval.fusion import fuse
from mmrag.retrieval.retriever import UniversalRetriever

_STEPS = 10  # a weight is a multiple of one tenth of all
_DEPTH = 10  # of nDCG


@dataclass(frozen=True)
class Tuning:
    """What fitting gave.

    weights: fitted to all questions; they add up to what they did before, so that a page that a
        question names keeps its share.
    before, after: mean nDCG@10 with the present weights, and with weights that were fitted to
        the questions about all other documents.
    low, high: 95 % interval of the gain, from a bootstrap over documents.
    """

    weights: dict[str, float]
    n_questions: int
    n_documents: int
    before: float
    after: float
    low: float
    high: float

    @property
    def within_noise(self) -> bool:
        """Whether the gain may well be none."""
        return self.low <= 0


def tune(retriever: UniversalRetriever, questions: Sequence[Question]) -> Tuning:
    """Fit the weights of the retriever's rankings to questions; nothing is saved.

    Questions that the documents do not answer are left out.

    Weights are tried in steps of one tenth. Each document's questions are judged with the
    weights that are best for the questions about all other documents.

    Raises:
        ContentError: If the questions are about one document only.
    """
    questions = [question for question in questions if question.pages]
    documents = np.array([question.document for question in questions])
    names = sorted(set(documents.tolist()))
    if len(names) < 2:
        raise ContentError("Weights are fitted on questions about two documents at least.")
    used = [name for name in retriever.ranking_names if retriever.weights[name] > 0]
    present = np.array([retriever.weights[name] for name in used])
    # The weights in force come first: of equals, the first is taken.
    tried = np.stack([present / present.sum(), *_grid(len(used))])
    quality = np.stack([_quality(retriever, used, tried, question) for question in questions])
    left_out = np.empty(len(questions))
    for document in names:
        of_it = documents == document
        # By document: questions about one document are alike, and would leak into their own fit.
        best = quality[~of_it].mean(axis=0).argmax()
        left_out[of_it] = quality[of_it, best]
    (low,), (high,) = interval((left_out - quality[:, 0])[:, None], documents.tolist())
    weights = tried[quality.mean(axis=0).argmax()] * present.sum()
    return Tuning(
        weights={name: round(float(each), 4) for name, each in zip(used, weights, strict=True)},
        n_questions=len(questions),
        n_documents=len(names),
        before=float(quality[:, 0].mean()),
        after=float(left_out.mean()),
        low=float(low),
        high=float(high),
    )


def _grid(count: int, left: int = _STEPS) -> Iterator[NDArray[np.float64]]:
    """Every way to share 1 among ``count`` rankings in steps of one tenth: (count,) each."""
    if count == 1:
        yield np.array([left / _STEPS])
        return
    for first in range(left + 1):
        for rest in _grid(count - 1, left - first):
            yield np.concatenate([[first / _STEPS], rest])


def _quality(
    retriever: UniversalRetriever,
    names: Sequence[str],
    tried: NDArray[np.float64],
    question: Question,
) -> NDArray[np.float64]:
    """nDCG@10 of a question with each of the weights tried: (len(tried),)."""
    rankings = retriever.rankings(question.query())
    # Fused once with equal weights: the credits then give every other weighting by a product.
    equal = dict.fromkeys(rankings, 1.0)
    entries = fuse(rankings, equal, by=retriever.fuse_by, zeros=retriever.zeros)
    if not entries:
        return np.zeros(len(tried))
    credits = np.array([[entry.credits.get(name, 0.0) for name in names] for entry in entries])
    right = np.array([page_of(entry.best.payload) in question.pages for entry in entries])
    # (tried, entries)
    order = np.argsort(-(tried @ credits.T), axis=1, kind="stable")[:, :_DEPTH]
    discount = 1 / np.log2(np.arange(2, _DEPTH + 2))
    best = discount[: len(question.pages)].sum()
    found: NDArray[np.float64] = (right[order] * discount[: order.shape[1]]).sum(axis=1) / best
    return found
