import base64
import io
import json

import pytest
from PIL import Image


def events_of(reply):
    """Names and data of the server-sent events of an answer."""
    assert reply.headers["content-type"].startswith("text/event-stream")
    blocks = [block.split("\n") for block in reply.text.strip().split("\n\n")]
    return [
        (name.removeprefix("event: "), json.loads(data.removeprefix("data: ")))
        for name, data in blocks
    ]


def png(colour="red", size=(8, 8)):
    stream = io.BytesIO()
    Image.new("RGB", size, colour).save(stream, "PNG")
    return stream.getvalue()


def test_what_is_served(client):
    plans, boilers = client.get("/api/collections").json()["collections"]
    assert (plans["name"], plans["files"], plans["pages"]) == ("plans", 1, 2)
    assert plans["embedder"] == "mmrag-nano"
    assert plans["llm"] is None
    assert boilers["name"] == "boilers"


def test_search_finds_the_page_and_says_where_it_can_be_seen(client):
    reply = client.post("/api/search", json={"query": "dental cleaning", "top_k": 1}).json()
    (hit,) = reply["hits"]
    assert (hit["name"], hit["page"], hit["kind"]) == ("plans.pdf", 2, "page")
    assert "Dental cleaning" in hit["text"]
    assert hit["view"].startswith("http://127.0.0.1:8321/#view?")
    picture = client.get(hit["image"])
    assert picture.headers["content-type"] == "image/png"
    assert Image.open(io.BytesIO(picture.content)).size == (1190, 1684)


def test_each_collection_is_searched_alone(client):
    found = client.post("/api/search", json={"query": "boiler", "collection": "boilers"}).json()
    assert {hit["name"] for hit in found["hits"]} == {"boilers.pdf"}
    found = client.post("/api/search", json={"query": "boiler"}).json()
    assert {hit["name"] for hit in found["hits"]} == {"plans.pdf"}


def test_filters(client):
    body = {"query": "eye dental", "pages": [2, None]}
    hits = client.post("/api/search", json=body).json()["hits"]
    assert {hit["page"] for hit in hits} == {2}
    body = {"query": "eye", "files": ["other.pdf"]}
    assert client.post("/api/search", json=body).json()["hits"] == []


def test_search_by_an_image(client):
    image = f"data:image/png;base64,{base64.b64encode(png()).decode()}"
    hits = client.post("/api/search", json={"image": image}).json()["hits"]
    assert {hit["page"] for hit in hits} == {1, 2}


@pytest.mark.parametrize(
    "body",
    [
        {"query": "  "},
        {"query": "x", "top_k": 0},
        {"query": "x", "topk": 3},
        {"query": "x", "pages": [0, 1]},
        {"image": "data:image/png,abc"},
        {"image": base64.b64encode(b"not an image").decode()},
        {"image": "/etc/passwd"},
        {"image": "http://127.0.0.1/image.png"},
    ],
)
def test_bad_searches_are_refused_in_the_form_of_openai(client, body):
    reply = client.post("/api/search", json=body)
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["message"]


def test_an_image_with_too_many_pixels_is_refused(make_client):
    client = make_client(max_image_pixels=100)
    image = base64.b64encode(png(size=(20, 20))).decode()
    reply = client.post("/api/search", json={"image": image})
    assert reply.status_code == 400
    assert "pixels" in reply.json()["error"]["message"]


def test_an_unknown_collection_is_404(client):
    reply = client.post("/api/search", json={"query": "x", "collection": "nothing"})
    assert reply.status_code == 404
    assert "plans, boilers" in reply.json()["error"]["message"]


def test_an_answer_streams_and_ends_with_its_evidence(client):
    reply = client.post("/api/ask", json={"query": "Who gets an eye examination a year?"})
    events = events_of(reply)
    assert [name for name, _ in events] == ["sources", "token", "answer"]
    answer = events[-1][1]
    assert answer["found"]
    assert "one eye examination" in answer["answer"]
    cited = [source for source in answer["sources"] if source["cited"]]
    assert (cited[0]["n"], cited[0]["page"]) == (1, 1)
    assert "eye examination" in cited[0]["quote"]
    assert cited[0]["boxes"]
    marked = client.get(cited[0]["image"])
    plain = client.get(cited[0]["image"].split("&mark=")[0])
    assert marked.content != plain.content


def test_an_answer_may_come_whole(client):
    body = {"query": "Who gets an eye examination a year?", "stream": False}
    answer = client.post("/api/ask", json=body).json()
    assert answer["question"] == body["query"]
    assert answer["sources"][0]["page"] == 1


def test_a_model_answers_word_by_word_and_its_claims_are_checked(make_client, chat_server):
    chat_server.answer = "The gold plan covers one eye examination a year [1]. It costs 90 [7]."
    client = make_client(llm=chat_server)
    events = events_of(client.post("/api/ask", json={"query": "What does gold cover?"}))
    words = [data["text"] for name, data in events if name == "token"]
    assert len(words) > 5
    assert "".join(words).strip() == chat_server.answer
    answer = events[-1][1]
    assert any("[7]" in problem for problem in answer["problems"])


def test_a_follow_up_is_rewritten_before_it_is_searched(make_client, chat_server):
    chat_server.answer = "dental cleaning for children"
    client = make_client(llm=chat_server)
    history = [
        {"role": "user", "content": "What is free?"},
        {"role": "assistant", "content": "Cleaning [1]."},
    ]
    body = {"query": "And for children?", "history": history}
    name, data = events_of(client.post("/api/ask", json=body))[0]
    assert (name, data["question"]) == ("sources", "dental cleaning for children")
    asked = chat_server.requests[0]["messages"][0]["content"]
    assert "user: What is free?\nassistant: Cleaning ." in asked.replace("Cleaning.", "Cleaning .")


def test_a_model_that_fails_at_once_is_502_and_later_an_event(make_client, chat_server):
    client = make_client(llm=chat_server)
    chat_server.mode = "deny"
    history = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    reply = client.post("/api/ask", json={"query": "And?", "history": history})
    assert reply.status_code == 502
    assert "API key" in reply.json()["error"]["message"]
    chat_server.mode, chat_server.answer = "cut", "The gold plan covers it"
    name, data = events_of(client.post("/api/ask", json={"query": "eyes"}))[-1]
    assert name == "error"
    assert data["error"]["code"] == "model_server_failed"


def test_health_readiness_and_figures(client):
    client.post("/api/search", json={"query": "eye"})
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/ready").json() == {"status": "ready"}
    figures = client.get("/metrics").text
    line = 'mmrag_http_requests_total{method="POST",route="/api/search",status="200"} 1.0'
    assert line in figures
    assert "mmrag_embed_batch_contents_count" in figures
    assert "mmrag_requests_waiting 0.0" in figures


def test_a_stopping_server_is_not_ready(client):
    client.app.state.server.stopping = True
    assert client.get("/ready").status_code == 503
    assert client.get("/health").status_code == 200


def test_unknown_paths_are_404_in_the_same_form(client):
    reply = client.get("/api/nothing")
    assert reply.status_code == 404
    assert reply.json()["error"]["message"] == "Not Found"


def test_an_error_of_ours_tells_nothing_of_its_cause(client, monkeypatch):
    def broken(_):
        raise RuntimeError("secret path")

    monkeypatch.setattr(client.libraries.get("plans"), "search", broken)
    reply = client.post("/api/search", json={"query": "eye"})
    assert reply.status_code == 500
    assert "secret" not in reply.text
