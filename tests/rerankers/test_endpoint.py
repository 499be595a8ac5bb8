"""Rerank endpoints in Jina's and Cohere's form, against a stand-in server of both."""

import re

import pytest
from fakes import make_node
from llama_index.core.schema import NodeWithScore
from PIL import Image
from rerank_server import RerankServer

from mmrag import MLLMReranker
from mmrag.content import Content
from mmrag.errors import ConfigError, ContentError, EndpointError
from mmrag.rerankers import load_scorer
from mmrag.rerankers.base import DeadlineError
from mmrag.rerankers.endpoint import RerankEndpoint

KEY = "sk-very-secret"


def worth(query, document):
    """The number that a document states of itself; without one it is worth a half."""
    found = re.search(r"-?\d+\.\d+", document if isinstance(document, str) else "")
    return float(found[0]) if found else 0.5


def pairs(*worths, query="Which?"):
    return [(Content(query), Content(f"worth {worth}")) for worth in worths]


def endpoint(server, **options):
    return load_scorer("judge", base_url=server.url, **({"retries": 0, "timeout": 5.0} | options))


@pytest.mark.parametrize("form", ["jina", "cohere"])
def test_all_documents_of_a_query_are_scored_in_one_request(form):
    with RerankServer(worth, form=form, key=KEY) as server:
        scorer = endpoint(server, api_key=f"{KEY}\n")
        assert isinstance(scorer, RerankEndpoint)
        outcomes = scorer.judge([*pairs(0.2, 0.9), *pairs(0.4, query="What?"), *pairs(0.7)])
    assert outcomes == [0.2, 0.9, 0.4, 0.7]
    assert [(body["query"], len(body["documents"])) for body in server.requests] == [
        ("Which?", 3),
        ("What?", 1),
    ]


def test_reranks_nodes():
    texts = ["worth 0.2", "worth 0.9", "worth 0.4"]
    hits = [NodeWithScore(node=make_node(text, page=n), score=0.1) for n, text in enumerate(texts)]
    with RerankServer(worth) as server:
        reranker = MLLMReranker("judge", base_url=server.url, top_n=2)
        ranked = reranker.postprocess_nodes(hits, query_str="Which?")
    assert [hit.rerank_score for hit in ranked] == [0.9, 0.4]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again(status):
    with RerankServer(worth, script=[status]) as server:
        assert endpoint(server, retries=1).judge(pairs(0.3)) == [0.3]
    assert len(server.requests) == 2


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ([401], r"answers 401: .*check api_key"),
        ([404], r"answers 404: .*ends in /rerank"),
        ([500] * 2, r"answers 500: .*tried 2 times"),
        ([429] * 2, r"answers 429: .*tried 2 times"),
        (["hang"] * 2, r"cannot be reached \(ReadTimeout"),
        ([b"<html>"], r"answers nonsense.*<html>"),
        ([b'{"data": []}'], r"answers nonsense"),
        ([lambda answer: {"results": answer["results"][:1]}], "1 scores where 2 were asked for"),
        ([lambda answer: {"results": answer["results"][:1] * 2}], "2 scores where 2 were asked"),
        ([b'{"results": [{"index": 0, "relevance_score": NaN}]}'], "1 scores where 2"),
        ([b'{"results": [{"index": 0}, {"index": 1}]}'], "answers nonsense"),
    ],
)
def test_what_a_server_does_wrong_is_said(script, message):
    timeout = 0.3 if "hang" in script else 20.0
    with RerankServer(worth, script=script) as server:
        outcomes = endpoint(server, retries=1, timeout=timeout).judge(pairs(0.2, 0.9))
    for outcome in outcomes:
        assert isinstance(outcome, EndpointError)
        assert re.search(message, str(outcome)), str(outcome)


def test_the_key_is_never_shown():
    with RerankServer(worth, key="another") as server:
        scorer = endpoint(server, api_key=KEY)
        (refused,) = scorer.judge(pairs(0.2))
    assert "answers 401" in str(refused) and "***" in str(refused)
    assert KEY not in str(refused) + repr(scorer) + repr(scorer.server)
    hits = [NodeWithScore(node=make_node("worth 0.1"), score=0.1)]
    with pytest.raises(EndpointError) as raised:
        MLLMReranker(scorer=scorer).postprocess_nodes(hits, query_str="Which?")
    assert KEY not in str(raised.value)


def test_a_refused_document_fails_alone():
    with RerankServer(worth, refuse=lambda document: "0.3" in document) as server:
        outcomes = endpoint(server).judge(pairs(0.1, 0.2, 0.3, 0.4, 0.5))
    assert isinstance(outcomes.pop(2), EndpointError)
    assert outcomes == [0.1, 0.2, 0.4, 0.5]


def test_a_refused_request_is_not_repeated_for_each_document():
    with RerankServer(worth, script=[400] * 99) as server:
        outcomes = endpoint(server).judge(pairs(*[0.5] * 40))
    assert all("answers 400" in str(outcome) for outcome in outcomes)
    assert len(server.requests) == 2


def test_a_deadline_keeps_the_places():
    hits = [NodeWithScore(node=make_node("worth 0.1"), score=0.1)]
    with RerankServer(worth, script=["hang"]) as server:
        scorer = endpoint(server, deadline=0.2)
        (late,) = MLLMReranker(scorer=scorer).postprocess_nodes(hits, query_str="Which?")
        server.script.append("hang")
        assert isinstance(scorer.judge(pairs(0.1))[0], DeadlineError)
    assert late.score == 0.1 and "deadline" in late.rerank_error


def test_logits_are_an_error_unless_they_are_expected():
    with RerankServer(worth) as server:
        (refused,) = endpoint(server).judge(pairs(-4.5))
        assert "pass logits=True" in str(refused)
        low, middle, high = endpoint(server, logits=True).judge(pairs(-1000.0, 0.0, 2.0))
    assert (low, middle, high) == pytest.approx((0.0, 0.5, 0.8807970779778823))


def test_images_go_only_where_they_are_taken():
    image = Image.new("RGB", (40, 30))
    given = [(Content("Which?"), Content("worth 0.3", image)), (Content("Which?"), Content("0.1"))]
    scan = (Content("Which?"), Content(image=image))
    with RerankServer(worth) as server:
        text, plain, unseen = endpoint(server).judge([*given, scan])
        assert (text, plain) == (0.3, 0.1) and isinstance(unseen, ContentError)
        assert endpoint(server, images=True).judge([*given, scan]) == [0.5, 0.1, 0.5]
    sent = server.requests[1]["documents"]
    assert sent[0]["image"].startswith("data:image/png;base64,") and sent[1] == "0.1"


def test_options_that_make_no_sense_are_refused():
    for options in ({"deadline": 0}, {"retries": -1}, {"timeout": 0}, {"api_key": "schlüssel"}):
        with pytest.raises(ConfigError):
            load_scorer("judge", base_url="http://localhost/v1/rerank", **options)
    with pytest.raises(ConfigError, match="leave out prompt"):
        load_scorer("judge", base_url="http://localhost/v1/rerank", prompt="answer")
    with pytest.raises(ConfigError, match="mode: unknown to this reranker"):
        load_scorer("judge", base_url="http://localhost/v1/rerank", mode="words")
