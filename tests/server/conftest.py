"""A server over two small collections, with a stand-in embedder."""

import socket
import threading
import time

import pymupdf
import pytest
import uvicorn
from chat_server import ChatServer
from fakes import FakeEmbedder
from fastapi.testclient import TestClient

import mmrag.embedders
from mmrag.index import UniversalIndex
from mmrag.llms.endpoint import open_llm
from mmrag.retrieval.fusion import PAGE_FIELDS
from mmrag.server.app import create_app
from mmrag.server.library import Answering, open_libraries
from mmrag.server.options import ServerOptions

EYES = "The gold plan covers one eye examination a year for every member of the family."
TEETH = "Dental cleaning is free of charge for children who are under twelve years old."
BOILER = "The boiler near the harbour exploded in May and was replaced in June."


def write_pdf(path, *texts, size=(595, 842)):
    path.parent.mkdir(parents=True, exist_ok=True)
    with pymupdf.open() as document:
        for text in texts:
            page = document.new_page(width=size[0], height=size[1])
            page.insert_textbox((72, 72, 500, 200), text)
        document.save(path)
    return path


def is_warm(library):
    """Whether all that searches need of nodes is in memory, when what is going on has ended."""
    with library.writer.lock:
        library.collection._ahead.join()
    kept = library.collection._engine._kept(PAGE_FIELDS)
    return len(kept) == library.collection.count_points()


@pytest.fixture(autouse=True)
def small_embedder(monkeypatch):
    """An embedder that needs no weights; its vectors follow the words."""
    monkeypatch.setattr(
        mmrag.embedders, "load_embedder", lambda name, **_: FakeEmbedder(str(name), dim=64)
    )


def build(folder):
    """Make two collections, ``plans`` and ``boilers``, from files beside them."""
    files = {"plans": (EYES, TEETH), "boilers": (BOILER,)}
    for name, texts in files.items():
        path = write_pdf(folder / "files" / f"{name}.pdf", *texts)
        with UniversalIndex(folder / name, FakeEmbedder("mmrag-nano", dim=64)) as index:
            index.add(path)
    return folder


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """The folder of the collections; tests that change them make their own."""
    return build(tmp_path_factory.mktemp("built"))


@pytest.fixture
def opened(built):
    """Opens the collections, or those given, and closes them at the end."""
    kept = []

    def open_them(*locations, **options):
        where = locations or (str(built / "plans"), str(built / "boilers"))
        kept.append(open_libraries(where, **options))
        return kept[-1]

    yield open_them
    for libraries in kept:
        libraries.close()


@pytest.fixture
def make_client(opened):
    """Clients of servers with these options; ``llm`` is a ChatServer that answers."""
    clients = []

    def make(llm=None, rerankers=(), locations=(), **options):
        model = None
        if llm is not None:
            model = open_llm("tiny", llm.url, "key", context_window=8000)
        answering = Answering(model, rerankers)
        libraries = opened(*locations, answering=answering)
        app = create_app(libraries, ServerOptions(**options))
        client = TestClient(app, base_url="http://127.0.0.1:8321", raise_server_exceptions=False)
        client.libraries = libraries
        clients.append(client)
        return client

    yield make
    for client in clients:
        client.close()


@pytest.fixture
def client(make_client):
    """A client of a server that answers without a language model."""
    return make_client()


@pytest.fixture
def chat_server():
    server = ChatServer()
    yield server
    server.close()


@pytest.fixture
def listening(make_client):
    """Serves on loopback; gives the address. Takes what ``make_client`` takes."""
    running = []

    def start(**options):
        client = make_client(**options)
        app, start.libraries = client.app, client.libraries
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        running.append((server, thread))
        return f"http://127.0.0.1:{listener.getsockname()[1]}"

    yield start
    for server, thread in running:
        server.should_exit = True
        thread.join(10)
