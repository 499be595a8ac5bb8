"""The official clients over a real socket."""

import base64
import io
import time

import httpx
import numpy as np
import openai
import pytest
from fakes import FakeEmbedder
from judge_server import JudgeServer
from PIL import Image

from mmrag.content import Content
from mmrag.rerankers import load_scorer
from mmrag.rerankers.postprocessor import MLLMReranker
from mmrag.server.markdown import Linker, closing, url_citations, without_links


@pytest.fixture
def url(listening):
    return listening()


def client_of(url, key="none"):
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)


def data_url(colour="red"):
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(stream, "PNG")
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"


QUESTION = [{"role": "user", "content": "Who gets an eye examination a year?"}]


def test_models_are_collections_and_embedders(url):
    client = client_of(url)
    assert [model.id for model in client.models.list()] == ["plans", "boilers", "mmrag-nano"]
    assert client.models.retrieve("plans").owned_by == "mmrag"
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("gpt-5")
    assert error.value.code == "model_not_found"


def test_a_completion_cites_by_links_and_annotations(url):
    reply = client_of(url).chat.completions.create(model="plans", messages=QUESTION)
    message = reply.choices[0].message
    assert reply.choices[0].finish_reason == "stop"
    assert f"[[1]]({url}/#view?collection=plans&file=" in message.content
    assert "**Sources**" in message.content
    assert reply.usage.total_tokens > 0
    cited = message.annotations[0].url_citation
    assert message.content[cited.start_index : cited.end_index] == f"[[1]]({cited.url})"
    assert cited.title == "plans.pdf, page 1"
    assert "mark=" in cited.url
    assert reply.model_extra["mmrag"]["sources"][0]["page"] == 1


def test_a_stream_says_the_same(listening, chat_server):
    chat_server.answer = "The gold plan covers one eye examination a year [1], see also [2]."
    url = listening(llm=chat_server)
    client = client_of(url)
    whole = client.chat.completions.create(model="plans", messages=QUESTION)
    stream = client.chat.completions.create(
        model="plans", messages=QUESTION, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert len(chunks) > 8
    noted = [
        c.choices[0].delta
        for c in chunks
        if c.choices and "annotations" in (c.choices[0].delta.model_extra or {})
    ]
    (first, *_) = noted[0].model_extra["annotations"]
    place = first["url_citation"]
    assert text[place["start_index"] : place["end_index"]].startswith("[[1]](")
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage.completion_tokens > 0


async def test_the_async_client_streams_too(url):
    client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    stream = await client.chat.completions.create(model="plans", messages=QUESTION, stream=True)
    text = "".join([c.choices[0].delta.content or "" async for c in stream])
    assert "eye examination" in text


def test_a_conversation_comes_back_without_its_links(listening, chat_server):
    chat_server.answer = "eye examination of the family"
    client = client_of(listening(llm=chat_server))
    said = "Gold [[1]](http://x/#view?a=1).\n\n**Sources**\n\n- \\[1\\] [a.pdf](http://x)"
    history = [*QUESTION, {"role": "assistant", "content": said}]
    follow = {"role": "user", "content": "And the family?"}
    client.chat.completions.create(model="plans", messages=[*history, follow])
    prompt = chat_server.requests[0]["messages"][0]["content"]
    assert "http" not in prompt and "Sources" not in prompt
    assert "assistant: Gold" in prompt


def test_a_question_may_be_an_image(url):
    parts = [
        {"type": "text", "text": "Where is this?"},
        {"type": "image_url", "image_url": {"url": data_url()}},
    ]
    messages = [{"role": "user", "content": parts}]
    reply = client_of(url).chat.completions.create(model="plans", messages=messages)
    assert reply.choices[0].message.content


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "assistant", "content": "Hello"}],
        [{"role": "user", "content": " "}],
        [{"role": "user", "content": [{"type": "file", "file": {"file_id": "x"}}]}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "/etc/passwd"}}]}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/y"}}]}],
    ],
)
def test_bad_messages_are_400(url, messages):
    with pytest.raises(openai.BadRequestError):
        client_of(url).chat.completions.create(model="plans", messages=messages)


