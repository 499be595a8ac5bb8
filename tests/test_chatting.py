"""A conversation: what is searched for, what is remembered, what a turn carries."""

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

from mmrag.answering import CitedQueryEngine
from mmrag.chatting import CitedChatEngine
from mmrag.errors import ConfigError, EndpointError
from mmrag.planning import PlanningQueryEngine

GOLD = "The gold plan covers one eye examination a year."
ANSWER = f"{GOLD} [1]"


class Talk(CustomLLM):
    """Answers from sources with ``ANSWER``; replies to all else with ``rewritten``."""

    rewritten: str = "What does the gold plan cover?"
    answer: str = ANSWER
    fails: bool = False
    _asked: list = PrivateAttr(default_factory=list)

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
            yield self._say(f"{word} ")

    def _say(self, text):
        return ChatResponse(message=ChatMessage(role="assistant", content=text), delta=text)


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


def test_a_picture_belongs_to_its_message():
    chat = chat_engine()
    picture = Image.new("RGB", (8, 8))
    chat.chat("What is this?", image=picture)
    chat.chat("And this?")
    first, second = chat.engine.retriever.queries
    assert first.image is picture
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


def test_plans_where_the_engine_plans():
    planning = PlanningQueryEngine(CitedQueryEngine(Page(), Talk(rewritten="no plan")))
    memory = ChatMemoryBuffer.from_defaults(token_limit=1000)
    chat = CitedChatEngine(planning, memory=memory)
    turn = chat.chat("Gold?")
    assert turn.metadata["plan"]["stopped"] == "the plan could not be read"
    assert "".join(chat.stream_chat("And?").response_gen).strip() == ANSWER
    assert planning.engine.streaming is False
    assert len(memory.get_all()) == 4


def test_chat_needs_a_model():
    with pytest.raises(ConfigError, match="language model"):
        CitedChatEngine(CitedQueryEngine(Page()))
