r"""How often the engine answers, and how often it should not have: with the extractive answerer.

    python -m mmrag_recipes evaluate_answers questions.jsonl --pdfs papers/ --foreign other.jsonl \
        --near near-misses.jsonl

Questions are as in ``mmrag_recipes.evaluate_pages``; ``mmrag eval --answers`` measures more.
Foreign questions, JSON lines with ``question``, are about something else than the PDFs; near
misses, about what the PDFs could say and do not. Every answer to one is wrong. An answer is
certain, or of passages that may answer.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from mmrag.answering.engine import CitedQueryEngine
from mmrag.errors import ContentError
from mmrag.evaluation.answers import AnswerRecord
from mmrag.evaluation.engines import answer_all
from mmrag.evaluation.questions import Question, json_lines, numbered
from mmrag.index import UniversalIndex
from mmrag_recipes.config import EvaluateAnswersConfig
from mmrag_recipes.evaluate_pages import read_questions


def evaluate_answers(
    engine: CitedQueryEngine,
    own: Sequence[Question],
    foreign: Sequence[str],
    near: Sequence[str] = (),
) -> dict[str, int]:
    """Ask every question. Returns counts.

    ``own``, ``answered`` (of them), ``certain`` (of those), ``right_page`` (answers citing a
    right page); ``foreign``, ``foreign_answered``, ``foreign_certain``; the same of ``near``.
    """
    answers = answer_all(engine, numbered(own))
    right = [answers[q.id].scores(q).get("right_page", 0.0) for q in numbered(own)]
    counts = {"own": len(own), **_found(answers), "right_page": round(sum(right))}
    for name, texts in (("foreign", foreign), ("near", near)):
        found = _found(answer_all(engine, numbered([Question(text) for text in texts])))
        counts[name] = len(texts)
        counts |= {f"{name}_{key}": count for key, count in found.items()}
    return counts


def _found(answers: Mapping[str, AnswerRecord]) -> dict[str, int]:
    found = [answer for answer in answers.values() if answer.found]
    return {"answered": len(found), "certain": sum(answer.certain for answer in found)}


def read_foreign(path: Path, count: int, seed: int) -> list[str]:
    """Draw questions of another corpus. Raises ContentError if a line has no question."""
    found = []
    for number, record in json_lines(path):
        # A paragraph with several questions, as XQuAD has them, counts each.
        questions = record.get("questions") or [record]
        for item in questions:
            text = item if isinstance(item, str) else item.get("question")
            if not text:
                raise ContentError(f"{path}:{number}: there is no question.")
            found.append(text)
    return random.Random(seed).sample(found, min(count, len(found)))


def run(options: EvaluateAnswersConfig) -> None:
    """Command: ask all questions and count answers."""
    with tempfile.TemporaryDirectory() as scratch:
        place = options.library or Path(scratch) / "library"
        with UniversalIndex(place, options.model) as index:
            index.add(options.pdfs, progress=True)
            counts = evaluate_answers(
                index.as_query_engine(),
                read_questions(options.questions),
                read_foreign(options.foreign, options.count, options.seed),
                read_foreign(options.near, options.count, options.seed) if options.near else [],
            )
    print("| questions | n | quoted as the answer | as what may answer | not found |")
    print("|---|---|---|---|---|")
    for name, prefix in (("own", ""), ("near miss", "near_"), ("foreign", "foreign_")):
        n = counts[prefix.removesuffix("_") or "own"]
        answered, certain = counts[f"{prefix}answered"], counts[f"{prefix}certain"]
        print(f"| {name} | {n} | {certain} | {answered - certain} | {n - answered} |")
    print(f"\nA right page is cited for {counts['right_page']} of {counts['own']} own questions.")