def test_errors_are_those_that_the_client_knows(listening, chat_server):
    url = listening(api_keys=("a-long-random-key",), llm=chat_server)
    with pytest.raises(openai.AuthenticationError):
        client_of(url).models.list()
    client = client_of(url, "a-long-random-key")
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="other", messages=QUESTION)
    chat_server.mode = "deny"
    with pytest.raises(openai.InternalServerError) as error:
        client.chat.completions.create(model="plans", messages=QUESTION, stream=True)
    assert error.value.status_code == 502
    chat_server.mode, chat_server.answer = "cut", "The gold plan"
    stream = client.chat.completions.create(model="plans", messages=QUESTION, stream=True)
    with pytest.raises(openai.APIError, match="broke off"):
        list(stream)


def test_embeddings_of_texts(url):
    client = client_of(url)
    reply = client.embeddings.create(model="mmrag-nano", input=["an eye", "a tooth"])
    vectors = np.array([row.embedding for row in reply.data], dtype=np.float32)
    assert np.allclose(vectors, FakeEmbedder(dim=64).encode(["an eye", "a tooth"]), atol=1e-6)
    short = client.embeddings.create(
        model="mmrag-nano", input="an eye", dimensions=16, encoding_format="float"
    )
    expected = FakeEmbedder(dim=64).encode(["an eye"], dim=16)[0]
    assert np.allclose(short.data[0].embedding, expected, atol=1e-6)
    assert reply.usage.prompt_tokens > 0


def test_embeddings_of_images_alone_with_text_and_as_messages(url):
    items = [{"image": data_url()}, {"image": data_url(), "text": "red"}, {"text": "red"}]
    body = {"model": "mmrag-nano", "input": items}
    rows = httpx.post(f"{url}/v1/embeddings", json=body).json()["data"]
    vectors = np.array([row["embedding"] for row in rows])
    red = Image.new("RGB", (8, 8), "red")
    assert np.allclose(vectors[0], FakeEmbedder(dim=64).encode([red])[0], atol=1e-6)
    assert np.allclose(vectors[2], FakeEmbedder(dim=64).encode(["red"])[0], atol=1e-6)
    parts = [{"type": "image_url", "image_url": {"url": data_url()}}]
    body = {"model": "mmrag-nano", "messages": [{"role": "user", "content": parts}]}
    (row,) = httpx.post(f"{url}/v1/embeddings", json=body).json()["data"]
    assert np.allclose(row["embedding"], vectors[0], atol=1e-6)


def test_our_own_remote_embedder_reads_it(url):
    from mmrag.content import Content
    from mmrag.embedders.remote import RemoteEmbedder

    remote = RemoteEmbedder("mmrag-nano", f"{url}/v1")
    image = Image.new("RGB", (8, 8), "blue")
    contents = [Content("a text"), Content(image=image), Content("both", image)]
    assert np.allclose(remote.encode(contents), FakeEmbedder(dim=64).encode(contents), atol=1e-5)


@pytest.mark.parametrize(
    "body",
    [
        {"input": []},
        {"input": [1, 2, 3]},
        {"input": "a", "dimensions": 65},
        {"input": "a", "messages": [{"role": "user", "content": "a"}]},
        {},
        {"input": [{}]},
        {"input": [{"image": "/etc/passwd"}]},
    ],
)
def test_embeddings_that_are_refused(url, body):
    reply = httpx.post(f"{url}/v1/embeddings", json={"model": "mmrag-nano", **body})
    assert reply.status_code == 400


def test_the_instruction_of_a_query_is_passed_on(make_client):
    client = make_client()
    inner = client.libraries.embedder("mmrag-nano")._embedder
    for extra in ({"input_type": "query"}, {"instruction": "Find a poem."}, {}):
        client.post("/v1/embeddings", json={"model": "mmrag-nano", "input": "x", **extra})
    tasks = [call[0].instruction for call in inner.calls[-3:]]
    assert tasks == ["page_for_question", "Find a poem.", None]


DOCUMENTS = ["a boiler exploded", "one eye examination a year", "nothing of the kind"]


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank"])
def test_reranking_by_the_embedder(url, path):
    body = {"model": "mmrag-nano", "query": "eye examination", "documents": DOCUMENTS, "top_n": 2}
    reply = httpx.post(f"{url}{path}", json=body).json()
    assert reply["results"][0]["index"] == 1
    assert len(reply["results"]) == 2
    assert all(0 <= row["relevance_score"] <= 1 for row in reply["results"])
    assert reply["results"][0]["document"]["text"] == DOCUMENTS[1]


