"""How often the engine answers, and how often it should not have: with the extractive answerer.

    python -m mmrag_recipes evaluate_answers questions.jsonl --pdfs papers/ --foreign other.jsonl

Questions are as in ``mmrag_recipes.evaluate_pages``. Foreign questions, JSON lines with
``question``, are about something that the PDFs do not say: every answer to one is wrong.
"""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmrag.answering.engine import CitedQueryEngine
from mmrag.answering.response import CitedResponse
from mmrag.errors import ContentError
from mmrag.index import UniversalIndex
from mmrag_recipes.config import EvaluateAnswersConfig
from mmrag_recipes.evaluate_pages import read_questions


def evaluate_answers(
    engine: CitedQueryEngine, own: Sequence[Mapping[str, Any]], foreign: Sequence[str]
) -> dict[str, int]:
    """Ask every question. Returns counts.

    ``own``, ``answered`` (of them), ``right_page`` (answers citing a right page), ``foreign``,
    ``foreign_answered``.
    """
    answers = [_ask(engine, question["question"]) for question in own]
    right = 0
    for question, answer in zip(own, answers, strict=True):
        pages = {(page["file"], int(page["page"])) for page in question["pages"]}
        cited = {(Path(source.file).name, source.page) for source in answer.cited}
        right += answer.found and bool(pages & cited)
    return {
        "own": len(own),
        "answered": sum(answer.found for answer in answers),
        "right_page": right,
        "foreign": len(foreign),
        "foreign_answered": sum(_ask(engine, question).found for question in foreign),
    }


def _ask(engine: CitedQueryEngine, question: str) -> CitedResponse:
    answer = engine.query(question)
    assert isinstance(answer, CitedResponse)  # nothing is streamed without a model
    return answer


def read_foreign(path: Path, count: int, seed: int) -> list[str]:
    """Draw questions of another corpus. Raises ContentError if a line has no question."""
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        record = json.loads(line)
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
            )
    print("| | |\n|---|---|")
    print(f"| own questions answered | {counts['answered']} of {counts['own']} |")
    print(f"| own questions with a right page cited | {counts['right_page']} of {counts['own']} |")
    print(f"| foreign questions answered | {counts['foreign_answered']} of {counts['foreign']} |")
