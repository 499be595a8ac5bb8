"""Engines asked all questions, and a judge asked of their answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path, PurePath
from typing import Any

from llama_index.core.base.base_query_engine import BaseQueryEngine
from llama_index.core.llms import LLM
from llama_index.core.prompts import PromptTemplate
from llama_index.core.schema import NodeWithScore, TextNode

from mmrag.answering.citations import parse_marks
from mmrag.answering.context import Source
from mmrag.answering.planning import PlanningQueryEngine
from mmrag.answering.response import CitedResponse
from mmrag.errors import ConfigError, EndpointError, MMRagError
from mmrag.evaluation.answers import AnswerRecord, Assignment, Sentence, Support, Verdict
from mmrag.evaluation.asking import collection_state, question_state
from mmrag.evaluation.judge import (
    JUDGE_PROMPT,
    NUGGET_PROMPT,
    SUPPORT_PROMPT,
    assign_nuggets,
    judge_answer,
    judge_support,
)
from mmrag.evaluation.kept import Kept, fingerprint
from mmrag.evaluation.questions import Question

_PATIENCE = 3  # questions in a row that may fail at a server before the run is ended
_SHOWN = ("page_name", "section", "caption")  # metadata that stand above the text of a source
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
        judge: grades answers to questions that have a right one, says which nuggets they state,
            and whether each sentence is supported by the sources that it cites.
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
    base = fingerprint(engine_state(engine), [each.name for each in fields(AnswerRecord)])
    # The judge sees what the model that answered saw.
    images = _sends_images(engine)
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
            answer = kept.get_or(key, partial(_answer, engine, question))
        except MMRagError as error:
            note(f"question {question.id} was not answered", error)
            continue
        records[question.id] = AnswerRecord.from_json(answer["record"])
        try:
            if judge is not None:
                for said in _judgements(judge, question, answer, images, kept):
                    # One by one, so that what was said before a reply that fails is not lost.
                    records[question.id] = replace(records[question.id], **said)
            failed = 0
        except EndpointError as error:
            note(f"the answer to question {question.id} was not judged in full", error)
    done(len(questions))
    return records


def _answer(engine: BaseQueryEngine, question: Question) -> dict[str, Any]:
    """The record of an answer and the sources that its sentences cite, as JSON values."""
    started = time.monotonic()
    response = engine.query(question.query())
    if not isinstance(response, CitedResponse):
        raise ConfigError(
            f"the engine gave a {type(response).__name__}; give a CitedQueryEngine or a "
            "PlanningQueryEngine that does not stream."
        )
    cited = [(PurePath(source.file).name, source.page or 1) for source in response.cited]
    record = AnswerRecord(
        str(response),
        response.found,
        response.certain,
        tuple(dict.fromkeys(cited)),
        round(time.monotonic() - started, 3),
        sentences=_sentences(engine, response),
    )
    wanted = {n for sentence in record.sentences for n in sentence.citations}
    sources = [_source_row(source) for source in response.sources if source.n in wanted]
    return {"record": record.to_json(), "sources": sources}


def _sentences(engine: BaseQueryEngine, response: CitedResponse) -> tuple[Sentence, ...]:
    """The sentences that a reader sees, with the citations that are left in them."""
    if not response.found:
        return ()
    removes = getattr(_inner(engine), "unsupported", None) == "remove"
    shown = set(parse_marks(str(response)))
    return tuple(
        Sentence(claim.text, tuple(n for n in (*claim.citations, *claim.dangling) if n in shown))
        for claim in response.claims
        # Marks on their own claim nothing.
        if claim.text and not (removes and claim.supported is False)
    )


def _source_row(source: Source) -> dict[str, Any]:
    """What of a source a judge is shown."""
    metadata = source.node.node.metadata
    return {
        "n": source.n,
        "file": source.file,
        "page": source.page,
        "text": source.text,
        "image": str(source.image) if source.image else None,
        "description": source.description,
        "described_by": source.described_by,
        "metadata": {name: metadata[name] for name in _SHOWN if name in metadata},
    }


def _as_source(row: Mapping[str, Any]) -> Source:
    """The source of ``_source_row``."""
    values = dict(row)
    node = NodeWithScore(node=TextNode(text=row["text"], metadata=values.pop("metadata")))
    image = Path(row["image"]) if row["image"] else None
    return Source(**(values | {"node": node, "image": image}))


def _judgements(
    judge: LLM, question: Question, answer: Mapping[str, Any], images: bool, kept: Kept
) -> Iterator[dict[str, Any]]:
    """What the judge says of an answer, as fields of its record."""
    record = AnswerRecord.from_json(answer["record"])
    sources = {row["n"]: _as_source(row) for row in answer["sources"]}
    yield {"verdict": _judged(judge, question, record, kept)}
    yield {"nuggets": _assigned(judge, question, record, kept)}
    yield {"sentences": _supported(judge, question, record, sources, images, kept)}


def _judged(judge: LLM, question: Question, record: AnswerRecord, kept: Kept) -> Verdict | None:
    """The judge's verdict; None where the right answer is not known."""
    if not question.answerable or not question.answer:
        return None
    # The judge is not paid for what is known.
    if not record.found:
        return Verdict("wrong", "There is no answer.")
    model = _judge_state(judge, JUDGE_PROMPT)
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
    model = _judge_state(judge, NUGGET_PROMPT)
    key = fingerprint("nuggets", model, question.text, facts, record.text)
    assigned: list[Assignment] = kept.get_or(
        key, lambda: [*assign_nuggets(judge, question, record)]
    )
    return tuple(assigned)


def _supported(
    judge: LLM,
    question: Question,
    record: AnswerRecord,
    sources: Mapping[int, Source],
    images: bool,
    kept: Kept,
) -> tuple[Sentence, ...]:
    """The sentences of an answer with what the judge says of their support."""
    model = _judge_state(judge, SUPPORT_PROMPT)
    found = []
    for sentence in record.sentences:
        cited = [sources[n] for n in sentence.citations if n in sources]
        # Without a source there is nothing to ask.
        support: Support = "no_support"
        if cited:
            rows = [_source_row(source) for source in cited]
            key = fingerprint("support", model, question.text, sentence.text, rows, images)
            ask = partial(judge_support, judge, question, sentence.text, cited, images=images)
            support = kept.get_or(key, ask)
        found.append(replace(sentence, support=support))
    return tuple(found)


def _judge_state(judge: LLM, prompt: PromptTemplate) -> list[str]:
    """What of a judge moves what it says; the prompt too, since an edited one grades otherwise."""
    return [type(judge).__name__, judge.metadata.model_name, prompt.template]


def _inner(engine: BaseQueryEngine) -> BaseQueryEngine:
    """The engine that answers; a planning engine searches by it."""
    return engine.engine if isinstance(engine, PlanningQueryEngine) else engine


def _sends_images(engine: BaseQueryEngine) -> bool:
    """Whether the engine's model is shown images; passages are quoted from texts alone."""
    inner = _inner(engine)
    return getattr(inner, "llm", None) is not None and bool(getattr(inner, "images", False))


def engine_state(engine: BaseQueryEngine) -> dict[str, Any]:
    """All settings that move an engine's answers, and those of what it is made of."""
    # The settings of both move the answers of a planning engine.
    inner = _inner(engine)
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
