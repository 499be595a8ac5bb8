"""Tests of the remote embedder against a small server that speaks the protocol."""

import base64
import io
import pickle
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from embedding_server import DIM, Server, answer, answering, rows, vector_of
from PIL import Image

from mmrag import retries
from mmrag.content import Content, load_image
from mmrag.embedders.base import Embedder
from mmrag.embedders.remote import RemoteEmbedder
from mmrag.errors import ConfigError, ContentError, EndpointError
from mmrag.instructions import TASKS


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(retries, "_FIRST_PAUSE", 0.01)
    with Server() as served:
        yield served


@pytest.fixture
def embedder(server):
    return RemoteEmbedder("a-model", server.url, dim=DIM)


def image(color="red") -> Image.Image:
    return Image.new("RGB", (4, 3), color)


def expected(text: str) -> np.ndarray:
    return np.asarray(vector_of(text)) / 3


# --- what is sent, and what comes back --------------------------------------------------------


def test_is_an_embedder_and_normalises_what_the_server_gives(embedder):
    assert isinstance(embedder, Embedder)
    vectors = embedder.encode(["a", "b"])
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, [expected("a"), expected("b")], atol=1e-6)


def test_texts_go_as_input_in_batches_and_order_is_kept(server):
    embedder = RemoteEmbedder("a-model", server.url, dim=DIM, batch_size=3)
    texts = [f"text {i}" for i in range(8)]
    vectors = embedder.encode(texts)
    np.testing.assert_allclose(vectors, [expected(text) for text in texts], atol=1e-6)
    assert sorted(len(request["input"]) for request in server.requests) == [2, 3, 3]
    assert {request["model"] for request in server.requests} == {"a-model"}
    assert {request["path"] for request in server.requests} == {"/v1/embeddings"}


def test_answers_are_ordered_by_their_index(server, embedder):
    server.script = [lambda h, body: answer(h, 200, {"data": rows(body)[::-1]})]
    vectors = embedder.encode(["a", "b", "c"])
    np.testing.assert_allclose(vectors, [expected(text) for text in "abc"], atol=1e-6)


