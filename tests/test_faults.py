"""What goes wrong around an answer, and what the user gets: the table in docs/answering.md.

Refused requests, garbage and cut streams are in test_answering.py, broken images in
test_context.py.
"""

import asyncio
import shutil
from pathlib import Path

import pymupdf
import pytest
from chat_server import ChatServer
from fakes import FakeEmbedder
from qdrant_client import QdrantClient

from mmrag import UniversalIndex
from mmrag.answering.response import NOT_FOUND
from mmrag.errors import EndpointError, MissingCollectionError
from mmrag.llms.endpoint import open_llm
from mmrag.queries import Where

EYES = "The gold plan covers one eye examination a year."
QUESTION = "Does the gold plan cover an eye examination?"
ANSWER = f"{EYES[:-1]} [1]."


def write_pdf(path, *texts):
    with pymupdf.open() as document:
        for text in texts:
            document.new_page().insert_text((72, 72), text)
        document.save(path)


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    write_pdf(folder / "plans.pdf", EYES, "Adults pay for crowns.")
    where = {"location": QdrantClient(":memory:"), "images_dir": folder / "images"}
    with UniversalIndex(**where, embed_model=FakeEmbedder()) as index:
        index.add(folder / "plans.pdf")
        yield index


@pytest.fixture
def pdf(index):
    """The indexed file, which a test may spoil."""
    path = Path(index.files()[0].file)
    data = path.read_bytes()
    yield path
    path.write_bytes(data)


@pytest.fixture
def server():
    server = ChatServer(ANSWER)
    yield server
    server.close()


def engine(index, server, timeout=5.0, retries=1, **options):
    llm = open_llm("tiny", server.url, timeout=timeout)
    llm.max_retries = retries
    return index.as_query_engine(llm, **options)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_server_that_hangs_is_tried_twice(index, server, streaming):
    server.mode = "hang"
    with pytest.raises(EndpointError, match="in time"):
        response = engine(index, server, timeout=0.2, streaming=streaming).query(QUESTION)
        response.get_response()
    assert len(server.requests) == 2


def test_a_stream_that_stalls_is_given_up(index, server):
    server.mode = "stall"
    hasty = engine(index, server, timeout=0.2, retries=0, streaming=True)
    response = hasty.query(QUESTION)
    seen = []
    with pytest.raises(EndpointError):
        seen.extend(iter(response.response_gen))

    async def ask():
        stalled = await hasty.aquery(QUESTION)
        return [piece async for piece in stalled.async_response_gen()]

    with pytest.raises(EndpointError):
        asyncio.run(ask())


async def test_a_stream_cut_off_is_clear_in_async_too(index, server):
    server.mode = "cut"
    response = await engine(index, server, retries=0, streaming=True).aquery(QUESTION)
    with pytest.raises(EndpointError, match="broke off"):
        await response.get_response()


@pytest.mark.parametrize("streaming", [False, True])
def test_an_empty_answer(index, server, streaming):
    server.answer = ""
    with pytest.raises(EndpointError, match="empty"):
        engine(index, server, streaming=streaming).query(QUESTION).get_response()


def test_page_images_that_have_gone(index, server):
    images = index.collection.images_dir
    away = images.rename(images.with_name("away"))
    response = engine(index, server).query(QUESTION)
    shutil.rmtree(images, ignore_errors=True)
    away.rename(images)
    assert str(response) == ANSWER
    assert response.cited[0].boxes
    assert len(response.notes) == len(response.sources) == 2
    content = server.requests[0]["messages"][1]["content"]
    assert "image_url" not in str(content)


@pytest.mark.parametrize("change", ["moved", "rewritten", "shortened", "broken"])
def test_a_file_that_has_changed_since(index, server, pdf, change):
    asked = engine(index, server)
    assert asked.query(QUESTION).cited[0].boxes
    match change:
        case "moved":
            pdf.unlink()
        case "rewritten":
            write_pdf(pdf, "Nothing of the kind.", "Nor here.")
        case "shortened":
            server.answer = "Adults pay for crowns [2]."
            write_pdf(pdf, EYES)
        case "broken":
            pdf.write_bytes(b"%PDF-1.7 garbage")
    (cited,) = asked.query(QUESTION).cited
    assert cited.quote in (EYES, "Adults pay for crowns.")
    assert cited.boxes  # of the page as it was indexed


def test_a_filter_that_no_page_passes(index, server):
    nothing_found(engine(index, server, where=Where(files=("other.pdf",))), server)


def test_an_empty_collection(tmp_path, server):
    (tmp_path / "a.txt").write_text("soon gone")
    with UniversalIndex(QdrantClient(":memory:"), FakeEmbedder(), images_dir=tmp_path) as index:
        index.add(tmp_path / "a.txt")
        index.remove("*")
        with pytest.raises(MissingCollectionError, match="empty"):
            engine(index, server)


def nothing_found(engine, server):
    response = engine.query(QUESTION)
    assert (str(response), response.found, response.sources) == (NOT_FOUND, False, [])
    assert server.requests == []
