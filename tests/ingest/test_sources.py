"""URLs as sources: fetched when asked, kept beside the page images, and only if they changed."""

import json
import shutil

import pymupdf
import pytest
from fakes import FakeEmbedder
from web_server import WebServer, broken, redirect, silent

from mmrag.errors import ReadError
from mmrag.index import UniversalIndex
from mmrag.ingest import web
from mmrag.ingest.sources import clean_url
from mmrag.queries import Where
from mmrag.reading import ReadOptions, locate_quote
from mmrag.store.matching import matching_paths

TEXT = {"Content-Type": "text/plain", "ETag": '"1"'}
PDF = {"Content-Type": "application/pdf", "Last-Modified": "Mon, 01 Jun 2026 10:00:00 GMT"}
LINE = "The pump stands in the cellar."


def pdf(text=LINE):
    with pymupdf.open() as document:
        document.new_page().insert_text((72, 72), text)
        return document.tobytes()


@pytest.fixture
def server():
    with WebServer() as running:
        yield running


def failures(report):
    return {error.file: str(error.args[0]) for error in report.errors}


def test_a_pdf_is_indexed_under_its_url_and_found_marked_and_removed_by_it(index, server):
    server.pages["/papers/pump.pdf"] = (pdf(), PDF)
    url = f"{server.url}/papers/pump.pdf"
    report = index.add([url])
    assert (report.indexed, report.failed) == ([url], [])
    [entry] = index.files()
    assert (entry.file, entry.pages, entry.folder) == (url, 1, "")
    hits = index.as_retriever(where=Where(files=(url,))).retrieve("pump cellar")
    metadata = hits[0].node.metadata
    assert metadata["file"] == url
    # The copy is what marking opens where the page's image alone does not do.
    assert locate_quote(metadata["file_path"], 1, LINE, sha256=entry.sha256)
    assert index.remove(url) == [url]
    assert index.files() == []
    assert not any(index.collection.images_dir.rglob("original.*"))


def test_what_has_not_changed_is_neither_sent_nor_read_again(index, server):
    server.pages = {"/a.pdf": (pdf(), PDF), "/b.txt": (b"the words of b", TEXT)}
    urls = [f"{server.url}{path}" for path in server.pages]
    index.add(urls)
    calls = index.embedder.encoded
    report = index.add(urls)
    assert report.unchanged == urls
    assert index.embedder.encoded == calls
    again = dict(server.asked[2:])
    assert again["/a.pdf"]["If-Modified-Since"] == PDF["Last-Modified"]
    assert again["/b.txt"]["If-None-Match"] == '"1"'


def test_a_converted_collection_takes_the_copies_along(index, server, tmp_path):
    server.pages = {"/a.pdf": (pdf(), PDF), "/b.txt": (b"the words of b", TEXT)}
    urls = [f"{server.url}{path}" for path in server.pages]
    index.add(urls)
    index.convert(tmp_path / "new")
    index.close()
    shutil.rmtree(tmp_path / "library")
    with UniversalIndex(tmp_path / "new", index.embedder) as new:
        [hit] = new.as_retriever(where=Where(files=(urls[0],))).retrieve("pump cellar")
        metadata = hit.node.metadata
        assert locate_quote(metadata["file_path"], 1, LINE, sha256=metadata["sha256"])
        # Each is asked for its version: the server does not send it again.
        assert new.add(urls).unchanged == urls
        again = dict(server.asked[2:])
        assert again["/a.pdf"]["If-Modified-Since"] == PDF["Last-Modified"]
        assert again["/b.txt"]["If-None-Match"] == '"1"'


def test_a_changed_file_replaces_its_earlier_version(index, server):
    server.pages["/a.txt"] = (b"the first words", TEXT)
    url = f"{server.url}/a.txt"
    index.add(url)
    server.pages["/a.txt"] = (b"other words", {**TEXT, "ETag": '"2"'})
    assert index.add(url).replaced == [url]
    assert [entry.file for entry in index.files()] == [url]
    [copy] = index.collection.images_dir.rglob("original.*")
    assert copy.read_bytes() == b"other words"


def test_what_came_before_ctrl_c_is_not_fetched_again(index, server):
    server.pages = {"/a.txt": (b"some words", TEXT), "/slow.txt": silent(20)}

    def stop(progress):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        index.add([f"{server.url}{path}" for path in server.pages], progress=stop)
    assert index.files() == []
    assert index.add(f"{server.url}/a.txt").indexed == [f"{server.url}/a.txt"]
    assert server.asked[-1][1]["If-None-Match"] == '"1"'


def test_a_copy_that_is_gone_is_fetched_again(index, server):
    server.pages["/a.txt"] = (b"some words", TEXT)
    url = f"{server.url}/a.txt"
    index.add(url)
    index.remove(url)
    assert index.add(url).indexed == [url]
    # Names of what was removed do not stay behind.
    index.remove(url)
    index.add(f"{server.url}/other.txt")
    assert not any((index.collection.images_dir / "sources").glob("*.json"))