def test_reranking_by_the_reranker_that_is_loaded(listening):
    judge = JudgeServer(lambda text: 0.9 if "examination" in text else 0.1)
    try:
        reranker = MLLMReranker("judge", base_url=judge.url)
        url = listening(rerankers=[reranker])
        ids = [row["id"] for row in httpx.get(f"{url}/v1/models").json()["data"]]
        assert ids[-1] == "judge"
        body = {"query": "eye", "documents": [*DOCUMENTS, {"text": "an examination"}]}
        reply = httpx.post(f"{url}/v1/rerank", json=body).json()
        assert reply["model"] == "judge"
        assert {row["index"] for row in reply["results"][:2]} == {1, 3}
    finally:
        judge.close()


def test_a_rerank_endpoint_of_another_mmrag(url):
    """What asks endpoints in Jina's form reads this one, with images too."""
    scorer = load_scorer("mmrag-nano", base_url=f"{url}/v1/rerank", images=True)
    documents = [*map(Content, DOCUMENTS), Content(image=Image.new("RGB", (60, 40), "red"))]
    scores = scorer.judge([(Content("eye examination"), each) for each in documents])
    assert all(isinstance(score, float) for score in scores)
    assert scores.index(max(scores)) == 1


def test_too_many_requests_are_told_when_to_come_back(listening, chat_server):
    chat_server.mode, chat_server.answer = "stall", "The gold"
    url = listening(llm=chat_server, slots=1, waiting=0)
    body = {"model": "plans", "messages": QUESTION, "stream": True}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=20) as first:
        lines = first.iter_lines()  # kept: its end would close the connection
        next(lines)
        refused = httpx.post(f"{url}/v1/chat/completions", json=body)
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        with pytest.raises(openai.RateLimitError):
            client_of(url).chat.completions.create(model="plans", messages=QUESTION)
        assert httpx.get(f"{url}/ready").status_code == 503
    chat_server.closed.set()  # a reader that leaves frees the slot
    end = time.monotonic() + 10
    while httpx.get(f"{url}/ready").status_code != 200 and time.monotonic() < end:
        time.sleep(0.05)
    assert httpx.get(f"{url}/ready").status_code == 200


LINKS = {1: "http://h/a", 2: "http://h/b"}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("So [1].", "So [[1]](http://h/a)."),
        (
            "So [1, 2] and [2][1]",
            "So [[1]](http://h/a)[[2]](http://h/b) and [[2]](http://h/b)[[1]](http://h/a)",
        ),
        ("No [7] here, [see] that [", "No [7] here, [see] that ["),
        ("Wow! ![x](http://evil/p.png) <b>", "Wow! &#33;[x](http://evil/p.png) &lt;b>"),
        ("In 2020 [1]", "In 2020 [[1]](http://h/a)"),
    ],
)
def test_marks_become_links_wherever_a_stream_is_cut(text, shown):
    for size in (1, 2, 3, 5, 100):
        linker = Linker(LINKS)
        pieces = [text[at : at + size] for at in range(0, len(text), size)]
        made = "".join(linker.add(piece) for piece in pieces) + linker.end()
        assert made == shown, size
        for cited in linker.citations:
            assert made[cited.start : cited.end] == f"[[{cited.n}]]({LINKS[cited.n]})"
    assert without_links(shown) == text or "7" in text or "!" in text or ", 2" in text


def test_what_stands_below_an_answer_is_escaped():
    source = {
        "n": 1,
        "cited": True,
        "quote": "a [b](c) <i>",
        "name": "x_[y].pdf",
        "page": 2,
        "view": "http://h/#view?a=b",
    }
    answer = {"found": True, "sources": [source], "problems": ["no *number* 5"]}
    text = closing(answer)
    assert r"[x\_\[y\].pdf, page 2](http://h/#view?a=b)" in text
    assert r"\[b\]" in text and r"\<i\>" in text
    assert r"no \*number\* 5" in text
    assert closing({**answer, "found": False, "problems": []}) == ""
    assert url_citations([], [source]) == []
