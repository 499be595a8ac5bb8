"""A conversation: what is searched for, what is remembered, what a turn carries."""

import asyncio
import threading

import httpx
import openai
import pytest
from fakes import make_node
from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.base.llms.types import ChatMessage, ChatResponse, LLMMetadata
from llama_index.core.llms import CustomLLM
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.schema import NodeWithScore
from PIL import Image
from pydantic import PrivateAttr

from mmrag.answering.chat import CitedChatEngine
from mmrag.answering.engine import CitedQueryEngine
from mmrag.answering.planning import PlanningQueryEngine
from mmrag.errors import ConfigError, EndpointError

GOLD = "The gold plan covers one eye examination a year."
ANSWER = f"{GOLD} [1]"


class Talk(CustomLLM):
    """Answers from sources with ``ANSWER``; replies to all else with ``rewritten``."""

    rewritten: str = "What does the gold plan cover?"
    answer: str = ANSWER
    fails: bool = False
    breaks: bool = False
    _asked: list = PrivateAttr(default_factory=list)
    _drawn_by: list = PrivateAttr(default_factory=list)

    @property
    def metadata(self):
        return LLMMetadata(context_window=32_000, is_chat_model=True, model_name="talk")

    def complete(self, prompt, formatted=False, **kwargs):
        raise NotImplementedError

    stream_complete = complete

    def chat(self, messages, **kwargs):
        if self.fails:
            raise openai.APIConnectionError(request=httpx.Request("POST", "http://x"))
        if len(messages) > 1:
            return self._say(self.answer)
        self._asked.append(messages[0].content)
        return self._say(self.rewritten)

    def stream_chat(self, messages, **kwargs):
        for word in self.answer.split(" "):
            self._drawn_by.append(runner())
            yield self._say(f"{word} ")
            if self.breaks:
                raise httpx.RemoteProtocolError("peer closed connection")

    def _say(self, text):
        return ChatResponse(message=ChatMessage(role="assistant", content=text), delta=text)


def runner():
    """The task that runs, or the thread outside of event loops."""
    try:
        return asyncio.current_task()
    except RuntimeError:
        return threading.current_thread()


class Page(BaseRetriever):
    def __init__(self):
        self.queries = []
        super().__init__()

    def _retrieve(self, query_bundle):
        self.queries.append(query_bundle)
        return [NodeWithScore(node=make_node(GOLD), score=1.0)]


def chat_engine(**llm):
    return CitedChatEngine(CitedQueryEngine(Page(), Talk(**llm)))


def searched(chat):
    return [query.query_str for query in chat.engine.retriever.queries]


def said(chat):
    return [(message.role.value, message.content) for message in chat.chat_history]


def test_the_first_question_is_searched_as_it_is_and_a_follow_up_rewritten():
    chat = chat_engine()
    first = chat.chat("Tell me of the gold plan.")
    assert (first.question, first.response) == ("Tell me of the gold plan.", ANSWER)
    assert chat.llm._asked == []
    second = chat.chat("And what does it cover?")
    assert second.question == "What does the gold plan cover?"
    assert searched(chat) == ["Tell me of the gold plan.", "What does the gold plan cover?"]
    (asked,) = chat.llm._asked
    assert "user: Tell me of the gold plan." in asked
    assert f"assistant: {GOLD}" in asked
    assert "[1]" not in asked
    assert "Last message: And what does it cover?" in asked


def test_what_was_said_is_remembered_and_can_be_forgotten():
    chat = chat_engine()
    chat.chat("Gold?")
    chat.chat("And?")
    assert said(chat) == [
        ("user", "Gold?"),
        ("assistant", ANSWER),
        ("user", "And?"),
        ("assistant", ANSWER),
    ]
    chat.reset()
    assert said(chat) == []
    chat.chat("Again?")
    assert len(chat.llm._asked) == 1


def test_a_turn_carries_its_checked_sources():
    turn = chat_engine().chat("Gold?")
    assert [source.cited for source in turn.cited.sources] == [True]
    assert turn.cited.problems == []
    assert turn.source_nodes[0].node.text == GOLD
    assert turn.sources[0].raw_output is turn.cited
    assert turn.sources[0].raw_input == {"query": "Gold?"}


def test_an_image_belongs_to_its_message():
    chat = chat_engine()
    image = Image.new("RGB", (8, 8))
    chat.chat("What is this?", image=image)
    chat.chat("And this?")
    first, second = chat.engine.retriever.queries
    assert first.image is image
    assert second.image is None


def test_streams_are_remembered_at_their_end():
    chat = chat_engine()
    stream = chat.stream_chat("Gold?")
    assert "".join(stream.response_gen).strip() == ANSWER
    assert said(chat) == [("user", "Gold?"), ("assistant", ANSWER)]
    assert stream.source_nodes[0].node.text == GOLD
    whole = stream.sources[0].raw_output.get_response()
    assert whole.sources[0].cited
    assert chat.engine.streaming is False


@pytest.fixture
def thread_errors(monkeypatch):
    errors = []
    monkeypatch.setattr(threading, "excepthook", errors.append)
    return errors