def test_failures_are_told_by_url_and_never_stop_the_rest(index, server, monkeypatch, tmp_path):
    monkeypatch.setattr(web, "_SILENCE", 0.5)
    server.pages = {
        "/good.txt": (b"some good words", TEXT),
        "/down": lambda request: request.send_error(503),
        "/model": (b"\0\1", {"Content-Type": "model/gltf+json"}),
        "/loop": redirect("/loop"),
        "/secret": redirect("file:///etc/passwd"),
        "/short.txt": broken(b"half", 1000),
        "/slow.txt": silent(2),
        "/broken.pdf": (b"%PDF-1.7 nothing", {"Content-Type": "application/pdf"}),
    }
    (tmp_path / "local.txt").write_text("local words")
    # Nobody listens on port 9 of this machine, which tests have no server for.
    urls = [f"{server.url}{path}" for path in (*server.pages, "/missing.pdf")]
    report = index.add([*urls, "http://127.0.0.1:9/x.pdf", "file:///etc/passwd", "local.txt"])
    assert report.indexed == ["local.txt", f"{server.url}/good.txt"]
    found = failures(report)
    told = {
        f"{server.url}/missing.pdf": "404",
        f"{server.url}/down": "503",
        f"{server.url}/model": "model/gltf+json",
        f"{server.url}/loop": "redirects more than 5 times",
        f"{server.url}/secret": "redirects to file:",
        f"{server.url}/short.txt": "connection broke",
        f"{server.url}/slow.txt": "silent",
        f"{server.url}/broken.pdf": "not a readable PDF",
        "http://127.0.0.1:9/x.pdf": "cannot be reached",
        "file:///etc/passwd": "by their path",
    }
    assert set(found) == set(told) == set(report.failed)
    for url, words in told.items():
        assert words in found[url], url
    # What cannot be read is not kept.
    assert len(list(index.collection.images_dir.rglob("original.*"))) == 1


@pytest.mark.parametrize("size", [None, 5000])
def test_a_file_over_the_limit_is_refused_with_and_without_its_length(tmp_path, server, size):
    server.pages["/big.txt"] = broken(b"x" * 5000, size)
    options = ReadOptions(max_file_bytes=4000)
    with UniversalIndex(tmp_path / "c", FakeEmbedder(), reading=options) as index:
        report = index.add(f"{server.url}/big.txt")
        assert "limit of 4,000 bytes" in failures(report)[f"{server.url}/big.txt"]
        assert not any(index.collection.images_dir.rglob("*.tmp"))


def test_a_file_that_takes_too_long_is_left(index, server, monkeypatch):
    monkeypatch.setattr("mmrag.ingest.copies._LONGEST", -1)
    server.pages["/a.txt"] = (b"some words", TEXT)
    report = index.add(f"{server.url}/a.txt")
    assert "did not come within" in failures(report)[f"{server.url}/a.txt"]


def test_a_public_page_may_not_lead_into_the_private_network(index, server, monkeypatch):
    server.pages = {
        "/here": redirect(f"{server.url.replace('127.0.0.1', 'localhost')}/inside.txt"),
        "/inside.txt": (b"inside words", TEXT),
    }
    monkeypatch.setattr(web, "is_private", lambda host: host == "localhost")
    report = index.add(f"{server.url}/here")
    assert "private network" in failures(report)[f"{server.url}/here"]
    assert [path for path, _ in server.asked] == ["/here"]
    # Whoever names a private address himself means it.
    monkeypatch.setattr(web, "is_private", lambda host: True)
    assert index.add(f"{server.url}/here").indexed == [f"{server.url}/here"]


@pytest.mark.parametrize(
    ("host", "private"),
    [
        ("127.0.0.1", True),
        ("10.1.2.3", True),
        ("169.254.169.254", True),
        ("::1", True),
        ("localhost", True),
        ("93.184.216.34", False),
        ("no-such-host.invalid", False),
    ],
)
def test_private_addresses(host, private):
    assert web.is_private(host) == private


@pytest.mark.parametrize(
    ("path", "headers", "suffix"),
    [
        ("/2301.00001", {"Content-Type": "application/pdf"}, ".pdf"),
        ("/report.pdf", {"Content-Type": "text/html; charset=utf-8"}, ".html"),
        ("/notes.md", {"Content-Type": "text/plain"}, ".md"),
        ("/get?id=7", {"Content-Disposition": 'attachment; filename="a b.pdf"'}, ".pdf"),
        ("/a.PDF", {"Content-Type": "application/octet-stream"}, ".pdf"),
        ("/a", {"Content-Type": "text/plain"}, ".txt"),
    ],
)
def test_the_type_comes_from_the_server_and_then_from_the_name(
    index, server, path, headers, suffix
):
    pytest.importorskip("markitdown")
    server.pages[path] = (b"words", headers)
    with web.new_client() as client:
        url = f"{server.url}{path}"
        with web.open_url(client, url, url, {}) as download:
            assert download.suffix == suffix