def test_image_goes_upright_and_lossless_as_a_chat_message(server, embedder, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = Image.effect_noise((9, 5), 50).convert("RGB")
    stored.save(tmp_path / "turned.png", exif=exif)
    embedder.encode([Content(text="a chart", image=tmp_path / "turned.png")])
    (message,) = server.requests[0]["messages"]
    image, text = message["content"]
    assert message["role"] == "user"
    assert text == {"type": "text", "text": "a chart"}
    head, _, body = image["image_url"]["url"].partition(",")
    assert head == "data:image/png;base64"
    sent = Image.open(io.BytesIO(base64.b64decode(body)))
    truth = load_image(tmp_path / "turned.png")
    assert np.array_equal(np.asarray(sent), np.asarray(truth))


def test_mixed_modalities_keep_their_order(server, embedder):
    mixed = ["a", image(), "b", Content(text="c", image=image()), image("blue")]
    together = embedder.encode(mixed)
    alone = np.concatenate([embedder.encode([item]) for item in mixed])
    np.testing.assert_array_equal(together, alone)
    assert len(np.unique(together, axis=0)) == 5
    assert [("input" in request) for request in server.requests[:4]].count(True) == 1


def test_instruction_is_written_before_the_text(server, embedder):
    embedder.encode(["plain"])
    embedder.encode(["why?"], instruction="page_for_question")
    embedder.encode([Content(text="own", instruction="Be brief.")], instruction="Not this.")
    embedder.encode([image()], instruction="Find it.")
    assert [request["input"] for request in server.requests[:3]] == [
        ["plain"],
        [f"Instruct: {TASKS['page_for_question']}\nQuery: why?"],
        ["Instruct: Be brief.\nQuery: own"],
    ]
    parts = server.requests[3]["messages"][0]["content"]
    assert [part["type"] for part in parts] == ["image_url", "text"]
    assert parts[1]["text"] == "Instruct: Find it.\nQuery:"


def test_braces_in_a_text_are_no_format(server, embedder):
    embedder.encode(["{instruction} {0}"], instruction="Find {it}.")
    assert server.requests[0]["input"] == ["Instruct: Find {it}.\nQuery: {instruction} {0}"]


def test_chat_sends_everything_as_messages_with_the_instruction_as_system_turn(server):
    embedder = RemoteEmbedder(
        "qwen",
        server.url,
        dim=DIM,
        chat=True,
        document_instruction="Represent the user's input.",
        extra_body={"add_generation_prompt": True},
    )
    embedder.encode(["document", image()])
    embedder.encode(["question"], instruction="Find it.")
    assert all("input" not in request for request in server.requests)
    assert all(request["add_generation_prompt"] is True for request in server.requests)
    systems = [request["messages"][0]["content"][0]["text"] for request in server.requests]
    assert systems == ["Represent the user's input."] * 2 + ["Find it."]
    users = [request["messages"][1]["content"] for request in server.requests]
    assert users[2] == [{"type": "text", "text": "question"}]
    assert [part["type"] for content in users[:2] for part in content] in (
        ["text", "image_url"],
        ["image_url", "text"],
    )


def test_matryoshka_prefix_is_cut_here_and_normalised(embedder):
    full, short = embedder.encode(["a"]), embedder.encode(["a"], dim=3)
    assert short.shape == (1, 3)
    np.testing.assert_allclose(short, full[:, :3] / np.linalg.norm(full[:, :3]), atol=1e-6)
    with pytest.raises(ConfigError, match="dim=9"):
        embedder.encode(["a"], dim=DIM + 1)


def test_nothing_to_embed_asks_nobody(server, embedder):
    assert embedder.encode([]).shape == (0, DIM)
    assert embedder.encode([], dim=2).shape == (0, 2)
    assert not server.requests


def test_empty_text_is_sent_as_it_is(server, embedder):
    assert embedder.encode([""]).shape == (1, DIM)
    assert server.requests[0]["input"] == [""]


def test_dimension_is_asked_for_when_it_is_not_given(server):
    assert RemoteEmbedder("a-model", server.url).dim == DIM
    assert len(server.requests) == 1


def test_requests_run_side_by_side_up_to_the_limit_over_all_threads(server):
    server.delay = 0.05
    embedder = RemoteEmbedder("m", server.url, dim=DIM, batch_size=1, concurrency=3)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(embedder.encode, [[f"{n} {i}" for i in range(6)] for n in range(2)]))
    assert server.most_busy == 3


# --- identity ---------------------------------------------------------------------------------


def test_fingerprint_knows_the_model_and_its_prompt_but_not_the_place():
    def made(model="m", url="http://a/v1", **settings):
        return RemoteEmbedder(model, url, dim=DIM, **settings).fingerprint

    assert made() == made(url="https://user:pass@b:8000/v1/", api_key="k", timeout=1.0)
    others = {
        made(),
        made("n"),
        made(chat=True),
        made(document_instruction="Represent it."),
        made(instruction_format="{instruction} {text}"),
        made(extra_body={"add_generation_prompt": True}),
    }
    assert len(others) == 6


def test_pickled_embedder_works(server, embedder):
    again = pickle.loads(pickle.dumps(embedder))
    np.testing.assert_array_equal(again.encode(["a"]), embedder.encode(["a"]))
    assert again.fingerprint == embedder.fingerprint
    assert len(server.requests) == 2