def test_a_stream_that_fails_is_not_remembered(thread_errors):
    chat = chat_engine(breaks=True)
    chat.chat("Gold?")
    before = said(chat)
    stream = chat.stream_chat("And?")
    with pytest.raises(EndpointError, match="broke off"):
        list(stream.response_gen)
    assert said(chat) == before
    # Memories of other tests may end their own threads late.
    own = [each for each in thread_errors if "_connection_worker" not in each.thread.name]
    assert own == []


async def test_an_async_stream_that_fails_is_not_remembered():
    chat = chat_engine(breaks=True)
    await chat.achat("Gold?")
    before = said(chat)
    stream = await chat.astream_chat("And?")
    with pytest.raises(EndpointError, match="broke off"):
        _ = [token async for token in stream.async_response_gen()]
    assert said(chat) == before


def test_who_reads_a_stream_draws_it_and_so_need_not_poll():
    chat = chat_engine()
    list(chat.stream_chat("Gold?").response_gen)
    assert set(chat.llm._drawn_by) == {threading.current_thread()}


async def test_who_reads_an_async_stream_draws_it():
    chat = chat_engine()
    stream = await chat.astream_chat("Gold?")
    _ = [token async for token in stream.async_response_gen()]
    assert set(chat.llm._drawn_by) == {asyncio.current_task()}


def test_a_stream_given_up_is_not_remembered():
    chat = chat_engine()
    tokens = chat.stream_chat("Gold?").response_gen
    next(tokens)
    tokens.close()
    assert said(chat) == []


def test_a_stream_without_words_is_an_error():
    chat = chat_engine(answer="")
    with pytest.raises(EndpointError, match="empty"):
        list(chat.stream_chat("Gold?").response_gen)
    assert said(chat) == []


async def test_memory_has_the_checked_answer_of_a_stream_however_it_is_read():
    talk = Talk(answer=f"{ANSWER} Silver costs 900 dollars. [1]")
    chat = CitedChatEngine(CitedQueryEngine(Page(), talk, unsupported="remove"))
    whole = chat.stream_chat("Gold?").sources[0].raw_output.get_response()
    assert "900" not in str(whole)
    assert said(chat) == [("user", "Gold?"), ("assistant", str(whole))]
    stream = await chat.astream_chat("And?")
    assert "900" in "".join([token async for token in stream.async_response_gen()])
    again = await stream.sources[0].raw_output.get_response()
    assert said(chat)[2:] == [("user", "And?"), ("assistant", str(again))]
    assert str(again) == str(whole)


async def test_async_turns_and_streams():
    chat = chat_engine()
    turn = await chat.achat("Gold?")
    assert turn.response == ANSWER
    stream = await chat.astream_chat("And?")
    text = "".join([token async for token in stream.async_response_gen()])
    assert text.strip() == ANSWER
    assert len(chat.chat_history) == 4


def test_a_history_given_takes_the_place_of_memory():
    chat = chat_engine()
    chat.chat("Old?")
    chat.chat("And?", chat_history=[ChatMessage(role="user", content="About silver.")])
    assert "silver" in chat.llm._asked[0]
    assert "Old?" not in chat.llm._asked[0]
    assert len(chat.chat_history) == 3
    chat.chat("New?", chat_history=[])
    assert len(chat.llm._asked) == 1


def test_a_turn_that_fails_is_not_remembered():
    chat = chat_engine(fails=True)
    with pytest.raises(EndpointError, match="cannot be reached"):
        chat.chat("Gold?")
    assert said(chat) == []
    with pytest.raises(EndpointError, match="cannot be reached"):
        chat.chat("And?", chat_history=[ChatMessage(role="user", content="x")])


def test_an_empty_rewrite_is_an_error():
    chat = chat_engine(rewritten=" ")
    chat.chat("Gold?")
    with pytest.raises(EndpointError, match="rewrote"):
        chat.chat("And?")


def test_reasoning_is_no_part_of_a_rewrite():
    chat = chat_engine(rewritten="<think>They mean gold.</think>\nWhat does gold cover?")
    chat.chat("Gold?")
    assert chat.chat("And?").question == "What does gold cover?"


def test_an_image_alone_is_not_rewritten():
    chat = chat_engine()
    chat.chat("Gold?")
    turn = chat.chat("", image=Image.new("RGB", (40, 30)))
    assert (turn.question, chat.llm._asked) == ("", [])


def test_plans_where_the_engine_plans():
    planning = PlanningQueryEngine(CitedQueryEngine(Page(), Talk(rewritten="no plan")))
    memory = ChatMemoryBuffer.from_defaults(token_limit=1000)
    chat = CitedChatEngine(planning, memory=memory)
    turn = chat.chat("Gold?")
    assert turn.metadata["plan"]["stopped"] == "the plan could not be read"
    stream = chat.stream_chat("And?")
    assert "".join(stream.response_gen).strip() == ANSWER
    assert "plan" in stream.sources[0].raw_output.get_response().metadata
    assert planning.engine.streaming is False
    assert len(memory.get_all()) == 4


def test_chat_needs_a_model():
    with pytest.raises(ConfigError, match="language model"):
        CitedChatEngine(CitedQueryEngine(Page()))
