"""What ``mmrag doctor`` says of the machine, and of servers that do not answer."""

import http.server
import json
import threading
from importlib import metadata

import pytest
from fakes import FakeEmbedder
from typer.testing import CliRunner

from mmrag.cli.app import app
from mmrag.index import UniversalIndex


def doctor(collection, *options, **environ):
    return CliRunner().invoke(app, ["doctor", "-c", str(collection), *options], env=environ)


@pytest.fixture
def library(tmp_path):
    (tmp_path / "a.md").write_text("The well is nine metres deep.")
    with UniversalIndex(tmp_path / "library", FakeEmbedder()) as index:
        index.add(tmp_path / "a.md")
    return tmp_path / "library"


@pytest.fixture
def address():
    """A server that says it is Qdrant."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            # One answer for all: what it is, and that there is no collection.
            none = {"result": {"exists": False}, "status": "ok", "time": 0.0}
            body = json.dumps({"title": "qdrant", "version": "1.20.3", **none}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_HEAD(self):
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_the_machine_and_the_collection_are_described(library, address):
    done = doctor(library, "--json", HF_ENDPOINT=address, HF_HUB_OFFLINE="0")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    about = found["machine"]
    assert about["versions"]["torch"] == metadata.version("torch")
    assert 0 < about["memory"]["available"] <= about["memory"]["total"]
    assert about["hub"] == f"{address}: reachable"
    assert about["server"] is None
    assert found["found"]["damaged"] is False


def test_being_offline_is_said_and_is_no_failure(library):
    nobody = "http://127.0.0.1:9"
    done = doctor(library, HF_ENDPOINT=nobody, HF_HUB_OFFLINE="0")
    assert done.exit_code == 0
    assert f"Model hub: {nobody}: not reachable" in done.stdout
    assert "models on this machine work" in done.stdout
    assert "mmrag serve: none holds this collection" in done.stdout
    offline = doctor(library, HF_HUB_OFFLINE="1")
    assert "not asked, since HF_HUB_OFFLINE is set" in offline.stdout


def test_the_machine_is_described_where_the_collection_is_missing(tmp_path):
    done = doctor(tmp_path / "nothing", HF_HUB_OFFLINE="1")
    assert done.exit_code == 3
    assert done.stdout.startswith("Versions: python ")
    assert "no mmrag collection" in done.stderr


def test_the_version_of_qdrant_is_said(address):
    done = doctor(address, HF_HUB_OFFLINE="1")
    assert f"Qdrant: {address}: version 1.20.3" in done.stdout
    assert done.exit_code == 3  # it is none
