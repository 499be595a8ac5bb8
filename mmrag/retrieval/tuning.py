"""Weights of the rankings, fitted to a few questions whose right pages are known."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

import numpy as np
from numpy.typing import NDArray

from mmrag.errors import ContentError
from mmrag.retrieval.fusion import fuse
from mmrag.retrieval.retriever import UniversalRetriever

_STEPS = 10  # a weight is a multiple of one tenth of all
_DEPTH = 10  # of nDCG
_DRAWS = 2000  # of the bootstrap


@dataclass(frozen=True)
class Question:
    """A question and its right pages, as (file name, page); any of them is right."""

    text: str
    pages: frozenset[tuple[str, int]]

    @property
    def document(self) -> str:
        """The document that it is about: the first of its pages' files."""
        return min(self.pages)[0]


@dataclass(frozen=True)
class Tuning:
    """What fitting gave.

    weights: fitted to all questions; they add up to 1.
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


def read_questions(path: Path) -> list[Question]:
    """Questions from JSON lines: ``{"question": ..., "pages": [{"file": ..., "page": 7}]}``.

    Raises:
        ContentError: For a line without either, and for a file without lines.
    """
    questions = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            pages = frozenset(
                (PurePath(page["file"]).name, int(page["page"])) for page in row["pages"]
            )
            questions.append(Question(str(row["question"]), pages))
        except (ValueError, TypeError, KeyError) as error:
            raise ContentError(
                f"{path}:{number}: give a question and its pages, as in "
                '{"question": "...", "pages": [{"file": "a.pdf", "page": 7}]}.'
            ) from error
        if not pages:
            raise ContentError(f"{path}:{number}: pages is empty; give a right page.")
    if not questions:
        raise ContentError(f"{path}: there is no question.")
    return questions


def tune(retriever: UniversalRetriever, questions: Sequence[Question]) -> Tuning:
    """Fit the weights of the retriever's rankings to questions; nothing is saved.

    Weights are tried in steps of one tenth. Each document's questions are judged with the
    weights that are best for the questions about all other documents.

    Raises:
        ContentError: If the questions are about one document only.
    """
    documents = np.array([question.document for question in questions])
    names = sorted(set(documents.tolist()))
    if len(names) < 2:
        raise ContentError("Weights are fitted on questions about two documents at least.")
    views = [*retriever.collection.settings.views, "bm25"]
    used = [name for name in views if retriever.weights[name] > 0]
    present = np.array([retriever.weights[name] for name in used])
    # The weights in force come first: of equals, the first is taken.
    tried = np.stack([present / present.sum(), *_grid(len(used))])
    quality = np.stack([_quality(retriever, used, tried, question) for question in questions])
    left_out = np.empty(len(questions))
    for document in names:
        of_it = documents == document
        best = quality[~of_it].mean(axis=0).argmax()
        left_out[of_it] = quality[of_it, best]
    low, high = _interval(left_out - quality[:, 0], documents, names)
    weights = tried[quality.mean(axis=0).argmax()]
    return Tuning(
        weights={name: round(float(each), 4) for name, each in zip(used, weights, strict=True)},
        n_questions=len(questions),
        n_documents=len(names),
        before=float(quality[:, 0].mean()),
        after=float(left_out.mean()),
        low=low,
        high=high,
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
    rankings = retriever.rankings(question.text)
    entries = fuse(rankings, dict.fromkeys(rankings, 1.0), by=retriever.fuse_by)
    if not entries:
        return np.zeros(len(tried))
    credits = np.array([[entry.credits.get(name, 0.0) for name in names] for entry in entries])
    right = np.array([_place(entry.best.payload) in question.pages for entry in entries])
    order = np.argsort(-(tried @ credits.T), axis=1, kind="stable")[:, :_DEPTH]
    discount = 1 / np.log2(np.arange(2, _DEPTH + 2))
    best = discount[: len(question.pages)].sum()
    found: NDArray[np.float64] = (right[order] * discount[: order.shape[1]]).sum(axis=1) / best
    return found


def _place(payload: Mapping[str, object]) -> tuple[str, object]:
    return PurePath(str(payload.get("file", ""))).name, payload.get("page")


def _interval(
    gains: NDArray[np.float64], documents: NDArray[np.str_], names: Sequence[str]
) -> tuple[float, float]:
    """95 % interval of the mean gain; documents are drawn, since their questions are alike."""
    sums = np.array([gains[documents == name].sum() for name in names])
    counts = np.array([(documents == name).sum() for name in names])
    drawn = np.random.default_rng(0).integers(0, len(names), (_DRAWS, len(names)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
