"""What an engine answered, and how far that is right."""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from decimal import ROUND_HALF_UP, Decimal, InvalidOperation
from typing import Any, Literal, TypeAlias

from mmrag.answering.citations import strip_marks
from mmrag.evaluation.metrics import Metrics
from mmrag.evaluation.questions import Nugget, Page, Question, as_page, page_id
from mmrag.numerals import numerals

Grade: TypeAlias = Literal["correct", "incomplete", "wrong"]
GRADES: Mapping[Grade, float] = {"correct": 1.0, "incomplete": 0.5, "wrong": 0.0}

Assignment: TypeAlias = Literal["support", "partial_support", "not_support"]
ASSIGNMENTS: Mapping[Assignment, float] = {
    "support": 1.0,
    "partial_support": 0.5,
    "not_support": 0.0,
}

Support: TypeAlias = Literal["full_support", "partial_support", "no_support"]
SUPPORTS: Mapping[Support, float] = {
    "full_support": 1.0,
    "partial_support": 0.5,
    "no_support": 0.0,
}

# A sentence is hardly ever repeated word by word, so that equality would say nothing.
_SHORT = 12  # words of a right answer that may be compared as they stand
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


@dataclass(frozen=True)
class Verdict:
    """What a judge says of an answer, and why. grade: ``correct``, ``incomplete`` or ``wrong``."""

    grade: Grade
    reason: str = ""


@dataclass(frozen=True)
class Sentence:
    """A sentence of an answer, and whether the sources that it cites support it.

    text: without its citations. citations: the numbers that it cites, of sources that exist or not.
    support: what the judge says of it; None if no judge was asked.
    """

    text: str
    citations: tuple[int, ...] = ()
    support: Support | None = None


@dataclass(frozen=True)
class AnswerRecord:
    """What an engine answered to one question.

    text: the answer, with its ``[n]``. found: False where it says that there is none.
    certain: False where passages are quoted that may answer the question, and may not.
    cited: the pages that it cites, or rests on if it cites none.
    verdict: the judge's, if one was asked.
    nuggets: whether the answer states each nugget of the question, if the judge was asked.
    sentences: of the answer, each with what it cites; none of an answer that was withheld.

    Examples:
        >>> asked = Question("How deep is it?", (("well.pdf", 3),), answer="9 m")
        >>> answer = AnswerRecord("It is 9 m deep [1].", cited=(("well.pdf", 3),))
        >>> answer.scores(asked)["contains"], answer.scores(asked)["citation_recall"]
        (1.0, 1.0)
    """

    text: str
    found: bool = True
    certain: bool = True
    cited: tuple[Page, ...] = ()
    seconds: float = 0.0
    verdict: Verdict | None = None
    nuggets: tuple[Assignment, ...] = ()
    sentences: tuple[Sentence, ...] = ()

    def scores(self, question: Question) -> Metrics:
        """Every measure that the question allows; those that it does not are left out.

        Of every answer that was judged: those of ``support_scores``. Of a question without an
        answer in the documents: ``abstained``, and ``abstained_or_unsure``, which counts passages
        that may answer it as no answer. Of others:

        - ``answered``, and ``certain``.
        - ``right_page``, whether a right page is cited; ``citation_recall``, the share of right
          pages that are cited; and if it is answered ``citation_precision``, the share of cited
          pages that are right.
        - where the right answer is short: ``exact``, whether both are equal without case,
          punctuation and articles (SQuAD, arXiv 1606.05250, section 6), and ``contains``, whether
          it stands in the answer. ``numeric`` where it has numbers: whether all of them are in
          the answer, rounded to as many decimals.
        - ``judged``, the judge's grade as 1, 0.5 or 0; 0 without an answer.
        - those of ``nugget_scores``, where the judge was asked for nuggets.
        """
        # Whether cited pages support an answer does not depend on the right answer.
        supported = support_scores(self.sentences)
        if not question.answerable:
            # Both are given: to refuse outright is better than to quote what may not fit.
            unsure = not self.found or not self.certain
            return {
                "abstained": float(not self.found),
                "abstained_or_unsure": float(unsure),
            } | supported
        found = {"answered": float(self.found), "certain": float(self.found and self.certain)}
        if question.relevant:
            found |= self._citations(question)
        if question.answer and len(question.answer.split()) <= _SHORT:
            found |= self._matches(question.answer)
        if self.verdict is not None:
            found["judged"] = GRADES[self.verdict.grade]
        if self.nuggets:
            found |= nugget_scores(question.nuggets, self.nuggets)
        return found | supported

    def _citations(self, question: Question) -> Metrics:
        # An answer that was withheld cites nothing, whatever pages lay nearest.
        cited = set(self.cited) if self.found else set()
        right = cited & set(question.relevant)
        found = {
            "right_page": float(bool(right)),
            "citation_recall": len(right) / len(question.relevant),
        }
        # No precision without an answer: nothing cited is no mistake.
        if self.found:
            found["citation_precision"] = len(right) / len(cited) if cited else 0.0
        return found

    def _matches(self, gold: str) -> Metrics:
        # [3] is a citation, and would count as the number 3.
        answer = strip_marks(self.text) if self.found else ""
        wanted, words = normalised(gold), normalised(answer)
        found = {
            "exact": float(words == wanted),
            # Between spaces, so that 9 is not found in 19.
            "contains": float(f" {wanted} " in f" {words} "),
        }
        if numerals(gold):
            found["numeric"] = float(has_numbers(answer, gold))
        return found

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self) | {"cited": [page_id(page) for page in self.cited]}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> AnswerRecord:
        """The record that ``to_json`` gave."""
        verdict = values.get("verdict")
        parts = {
            "cited": tuple(as_page(page) for page in values["cited"]),
            "verdict": Verdict(**verdict) if verdict else None,
            "nuggets": tuple(values.get("nuggets", ())),
            "sentences": tuple(
                Sentence(**(row | {"citations": tuple(row["citations"])}))
                for row in values.get("sentences", ())
            ),
        }
        return cls(**(dict(values) | parts))


