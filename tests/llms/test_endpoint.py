"""A chat model behind a server: addresses, keys, and replies that stray from the format."""

import base64
import copy
import json
import pickle
import time

import pytest
from chat_server import ChatServer
from llama_index.core.llms import ChatMessage

from mmrag.content import Content
from mmrag.errors import ConfigError, EndpointError
from mmrag.llms.address import parse_address
from mmrag.llms.endpoint import open_llm, served_models
from mmrag.llms.failures import translated_errors
from mmrag.llms.replies import json_objects, without_reasoning
from mmrag.rerankers.remote import RemoteScorer

ANSWER = "The pump costs 1.234,56 EUR [1]."
ASKED = [ChatMessage(content="What does it cost?")]


@pytest.fixture
def server(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    server = ChatServer(ANSWER)
    yield server
    server.close()


def test_content_in_parts_and_without_a_role_is_the_text(server):
    server.mode = "parts"
    reply = open_llm("tiny", server.url).chat(ASKED)
    assert reply.message.content == ANSWER
    assert reply.message.role == "assistant"


async def test_content_in_parts_in_async(server):
    server.mode = "parts"
    reply = await open_llm("tiny", server.url).achat(ASKED)
    assert reply.message.content == ANSWER


async def test_content_in_parts_in_streams(server):
    server.mode = "parts"
    tokens = [reply.delta for reply in open_llm("tiny", server.url).stream_chat(ASKED)]
    assert "".join(filter(None, tokens)).strip() == ANSWER
    stream = await open_llm("tiny", server.url).astream_chat(ASKED)
    tokens = [reply.delta async for reply in stream]
    assert "".join(filter(None, tokens)).strip() == ANSWER


@pytest.mark.parametrize("stream", [False, True])
def test_an_error_with_status_200_is_an_error_with_its_message(server, stream):
    server.mode = "loading"
    llm = open_llm("tiny", server.url)
    llm.max_retries = 0
    with pytest.raises(EndpointError, match="model is loading"), translated_errors("tiny"):
        list(llm.stream_chat(ASKED)) if stream else llm.chat(ASKED)


def test_without_a_key_none_is_sent(server):
    open_llm("tiny", server.url).chat(ASKED)
    assert "Authorization" not in server.headers[0]
    open_llm("tiny", server.url, "sk-secret").chat(ASKED)
    assert server.headers[1]["Authorization"] == "Bearer sk-secret"


def test_a_reranker_at_the_same_server_gets_the_same_key(server):
    server.answer = "grade: 7"
    llm = open_llm("tiny", server.url, "sk-secret")
    scorer = RemoteScorer("tiny", llm.address, mode="words")
    assert scorer.judge([(Content("eyes"), Content("Eyes are covered."))]) == [0.7]
    assert server.headers[-1]["Authorization"] == "Bearer sk-secret"


def test_openai_itself_needs_a_key():
    with pytest.raises(ConfigError, match="OPENAI_API_KEY"):
        open_llm("gpt-4o")


def test_a_key_is_in_no_repr_dict_or_pickle(server, monkeypatch):
    llm = open_llm("tiny", server.url.replace("//", "//user:pass-word@"))
    keyed = open_llm("tiny", server.url, "sk-secret")
    for each in (llm, keyed):
        each.chat(ASKED)
        shown = [repr(each), str(each), str(each.to_dict()), each.model_dump_json()]
        shown.append(str(pickle.dumps(each)))
        assert not [text for text in shown if "secret" in text or "pass-word" in text]
    assert copy.copy(keyed).chat(ASKED).message.content == ANSWER
    assert server.headers[-1]["Authorization"] == "Bearer sk-secret"
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-the-worker")
    assert pickle.loads(pickle.dumps(keyed)).chat(ASKED).message.content == ANSWER
    assert server.headers[-1]["Authorization"] == "Bearer sk-of-the-worker"


def test_a_password_in_the_address_is_sent_and_not_shown(server, caplog):
    server.models[:] = [{"id": "silent"}]
    llm = open_llm(None, server.url.replace("//", "//user:p%40ss@"))
    llm.chat(ASKED)
    sent = base64.b64decode(server.headers[0]["Authorization"].removeprefix("Basic "))
    assert sent == b"user:p@ss"
    assert "user:" not in caplog.text
    server.close()
    with pytest.raises(EndpointError) as error:
        served_models("http://user:p%40ss@127.0.0.1:9/v1")
    assert "p%40ss" not in str(error.value)


def test_an_azure_address_keeps_its_version(server):
    server.mode = "azure"
    base = server.url.removesuffix("/v1") + "/openai/deployments/gpt?api-version=2024-06-01"
    assert open_llm("gpt", base, context_window=9000).chat(ASKED).message.content == ANSWER
    assert server.paths == ["/openai/deployments/gpt/chat/completions?api-version=2024-06-01"]
    headers = parse_address("https://x.openai.azure.com/openai/deployments/g", "k").headers
    assert headers == {"api-key": "k"}


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("http://h:1/v1", "http://h:1/v1"),
        (" http://h:1/v1/ ", "http://h:1/v1"),
        ("http://h:1/v1/chat/completions", "http://h:1/v1"),
        ("http://h:1/v1/models", "http://h:1/v1"),
        ("https://h", "https://h"),
        ("https://u:p@h/x?a=b#c", "https://h/x"),
    ],
)
def test_addresses_as_people_write_them(given, url):
    assert parse_address(given).url == url


@pytest.mark.parametrize("given", ["nonsense", "localhost:8000/v1", "ftp://h/v1", "http://", ""])
def test_what_is_no_address(given):
    with pytest.raises(ConfigError, match="is not a server address"):
        parse_address(given)


@pytest.mark.parametrize(
    ("said", "objects"),
    [
        ('```json\n{"query": "q"}\n```', [{"query": "q"}]),
        ("no braces", []),
        ("{broken", []),
        ("{not: json}", []),
        ('Here {it} is: {"a": {"b": 1}} and {"c": 2}.', [{"a": {"b": 1}}, {"c": 2}]),
        ('<think>{"a": 1}</think>{"b": 2}', [{"b": 2}]),
    ],
)
def test_json_is_found_in_what_models_say(said, objects):
    assert list(json_objects(said)) == objects


@pytest.mark.parametrize("said", ["{" * 200_000, '{"a":' * 100_000, "<think>" * 50_000])
def test_hostile_replies_take_little_time(said):
    started = time.process_time()
    assert list(json_objects(said)) == []
    without_reasoning(said + "</think>")
    assert time.process_time() - started < 10


def test_the_first_bytes_of_a_stream_are_not_held_back(server):
    """Only JSON is repaired: an event stream must not be read to its end first."""
    tokens = [reply.delta for reply in open_llm("tiny", server.url).stream_chat(ASKED)]
    assert "".join(filter(None, tokens)).strip() == ANSWER
    assert json.loads(json.dumps(server.requests[0]))["stream"]