def test_importing_and_calling_it_needs_no_torch(server):
    code = (
        "import sys; from mmrag.embedders.remote import RemoteEmbedder\n"
        f"print(RemoteEmbedder('m', {server.url!r}).encode(['a', b'x'[:0] or 'b']).shape)\n"
        "assert not {'torch', 'transformers', 'llama_index'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"(2, {DIM})"


# --- what goes wrong --------------------------------------------------------------------------


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_busy_or_broken_answers_are_tried_again(server, embedder, status):
    server.script = [answering(status, {"error": "busy"})] * 3
    assert embedder.encode(["a"]).shape == (1, DIM)
    assert len(server.requests) == 4


def test_pause_that_the_server_asks_for_is_kept(server, embedder):
    server.script = [answering(429, {}, Retry_After="0.3")]
    started = time.monotonic()
    embedder.encode(["a"])
    assert time.monotonic() - started >= 0.3


def test_cut_connection_is_tried_again(server, embedder):
    def cut(handler, _):
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        handler.wfile.write(b'{"data": [')
        handler.wfile.flush()
        handler.connection.close()

    server.script = [cut]
    assert embedder.encode(["a"]).shape == (1, DIM)


def test_giving_up_says_where_what_and_how_often(server):
    embedder = RemoteEmbedder("a-model", server.url, dim=DIM, retries=2)
    server.script = [answering(503, {"error": "loading"})] * 3
    with pytest.raises(EndpointError) as error:
        embedder.encode(["a"])
    for part in (server.url, "a-model", "503", "loading", "3 times", "item 0"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("status", "hint"), [(400, "maximum context"), (401, "api_key"), (404, "/v1"), (307, "/v1")]
)
def test_refusal_is_not_tried_again(server, embedder, status, hint):
    server.script = [answering(status, {"message": "maximum context length is 512 tokens"})]
    with pytest.raises(EndpointError, match=hint):
        embedder.encode(["a"])
    assert len(server.requests) == 1


def test_nobody_listening_is_an_endpoint_error(monkeypatch):
    monkeypatch.setattr(retries, "_FIRST_PAUSE", 0.01)
    with pytest.raises(EndpointError, match="cannot be reached"):
        RemoteEmbedder("m", "http://127.0.0.1:9/v1", retries=1)


def test_hanging_server_ends_with_the_timeout(server):
    server.delay = 1.0
    embedder = RemoteEmbedder("m", server.url, dim=DIM, timeout=0.1, retries=1)
    with pytest.raises(EndpointError, match="ReadTimeout"):
        embedder.encode(["a"])
    assert len(server.requests) == 2


def test_trickling_answer_ends_with_the_timeout(server):
    def trickle(handler, _):
        handler.send_response(200)
        handler.send_header("Content-Length", "1000000")
        handler.end_headers()
        try:
            for _ in range(40):
                handler.wfile.write(b" ")
                handler.wfile.flush()
                time.sleep(0.05)
        except OSError:
            pass

    server.script = [trickle]
    embedder = RemoteEmbedder("m", server.url, dim=DIM, timeout=0.2, retries=0)
    with pytest.raises(EndpointError, match="too slowly"):
        embedder.encode(["a"])


def test_deadline_ends_all_tries(server):
    server.script = [answering(503, {}, Retry_After="30")] * 9
    embedder = RemoteEmbedder("m", server.url, dim=DIM, deadline=0.5, retries=9)
    started = time.monotonic()
    with pytest.raises(EndpointError, match="503"):
        embedder.encode(["a"])
    assert time.monotonic() - started < 5


def test_deadline_covers_requests_that_wait_for_their_turn(server):
    server.delay = 0.2
    embedder = RemoteEmbedder("m", server.url, dim=DIM, deadline=0.5, batch_size=1, concurrency=1)
    with pytest.raises(EndpointError):
        embedder.encode([str(i) for i in range(20)])
    assert len(server.requests) < 5


def test_one_failure_stops_the_rest(server):
    server.script = [answering(400, {"message": "no"})]
    embedder = RemoteEmbedder("m", server.url, dim=DIM, batch_size=1, concurrency=1)
    with pytest.raises(EndpointError, match="item 0"):
        embedder.encode([str(i) for i in range(50)])
    assert len(server.requests) < 5


def test_one_failure_ends_the_pauses_of_the_others(server):
    def refuse_last(handler, _):
        time.sleep(0.1)
        answer(handler, 400, {})

    server.script = [answering(503, {}, Retry_After="0.5"), refuse_last]
    embedder = RemoteEmbedder("m", server.url, dim=DIM, batch_size=1, concurrency=2)
    with pytest.raises(EndpointError, match="400"):
        embedder.encode(["a", "b"])
    assert len(server.requests) == 2


GARBAGE = [
    b"<html>proxy</html>",
    b"\xff\xfe",
    b"",
    [],
    {},
    {"data": None},
    {"data": [None]},
    {"data": [{"index": 0}]},
    {"data": [{"index": 0, "embedding": "AAAA"}]},
    {"data": [{"index": 0, "embedding": [1, "x"]}]},
    {"data": [{"index": 0, "embedding": [[1.0] * DIM]}]},
    {"data": [{"index": 0, "embedding": []}]},
    {"data": [{"index": 0, "embedding": [0.0] * DIM}]},
    {"data": [{"index": 0, "embedding": [float("nan")] * DIM}]},
    {"data": [{"index": 1, "embedding": [1.0] * DIM}]},
    {"data": [{"index": None, "embedding": [1.0] * DIM}]},
    {"data": []},
    {"data": [{"index": i, "embedding": [1.0] * DIM} for i in range(2)]},
]


@pytest.mark.parametrize("garbage", GARBAGE, ids=str)
def test_garbage_is_an_endpoint_error(server, embedder, garbage):
    server.script = [answering(200, garbage)]
    with pytest.raises(EndpointError, match="answers"):
        embedder.encode(["a"])


def test_wrong_number_of_vectors_is_told(server, embedder):
    server.script = [lambda h, body: answer(h, 200, {"data": rows(body)[:-1]})]
    with pytest.raises(EndpointError, match="2 vectors where 3 were asked"):
        embedder.encode(["a", "b", "c"])


def test_wrong_dimension_is_told(server):
    with pytest.raises(EndpointError, match="8 dimensions where 9"):
        RemoteEmbedder("m", server.url, dim=DIM + 1).encode(["a"])


def test_vectors_of_different_lengths_are_told(server, embedder):
    uneven = [{"index": i, "embedding": [1.0] * (DIM + i)} for i in range(2)]
    server.script = [answering(200, {"data": uneven})]
    with pytest.raises(EndpointError, match="different shapes"):
        embedder.encode(["a", "b"])


def test_broken_image_is_a_content_error_with_its_place(server, embedder):
    with pytest.raises(ContentError, match="item 2"):
        embedder.encode(["a", image(), b"no picture"])


def test_modality_that_the_server_lacks_is_refused_before_sending(server):
    embedder = RemoteEmbedder("m", server.url, dim=DIM, modalities=frozenset({"text"}))
    with pytest.raises(ContentError, match="item 1: m cannot embed image, only text"):
        embedder.encode(["a", image()])
    assert not server.requests


# --- secrets ----------------------------------------------------------------------------------


def test_key_is_sent_as_bearer_and_shown_nowhere(server):
    embedder = RemoteEmbedder("m", server.url, dim=DIM, api_key="sk-secret\n")
    echo = {"message": "Incorrect API key provided: sk-secret"}
    server.script = [answering(401, echo)]
    with pytest.raises(EndpointError) as error:
        embedder.encode(["a"])
    assert server.headers[0]["Authorization"] == "Bearer sk-secret"
    assert "sk-secret" not in str(error.value)
    assert "sk-secret" not in repr(embedder)


def test_password_in_the_address_is_not_shown(server):
    url = server.url.replace("http://", "http://user:hunter2@")
    embedder = RemoteEmbedder("m", url, dim=DIM)
    server.script = [answering(400, {})]
    with pytest.raises(EndpointError) as error:
        embedder.encode(["a"])
    assert "hunter2" not in str(error.value) + repr(embedder)


@pytest.mark.parametrize(
    "wrong",
    [
        {"base_url": "localhost:8000/v1"},
        {"base_url": "http://host:port/v1"},
        {"instruction_format": "{text}"},
        {"batch_size": 0},
        {"concurrency": 0},
        {"timeout": 0},
        {"retries": -1},
        {"api_key": "schlüssel"},
        {"document_instruction": "page_for_questions"},
    ],
)
def test_wrong_options_are_refused(wrong):
    with pytest.raises(ConfigError):
        RemoteEmbedder("m", **{"base_url": "http://a/v1", "dim": DIM, **wrong})
