"""Engines asked all questions, and a judge asked of their answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import PurePath
from typing import Any

from llama_index.core.base.base_query_engine import BaseQueryEngine
from llama_index.core.llms import LLM

from mmrag.answering.planning import PlanningQueryEngine
from mmrag.answering.response import CitedResponse
from mmrag.errors import ConfigError, EndpointError, MMRagError
from mmrag.evaluation.answers import AnswerRecord, Assignment, Verdict
from mmrag.evaluation.asking import collection_state, question_state
from mmrag.evaluation.judge import (
    JUDGE_PROMPT,
    NUGGET_PROMPT,
    assign_nuggets,
    judge_answer,
)
from mmrag.evaluation.kept import Kept, fingerprint
from mmrag.evaluation.questions import Question

_PATIENCE = 3  # questions in a row that may fail at a server before the run is ended
# Values that are the same in every process; objects have an address in their repr.
_PLAIN = (str, int, float, bool, type(None))


def answer_all(
    engine: BaseQueryEngine,
    questions: Sequence[Question],
    *,
    judge: LLM | None = None,
    kept: Kept | None = None,
    notes: list[str] | None = None,
    done: Callable[[int], None] = lambda count: None,
) -> dict[str, AnswerRecord]:
    """What an engine of ours answers, by id of the question.

    Args:
        judge: grades answers to questions that have a right one, and says which nuggets they
            state.
        kept: what earlier runs were answered; changed in place.
        notes: gets a line for each question that failed, which then has no record, and for each
            answer that was not judged.
        done: called with the number of questions asked so far.

    Raises:
        ConfigError: If the engine streams, or is none whose answers cite pages.
        MMRagError: If three questions in a row fail, as with a server that is down.
    """
    kept = Kept() if kept is None else kept
    notes = [] if notes is None else notes
    # Once: it asks the collection for all of its files.
    base = fingerprint(engine_state(engine))
    records: dict[str, AnswerRecord] = {}
    failed = 0

    def note(what: str, error: MMRagError) -> None:
        nonlocal failed
        failed += 1
        # A wrong option fails every question alike.
        if isinstance(error, ConfigError) or failed == _PATIENCE:
            raise error
        notes.append(f"{what}: {error}")

    for count, question in enumerate(questions):
        done(count)
        key = fingerprint(base, *question_state(question))
        try:
            record = AnswerRecord.from_json(kept.get_or(key, partial(_answer, engine, question)))
        except MMRagError as error:
            note(f"question {question.id} was not answered", error)
            continue
        records[question.id] = record
        try:
            if judge is not None:
                verdict = _judged(judge, question, record, kept)
                nuggets = _assigned(judge, question, record, kept)
                records[question.id] = replace(record, verdict=verdict, nuggets=nuggets)
            failed = 0
        except EndpointError as error:
            note(f"the answer to question {question.id} was not judged", error)
    done(len(questions))
    return records


def _answer(engine: BaseQueryEngine, question: Question) -> dict[str, Any]:
    """The record of an answer, as JSON values."""
    started = time.monotonic()
    response = engine.query(question.query())
    if not isinstance(response, CitedResponse):
        raise ConfigError(
            f"the engine gave a {type(response).__name__}; give a CitedQueryEngine or a "
            "PlanningQueryEngine that does not stream."
        )
    cited = [(PurePath(source.file).name, source.page or 1) for source in response.cited]
    return AnswerRecord(
        str(response),
        response.found,
        response.certain,
        tuple(dict.fromkeys(cited)),
        round(time.monotonic() - started, 3),
    ).to_json()


def _judged(judge: LLM, question: Question, record: AnswerRecord, kept: Kept) -> Verdict | None:
    """The judge's verdict; None where the right answer is not known."""
    if not question.answerable or not question.answer:
        return None
    # The judge is not paid for what is known.
    if not record.found:
        return Verdict("wrong", "There is no answer.")
    # The prompt too: an edited one grades otherwise.
    model = [type(judge).__name__, judge.metadata.model_name, JUDGE_PROMPT.template]
    key = fingerprint("judge", model, question.text, question.answer, record.text)
    return Verdict(**kept.get_or(key, lambda: vars(judge_answer(judge, question, record))))


def _assigned(
    judge: LLM, question: Question, record: AnswerRecord, kept: Kept
) -> tuple[Assignment, ...]:
    """What the judge says of each nugget; nothing of an answer that was withheld is stated."""
    if not question.answerable:
        return ()
    if not record.found:
        return tuple("not_support" for _ in question.nuggets)
    facts = [each.text for each in question.nuggets]
    model = [type(judge).__name__, judge.metadata.model_name, NUGGET_PROMPT.template]
    key = fingerprint("nuggets", model, question.text, facts, record.text)
    assigned: list[Assignment] = kept.get_or(
        key, lambda: [*assign_nuggets(judge, question, record)]
    )
    return tuple(assigned)


def engine_state(engine: BaseQueryEngine) -> dict[str, Any]:
    """All settings that move an engine's answers, and those of what it is made of."""
    # A planning engine searches by another one, whose settings move its answers too.
    inner = engine.engine if isinstance(engine, PlanningQueryEngine) else engine
    retriever = getattr(inner, "retriever", None)
    llm: LLM | None = getattr(inner, "llm", None)
    collection = getattr(retriever, "collection", None)
    return {
        "engines": [_settings(engine), _settings(inner)],
        "prompts": {name: repr(prompt) for name, prompt in inner.get_prompts().items()},
        "postprocessors": repr(getattr(inner, "node_postprocessors", [])),
        "retriever": _settings(retriever) | {"weights": getattr(retriever, "weights", None)},
        "where": repr(getattr(retriever, "where", None)),
        "collection": None if collection is None else collection_state(collection),
        "llm": None if llm is None else [type(llm).__name__, llm.metadata.model_name],
        "temperature": getattr(llm, "temperature", None),
    }


def _settings(of: object) -> dict[str, Any]:
    values = getattr(of, "__dict__", {})
    plain = {name: value for name, value in values.items() if isinstance(value, _PLAIN)}
    return {"class": type(of).__name__, **plain}
