"""What the measures of answers are called in tables. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping

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
    "abstained": "abstained, of those without an answer",
    "abstained_or_unsure": "abstained or unsure, of the same",
}
"""The measures of ``AnswerRecord.scores``, in the order of tables."""
