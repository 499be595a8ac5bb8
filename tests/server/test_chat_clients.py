"""Requests of Open WebUI and LibreChat, and what these clients read in the replies.

Their forms are facts of their sources and docs, as read on 2026-11-28 (GitHub keeps the commits of
forks with the others, and these may be some):

- Open WebUI (github.com/open-webui/open-webui, backend/open_webui): routers/openai.py at 004a45f
  (chats, models, headers), routers/tasks.py at 074d488 (titles, tags, follow-ups),
  utils/middleware.py at 000032e (how a stream is read).
- LibreChat: librechat.ai/docs/configuration/librechat_yaml/object_structure/default_params (chats);
  github.com/danny-avila/LibreChat, packages/api/src/endpoints/models.ts at 003bf57 (models);
  github.com/danny-avila/agents, src/utils/title.ts at d8751a6 (titles).
"""

import base64
import io
import json

import httpx
import numpy as np
import pytest
from fakes import FakeEmbedder
from PIL import Image

KEY = "a-long-random-key"
QUESTION = "Who gets an eye examination a year?"
# Open WebUI adds who asks, where ENABLE_FORWARD_USER_INFO_HEADERS is set.
HEADERS = {
    "Authorization": f"Bearer {KEY}",
    "X-OpenWebUI-User-Name": "Ann%20Lee",
    "X-OpenWebUI-User-Id": "7c1d",
    "X-OpenWebUI-User-Email": "ann@example.org",
    "X-OpenWebUI-User-Role": "user",
    "X-OpenWebUI-Chat-Id": "chat-1",
}
OPEN_WEBUI = {
    "stream": True,
    "model": "plans",
    "stream_options": {"include_usage": True},
    # Set by an administrator for the model; the answer's prompt is fixed.
    "temperature": 0.8,
    "top_p": 0.9,
    "max_tokens": 512,
    "seed": 3,
    "stop": ["###"],
    "reasoning_effort": "low",
    "logit_bias": {"7": -100},
    # Tools and features of a chat; an answer from a collection calls none.
    "tools": [{"type": "function", "function": {"name": "clock", "parameters": {}}}],
    "tool_choice": "auto",
    "features": {"web_search": False},
    "chat_id": "chat-1",
    "session_id": "s-1",
    "metadata": {"message_id": "m-1"},
}
LIBRECHAT = {
    "model": "plans",
    "user": "65f0c0ffee",
    "stream": True,
    "stream_options": {"include_usage": True},
    "temperature": 1,
    "top_p": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0,
}


@pytest.fixture
def url(listening):
    return listening(api_keys=(KEY,))


def said(role, *parts):
    """A message of one text, or of parts."""
    return {"role": role, "content": parts[0] if len(parts) == 1 else list(parts)}


def text_part(text):
    return {"type": "text", "text": text}


def image_part(**more):
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(stream, "PNG")
    encoded = base64.b64encode(stream.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}", **more}}


def post(url, body, messages):
    return httpx.post(
        f"{url}/v1/chat/completions", json={**body, "messages": messages}, headers=HEADERS
    )


def read_stream(reply):
    """What both clients take from a stream: text, the sources to show, the end, the usage."""
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in reply.text.split("\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines.pop() == "data: [DONE]"
    text, sources, ends, usage = "", [], [], None
    for chunk in (json.loads(line.removeprefix("data: ")) for line in lines):
        assert chunk["object"] == "chat.completion.chunk"
        assert chunk["model"] == "plans"
        assert not chunk.get("error")
        usage = chunk.get("usage") or usage
        for choice in chunk["choices"]:
            text += choice["delta"].get("content") or ""
            # Open WebUI shows each as a source beside the answer, by its title.
            for annotation in choice["delta"].get("annotations", []):
                assert annotation["type"] == "url_citation"
                sources.append(annotation["url_citation"])
            ends.append(choice["finish_reason"])
    assert [end for end in ends if end] == ["stop"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] > 0
    return text, sources


@pytest.mark.parametrize("headers", [HEADERS, {"Authorization": f"Bearer {KEY}"}])
def test_both_list_the_models_with_their_key(url, headers):
    listed = httpx.get(f"{url}/v1/models", headers=headers).json()
    assert listed["object"] == "list"
    assert [model["id"] for model in listed["data"]][:2] == ["plans", "boilers"]
    assert all(model["owned_by"] and isinstance(model["created"], int) for model in listed["data"])
    refused = httpx.get(f"{url}/v1/models", headers={"Authorization": "Bearer wrong"})
    assert refused.status_code == 401
    assert "key" in refused.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "messages"),
    [
        (OPEN_WEBUI, [said("system", "User Context:\n\n"), said("user", QUESTION)]),
        (OPEN_WEBUI, [said("user", text_part(QUESTION), image_part())]),
        (LIBRECHAT, [said("system", "You are helpful."), said("user", QUESTION)]),
        (LIBRECHAT, [{"role": "user", "content": [text_part(QUESTION)]}]),
        (LIBRECHAT, [said("user", text_part(QUESTION), image_part(detail="auto"))]),
    ],
)
def test_a_question_is_answered_with_links_and_sources(url, body, messages):
    text, sources = read_stream(post(url, body, messages))
    assert "eye examination" in text
    assert f"[[1]]({url}/#view?collection=plans&file=" in text
    assert sources[0]["title"] == "plans.pdf, page 1"
    assert sources[0]["url"].startswith(f"{url}/#view?collection=plans&file=")