def test_a_page_names_the_extra_that_would_read_it(index, server, monkeypatch):
    known = {".txt": "text"}
    monkeypatch.setattr(web, "suffixes", lambda: known)
    monkeypatch.setattr("mmrag.reading.files.suffixes", lambda: known)
    server.pages["/"] = (b"<p>words</p>", {"Content-Type": "text/html"})
    report = index.add(server.url)
    assert "pip install 'mmrag[office]'" in failures(report)[f"{server.url}/"]


def test_a_web_page_is_indexed(index, server):
    pytest.importorskip("markitdown")
    body = b"<html><title>Wells</title><body><p>The well is nine metres deep.</p></body></html>"
    server.pages["/"] = (body, {"Content-Type": "text/html"})
    assert index.add(server.url).indexed == [f"{server.url}/"]
    [hit, *_] = index.as_retriever().retrieve("how deep is the well")
    assert "nine metres" in hit.text


def test_passwords_are_used_and_not_kept(index, server):
    server.pages["/a.txt"] = (b"some words", TEXT)
    url = server.url.replace("//", "//ann:secret@")
    index.add(f"{url}/a.txt#part")
    assert [entry.file for entry in index.files()] == [f"{server.url}/a.txt"]
    assert server.asked[0][1]["Authorization"].startswith("Basic ")
    kept = b"".join(path.read_bytes() for path in index.collection.images_dir.rglob("*.json"))
    assert b"secret" not in kept


def test_equal_contents_are_stored_once(index, server, tmp_path):
    (tmp_path / "local.txt").write_bytes(b"the same words")
    server.pages = dict.fromkeys(("/a.txt", "/b.txt"), (b"the same words", TEXT))
    report = index.add(["local.txt", f"{server.url}/a.txt", f"{server.url}/b.txt"])
    assert report.indexed == ["local.txt"]
    assert report.duplicates == {f"{server.url}/{name}.txt": "local.txt" for name in "ab"}


def test_metadata_functions_get_the_url(index, server):
    server.pages["/a.txt"] = (b"some words", TEXT)
    url = f"{server.url}/a.txt"
    index.add(url, metadata=lambda source: {"from": str(source)})
    assert index.files()[0].metadata == {"from": url}


def test_pruning_a_folder_leaves_urls(index, server, tmp_path):
    (tmp_path / "in").mkdir()
    server.pages["/a.txt"] = (b"some words", TEXT)
    index.add([f"{server.url}/a.txt"])
    assert index.add(["in"], prune=True).removed == []
    assert index.prune("/") == []


def test_an_error_of_the_program_is_raised(index, server, monkeypatch):
    server.pages["/a.txt"] = (b"some words", TEXT)
    monkeypatch.setattr(web, "_suffix", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        index.add(f"{server.url}/a.txt")


def test_a_damaged_note_costs_one_download(index, server):
    server.pages["/a.txt"] = (b"some words", TEXT)
    url = f"{server.url}/a.txt"
    index.add(url)
    [note] = (index.collection.images_dir / "sources").glob("*.json")
    note.write_text(json.dumps({"sha256": "../../x", "suffix": ".txt", "version": {}}))
    assert index.add(url).unchanged == [url]
    assert "If-None-Match" not in server.asked[1][1]


def test_a_collection_never_makes_repair_fetch(index, server):
    server.pages["/a.txt"] = (b"some words", TEXT)
    index.add(f"{server.url}/a.txt")
    examination = index.collection.examine()
    examination.lost[index.files()[0]] = 1
    index.repair(examination)
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("HTTPS://Example.org", "https://example.org/"),
        ("https://ann:pw@example.org/A.pdf?x=1#page=3", "https://example.org/A.pdf?x=1"),
        ("http://[::1]:8000/a", "http://[::1]:8000/a"),
    ],
)
def test_names_of_urls(url, name):
    assert clean_url(url) == name


@pytest.mark.parametrize("url", ["http://[::1/a", "file:///etc/passwd", "http://x/\udcff"])
def test_what_is_no_usable_url(url):
    with pytest.raises(ReadError):
        clean_url(url)


def test_patterns_match_urls():
    paths = ["https://example.org/in/a.pdf", "https://example.org/get?[1]=2"]
    assert matching_paths(["a.pdf"], paths) == paths[:1]
    assert matching_paths(["https://example.org/in/a.pdf"], paths) == paths[:1]
    assert matching_paths(["https://example.org/in/*"], paths) == paths[:1]
    assert matching_paths(["https://example.org/get?[1]=2"], paths) == paths[1:]