def nugget_scores(nuggets: Sequence[Nugget], assigned: Sequence[Assignment]) -> Metrics:
    """Recall of nuggets, as the TREC 2024 RAG track scores it.

    ``nuggets``: mean over all, 1 for support and 0.5 for partial support; ``nuggets_vital``: over
    vital ones; ``nuggets_weighted``: over all, where those that are not vital count half. The same
    with ``_strict``, where partial support is 0. Measures of vital nuggets are left out where there
    are none. Source: AutoNuggetizer (arXiv 2411.09607), its section on scores.

    >>> nugget_scores([Nugget("a"), Nugget("b", vital=False)], ["partial_support", "support"])
    ... # doctest: +NORMALIZE_WHITESPACE
    {'nuggets': 0.75, 'nuggets_vital': 0.5, 'nuggets_weighted': 0.6666666666666666,
     'nuggets_strict': 0.5, 'nuggets_vital_strict': 0.0,
     'nuggets_weighted_strict': 0.3333333333333333}
    """
    weights = {
        "nuggets": [1.0 for _ in nuggets],
        "nuggets_vital": [float(each.vital) for each in nuggets],
        "nuggets_weighted": [1.0 if each.vital else 0.5 for each in nuggets],
    }
    partial = [ASSIGNMENTS[each] for each in assigned]
    strict = [float(each == "support") for each in assigned]
    return {
        name + suffix: sum(w * v for w, v in zip(of, values, strict=True)) / sum(of)
        for suffix, values in (("", partial), ("_strict", strict))
        for name, of in weights.items()
        if sum(of)
    }


def support_scores(sentences: Sequence[Sentence]) -> Metrics:
    """How far the sources that an answer cites support it, sentence by sentence.

    Full support counts 1, partial support 0.5, no support 0; a sentence that cites nothing is not
    supported. ``support_precision``: the mean over the sentences that cite, 0 if none does;
    ``support_recall``: over all sentences. Nothing if a sentence was not judged, or there is none.
    Source: the weighted precision and recall of the support evaluation of the TREC 2024 RAG track
    (arXiv 2504.15205), whose baseline system is Ragnarök (arXiv 2406.16828).

    >>> support_scores([Sentence("a", (1,), "full_support"), Sentence("b", (), "no_support")])
    {'support_precision': 1.0, 'support_recall': 0.5}
    """
    values = [SUPPORTS[each.support] for each in sentences if each.support is not None]
    # The mean of the sentences that were judged would be that of another answer.
    if not values or len(values) < len(sentences):
        return {}
    n_citing = sum(bool(each.citations) for each in sentences)
    # Sentences that cite nothing add nothing to the sum, which so serves both.
    total = sum(value for value, each in zip(values, sentences, strict=True) if each.citations)
    return {
        "support_precision": total / n_citing if n_citing else 0.0,
        "support_recall": total / len(sentences),
    }


def normalised(text: str) -> str:
    """A text without case, punctuation, articles and spaces more than one."""
    # casefold, since lower() leaves the German sharp s apart from ss.
    bare = "".join(c for c in text.casefold() if not _is_punctuation(c))
    return " ".join(_ARTICLES.sub(" ", bare).split())


def _is_punctuation(char: str) -> bool:
    """SQuAD's own are ASCII; answers that quote have typographic ones as well."""
    return char in string.punctuation or unicodedata.category(char).startswith("P")


def has_numbers(answer: str, gold: str) -> bool:
    """Whether every number of ``gold`` is in the answer, at the precision of ``gold``.

    93.857 has 93.86, and 36.2 % has 36 %; 94 has not 93.86. Signs must agree.
    """
    values = [
        value
        for numeral in numerals(answer)
        for reading in numeral.readings
        for each in reading
        if (value := _decimal(each)) is not None
    ]
    return all(
        any(_equal(_decimal(each), values) for reading in numeral.readings for each in reading)
        for numeral in numerals(gold)
    )


def _equal(wanted: Decimal | None, values: list[Decimal]) -> bool:
    if wanted is None:
        return False
    return any(value.quantize(wanted, rounding=ROUND_HALF_UP) == wanted for value in values)


def _decimal(text: str) -> Decimal | None:
    try:
        value = Decimal(text)
        return value if abs(value) < 10**20 else None
    except InvalidOperation:
        return None  # a version, or digits longer than any quantity