@pytest.mark.parametrize("body", [OPEN_WEBUI, LIBRECHAT])
def test_a_conversation_with_an_image_goes_on(listening, chat_server, body):
    chat_server.answer = "one eye examination a year for the family [1]"
    url = listening(llm=chat_server, api_keys=(KEY,))
    first = [said("user", text_part("What is this?"), image_part())]
    text, _ = read_stream(post(url, body, first))
    chat_server.requests.clear()
    # Open WebUI sends no content with an answer that was stopped before its first word.
    stopped = [said("user", "Sorry?"), {"role": "assistant", "content": None}]
    name = {"name": "mmrag"}  # LibreChat adds the name of a preset
    messages = [*first, said("assistant", text) | name, *stopped, said("user", "And the family?")]
    assert "family" in read_stream(post(url, body, messages))[0]
    rewriting = chat_server.requests[0]["messages"][0]["content"]
    assert "one eye examination a year" in rewriting and "http" not in rewriting


def test_what_they_show_of_a_model_that_is_no_collection(url):
    """Both list embedders among the models, and a user may choose one."""
    body = {**OPEN_WEBUI, "model": "mmrag-nano"}
    reply = post(url, body, [said("user", QUESTION)])
    assert reply.status_code == 404
    assert reply.json()["error"]["message"].endswith("use plans, boilers.")


CHAT = "USER: Eyes?\nASSISTANT: One examination a year."
TASKS = {
    "title": "Generate a concise title of the chat.",
    "tags": "Generate one to three tags.",
    "follow-ups": "Suggest questions that the user may ask next.",
    "queries": "Decide whether a search of the web is needed.",
}


def task(what):
    """A prompt of Open WebUI's, in the form that all of them have."""
    history = f"### Chat History:\n<chat_history>\n{CHAT}\n</chat_history>"
    return f"### Task:\n{what}\n### Output:\nJSON format\n{history}"


LIBRECHAT_TITLE = (
    "Provide a concise, 5-word-or-less title for the conversation, using title case. "
    f"Only return the title itself.\n\nConversation:\n{CHAT}"
)
# Neither streams a title; Open WebUI bounds it.
TITLE = {"model": "plans", "stream": False, "max_completion_tokens": 1000}
PROMPTS = [*map(task, TASKS.values()), LIBRECHAT_TITLE]


@pytest.mark.parametrize("prompt", PROMPTS, ids=[*TASKS, "librechat-title"])
def test_their_own_prompts_go_to_the_model_unsearched(listening, chat_server, prompt):
    chat_server.answer = '{"title": "Eye plans"}'
    url = listening(llm=chat_server, api_keys=(KEY,))
    reply = post(url, TITLE, [said("user", prompt)]).json()
    (choice,) = reply["choices"]
    assert choice["message"]["content"] == chat_server.answer
    assert not choice["message"]["annotations"]
    (sent,) = chat_server.requests
    assert sent["messages"] == [said("user", prompt)]


@pytest.mark.parametrize("prompt", PROMPTS, ids=[*TASKS, "librechat-title"])
def test_without_a_model_their_own_prompts_get_an_empty_reply(url, prompt):
    """Open WebUI then takes the question as the title; LibreChat gives none."""
    reply = post(url, TITLE, [said("user", prompt)]).json()
    assert reply["choices"][0]["message"]["content"] == ""


ATTACHED = (
    "### Task:\nRespond to the user query using the provided context.\n"
    '<context>\n<source id="1">The pump is red.</source>\n</context>\n\nWhat colour is it?'
)


def test_documents_attached_in_open_webui_are_read_by_the_model(listening, chat_server):
    chat_server.answer = "Red [1]"
    url = listening(llm=chat_server, api_keys=(KEY,))
    text, sources = read_stream(post(url, OPEN_WEBUI, [said("user", ATTACHED)]))
    # Its marks are numbers of Open WebUI's own sources, and stay as they are.
    assert (text, sources) == ("Red [1]", [])


def test_without_a_model_attached_documents_are_an_error_and_no_empty_answer(url):
    reply = post(url, OPEN_WEBUI, [said("user", ATTACHED)])
    assert reply.status_code == 400
    assert "mmrag serve --llm" in reply.json()["error"]["message"]


def test_embeddings_for_the_documents_of_open_webui(url):
    body = {"input": ["an eye", "a tooth"], "model": "mmrag-nano"}
    rows = httpx.post(f"{url}/v1/embeddings", json=body, headers=HEADERS).json()["data"]
    vectors = np.array([row["embedding"] for row in rows])
    assert np.allclose(vectors, FakeEmbedder(dim=64).encode(["an eye", "a tooth"]), atol=1e-6)


def test_open_webui_reranks_by_it(url):
    documents = ["a boiler exploded", "one eye examination a year", "nothing of the kind"]
    body = {"model": "mmrag-nano", "query": "eye", "documents": documents, "top_n": 3}
    data = httpx.post(f"{url}/v1/rerank", json=body, headers=HEADERS).json()
    by_place = sorted(data["results"], key=lambda row: row["index"])
    assert [row["index"] for row in by_place] == [0, 1, 2]
    assert all(isinstance(row["relevance_score"], float) for row in by_place)
