"""Which measures tables show, and what they are called. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

MEASURES: Mapping[str, str] = {
    "answered": "answered, of those with an answer",
    "certain": "answered for certain, of the same",
    "right_page": "a right page cited",
    "citation_precision": "citation precision, by page",
    "citation_recall": "citation recall, by page",
    "exact": "exact match",
    "contains": "contains the right answer",
    "numeric": "right numbers",
    "judged": "judged right",
    "nuggets": "nuggets stated",
    "nuggets_strict": "nuggets stated in full",
    "nuggets_vital": "vital nuggets stated",
    "nuggets_vital_strict": "vital nuggets stated in full",
    "nuggets_weighted": "nuggets stated, others than vital half",
    "nuggets_weighted_strict": "nuggets stated in full, others than vital half",
    "support_precision": "support precision, of sentences that cite",
    "support_recall": "support recall, of all sentences",
    "abstained": "abstained, of those without an answer",
    "abstained_or_unsure": "abstained or unsure, of the same",
}
"""The measures of ``AnswerRecord.scores``, in the order of tables."""


def metric_names(cuts: Sequence[int]) -> list[str]:
    """The metrics of rankings that tables show, the main one last."""
    deepest = cuts[-1]
    names = [*(f"hit@{cut}" for cut in cuts), f"recall@{deepest}", f"mrr@{deepest}"]
    # At 1 there is no nDCG: it would be the same number as the hit.
    return names if deepest == 1 else [*names, f"ndcg@{deepest}"]
