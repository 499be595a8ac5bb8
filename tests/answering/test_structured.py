"""An answer as an object: its source, what is checked, and failures."""

import datetime
import json

import pytest
from fakes import make_node
from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    CompletionResponse,
    LLMMetadata,
)
from llama_index.core.llms import CustomLLM
from llama_index.core.schema import NodeWithScore
from pydantic import BaseModel, PrivateAttr

from mmrag.answering.engine import CitedQueryEngine
from mmrag.answering.planning import PlanningQueryEngine
from mmrag.answering.response import SENTINEL
from mmrag.answering.structured import aanswer_as, answer_as
from mmrag.errors import ConfigError, EndpointError

GOLD = "The gold plan costs 90 dollars and covers one eye examination."


class Cover(BaseModel):
    plan: str
    dollars2024: int | None = None
    exams: list[int] = []


class Writer(CustomLLM):
    """Answers from sources with ``answer``, and writes ``filled`` where an object is wanted."""

    answer: str = f"{GOLD} [1]"
    filled: str = '{"plan": "gold", "dollars2024": 90}'
    _asked: list = PrivateAttr(default_factory=list)

    @property
    def metadata(self):
        return LLMMetadata(context_window=32_000, is_chat_model=True, model_name="writer")

    def complete(self, prompt, formatted=False, **kwargs):
        self._asked.append(prompt)
        return CompletionResponse(text=self.filled)

    stream_complete = complete

    def chat(self, messages, **kwargs):
        if any("Fill in the fields" in (message.content or "") for message in messages):
            self._asked.append("\n".join(message.content for message in messages))
            return self._say(self.filled)
        return self._say(self.answer)

    def _say(self, text):
        return ChatResponse(message=ChatMessage(role="assistant", content=text))


class Page(BaseRetriever):
    def _retrieve(self, query_bundle):
        return [NodeWithScore(node=make_node(GOLD), score=1.0)]


def engine(**llm):
    return CitedQueryEngine(Page(), Writer(**llm))


def test_fills_the_object_from_the_cited_answer():
    cited = engine()
    answer = answer_as(cited, "What does gold cost?", Cover)
    assert answer.value == Cover(plan="gold", dollars2024=90)
    assert answer.response.sources[0].cited
    assert answer.problems == ()
    (asked,) = cited.llm._asked
    assert f"Answer: {GOLD} [1]" in asked
    assert "Question: What does gold cost?" in asked


def test_numbers_that_were_made_up_are_told():
    filled = json.dumps({"plan": "gold", "dollars2024": 95, "exams": [1, 7]})
    answer = answer_as(engine(filled=filled), "What does gold cost?", Cover)
    assert answer.problems == ("7 is not in the answer", "95 is not in the answer")


def test_numbers_are_compared_by_value_not_by_how_a_type_spells_them():
    class Bill(BaseModel):
        dollars: float
        fee: float
        due: datetime.date

    said = "Gold costs 90 dollars and a fee of 1,200.50, due on 5 March 2024 (3/5) [1]."
    filled = json.dumps({"dollars": 90.0, "fee": 1200.5, "due": "2024-03-05"})
    answer = answer_as(engine(answer=said, filled=filled), "What does gold cost?", Bill)
    assert answer.problems == ()


def test_nothing_found_is_no_object():
    cited = engine(answer=SENTINEL)
    answer = answer_as(cited, "Who won the cup?", Cover)
    assert answer.value is None
    assert answer.response.found is False
    assert cited.llm._asked == []


@pytest.mark.parametrize("filled", ["I cannot.", '{"plan": 3, "dollars2024": "many"}'])
def test_no_valid_object_is_an_error(filled):
    with pytest.raises(EndpointError, match="Cover"):
        answer_as(engine(filled=filled), "What does gold cost?", Cover)


async def test_works_in_async_code_and_with_plans():
    planning = PlanningQueryEngine(engine())
    answer = await aanswer_as(planning, "What does gold cost?", Cover)
    assert answer.value.plan == "gold"
    assert "plan" in answer.response.metadata


def test_needs_a_model_and_no_stream():
    with pytest.raises(ConfigError, match="language model"):
        answer_as(CitedQueryEngine(Page()), "q", Cover)
    with pytest.raises(ConfigError, match="stream"):
        answer_as(CitedQueryEngine(Page(), Writer(), streaming=True), "q", Cover)
