import io
import json
import shutil
import threading
import time
from dataclasses import replace

import pytest
from fakes import FakeEmbedder, make_image, make_node
from PIL import Image

from mmrag.errors import ConfigError, ContentError
from mmrag.index import UniversalIndex
from mmrag.server.errors import ApiError
from mmrag.server.jobs import Writer
from mmrag.server.links import format_boxes, parse_boxes
from mmrag.server.pages import page_image_bytes
from mmrag.server.uploads import safe_name, store_upload

from .conftest import BOILER, build, is_warm, write_pdf


@pytest.fixture
def built(tmp_path):
    """Collections that a test may change. They are deleted, since each takes 40 MB."""
    yield build(tmp_path)
    for name in ("plans", "boilers"):
        shutil.rmtree(tmp_path / name)


def wait(client, seconds=20):
    """The jobs, once none waits or runs."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        jobs = client.get("/api/jobs").json()["jobs"]
        if all(job["state"] not in ("waiting", "running") for job in jobs):
            return jobs
        time.sleep(0.02)
    raise AssertionError(f"still running: {jobs}")


def send(client, name, data, **options):
    return client.post("/api/files", files={"file": (name, data)}, **options)


def test_a_converted_collection_serves_and_deletes_what_was_uploaded(make_client, built, tmp_path):
    first = make_client()
    path = write_pdf(tmp_path / "pump.pdf", "The pump was oiled in spring.")
    send(first, "pump.pdf", path.read_bytes())
    wait(first)
    first.libraries.get("plans").index.convert(tmp_path / "moved")
    first.libraries.close()
    shutil.rmtree(built / "plans" / "uploads")
    client = make_client(locations=[f"plans={tmp_path / 'moved'}", str(built / "boilers")])
    wait(client)
    rows = {row["name"]: row for row in client.get("/api/files").json()["files"]}
    assert rows["pump.pdf"]["uploaded"] and not rows["plans.pdf"]["uploaded"]
    address = f"/api/files/{rows['pump.pdf']['id']}"
    assert client.get(f"{address}/pages/1/image?mark=72,72,200,90").status_code == 200
    assert client.delete(address).status_code == 200
    assert not any((tmp_path / "moved" / "uploads").iterdir())
    client.libraries.close()
    shutil.rmtree(tmp_path / "moved")


def test_an_uploaded_file_is_indexed_found_and_removed(client, built):
    reply = send(client, "notes.md", b"# Pumps\n\nThe pump was oiled in spring.\n")
    assert reply.status_code == 202
    (job,) = wait(client)
    assert (job["name"], job["state"], job["errors"]) == ("notes.md", "done", [])
    stored = built / "plans" / "uploads" / "notes.md"
    assert stored.exists()
    rows = {row["name"]: row for row in client.get("/api/files").json()["files"]}
    assert rows["notes.md"]["uploaded"] and not rows["plans.pdf"]["uploaded"]
    hits = client.post("/api/search", json={"query": "pump oiled"}).json()["hits"]
    assert hits[0]["name"] == "notes.md"
    assert client.delete(f"/api/files/{rows['notes.md']['id']}").status_code == 200
    assert not stored.exists()
    assert [row["name"] for row in client.get("/api/files").json()["files"]] == ["plans.pdf"]


def test_fields_of_all_nodes_are_read_ahead_at_the_start_and_after_indexing(client):
    client.libraries.warm_up()
    assert all(is_warm(library) for library in client.libraries)
    send(client, "notes.md", b"The pump was oiled in spring.")
    wait(client)
    assert is_warm(client.libraries.get())


def test_removing_a_file_that_was_not_uploaded_leaves_it_where_it_is(client, built):
    (row,) = client.get("/api/files").json()["files"]
    assert client.delete(f"/api/files/{row['id']}").json() == {"removed": row["file"]}
    assert client.get("/api/files").json()["files"] == []
    assert (built / "files" / "plans.pdf").exists()
    assert client.delete(f"/api/files/{row['id']}").status_code == 404


def test_a_second_file_of_the_same_name_keeps_both(client, built):
    send(client, "a.txt", b"one pump")
    send(client, "a.txt", b"another valve")
    send(client, "a.txt", b"one pump")
    wait(client)
    uploads = built / "plans" / "uploads"
    assert sorted(path.name for path in uploads.iterdir()) == ["a (2).txt", "a.txt"]
    assert len(client.get("/api/files").json()["files"]) == 3


def test_files_that_cannot_be_read_are_told_and_leave_nothing(client, built):
    broken = send(client, "broken.pdf", b"%PDF-1.7 nothing")
    assert broken.status_code == 422
    # By its name, and not by the folder that it was in while it came.
    assert broken.json()["error"]["message"].startswith("broken.pdf: the file")
    send(client, "plan-copy.pdf", (client.libraries.get("plans").files()[0].path).read_bytes())
    send(client, "not-text.txt", bytes(range(256)) * 40)
    copy, bad = wait(client)
    assert "same content as plans.pdf" in copy["note"]
    assert bad["state"] == "failed"
    assert "not text" in bad["errors"][0]
    assert not any((built / "plans" / "uploads").iterdir())


@pytest.mark.parametrize(
    ("name", "data", "status"),
    [
        ("program.exe", b"MZ", 415),
        ("", b"text", 400),
        ("empty.txt", b"", 400),
        ("large.txt", b"x" * 2000, 413),
    ],
)
def test_uploads_that_are_refused(make_client, built, name, data, status):
    client = make_client(max_upload_bytes=1000)
    assert send(client, name, data).status_code == status
    uploads = built / "plans" / "uploads"
    assert not uploads.exists() or not any(uploads.iterdir())


def test_a_pdf_with_too_many_pages_is_refused(make_client, tmp_path):
    client = make_client(max_upload_pages=2)
    data = write_pdf(tmp_path / "long.pdf", "a", "b", "c").read_bytes()
    reply = send(client, "long.pdf", data)
    assert reply.status_code == 413
    assert "3 pages" in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("../../etc/passwd.txt", "passwd.txt"),
        ("..\\..\\boot.txt", "boot.txt"),
        ("/root/.ssh/keys.md", "keys.md"),
        (".hidden.txt", "hidden.txt"),
        ("a\x00b\u202e.pdf", "ab.pdf"),
        ("Cafe\u0301.PDF", "Caf\u00e9.PDF"),
    ],
)
def test_names_stay_in_their_folder(name, safe):
    assert safe_name(name) == safe


def test_long_names_are_cut_between_characters():
    name = safe_name("\u5317" * 200 + ".pdf")
    assert len(name.encode()) <= 180
    assert name.endswith("\u5317.pdf")
    with pytest.raises(ContentError):
        safe_name("..")


def test_an_upload_appears_only_when_it_is_complete(tmp_path):
    class Broken(io.BytesIO):
        def read(self, size=-1):
            names = [path.name for path in tmp_path.iterdir()]
            assert all(name.startswith(".incoming-") for name in names)
            if self.tell():
                raise ConnectionError("gone")
            return super().read(4)

    with pytest.raises(ConnectionError):
        store_upload(Broken(b"some text"), "a.txt", tmp_path, 100, 10)
    assert not any(tmp_path.iterdir())


def test_what_a_stop_cut_short_goes_on_at_the_next_start(client, opened, built):
    client.libraries.close()
    uploads = built / "plans" / "uploads"
    (uploads / ".incoming-x").mkdir(parents=True)
    (uploads / ".incoming-x" / "half.txt").write_text("half")
    (uploads / "whole.txt").write_text("The valve was closed.")
    library = opened(str(built / "plans")).get()
    end = time.monotonic() + 20
    while library.writer.busy() and time.monotonic() < end:
        time.sleep(0.02)
    assert [path.name for path in uploads.iterdir()] == ["whole.txt"]
    assert {entry.path.name for entry in library.files()} == {"plans.pdf", "whole.txt"}


def test_stopping_ends_indexing_and_keeps_what_is_finished(tmp_path):
    release, begun = threading.Event(), threading.Event()

    class Slow(FakeEmbedder):
        def encode(self, contents, *args, **options):
            begun.set()
            release.wait(20)
            return super().encode(contents, *args, **options)

    index = UniversalIndex(tmp_path / "c", Slow(dim=64))
    writer = Writer(index)
    jobs = [writer.add(write_pdf(tmp_path / f"{name}.pdf", name * 9)) for name in "ab"]
    assert begun.wait(20)
    stopper = threading.Thread(target=writer.stop)
    stopper.start()
    time.sleep(0.05)
    release.set()
    stopper.join(20)
    assert not stopper.is_alive()
    assert {job.state for job in jobs} <= {"done", "stopped"}
    assert "stopped" in {job.state for job in jobs}
    index.add([job.path for job in jobs])
    assert len(index.files()) == 2
    index.close()


def test_searches_go_on_while_files_are_indexed(make_client, monkeypatch):
    release, begun = threading.Event(), threading.Event()
    client = make_client()
    library = client.libraries.get()
    add = library.index.add

    def slow(*args, **options):
        begun.set()
        release.wait(20)
        return add(*args, **options)

    monkeypatch.setattr(library.index, "add", slow)
    send(client, "a.txt", b"The pump.")
    assert begun.wait(20)
    assert client.post("/api/search", json={"query": "eye"}).status_code == 200
    assert "mmrag_jobs_active 1.0" in client.get("/metrics").text
    release.set()
    wait(client)


def test_a_job_that_fails_unexpectedly_does_not_end_the_writer(client, monkeypatch):
    index = client.libraries.get().index
    add = index.add

    def broken(*_, **__):
        monkeypatch.setattr(index, "add", add)
        raise RuntimeError("secret")

    monkeypatch.setattr(index, "add", broken)
    send(client, "a.txt", b"The pump.")
    (job,) = wait(client)
    assert job["state"] == "failed"
    assert "secret" not in str(job)
    send(client, "b.txt", b"The valve.")
    assert wait(client)[-1]["state"] == "done"


def test_only_the_last_jobs_are_remembered(monkeypatch, client):
    monkeypatch.setattr("mmrag.server.jobs.KEPT", 2)
    for name in "abcd":
        send(client, f"{name}.txt", name.encode() * 9)
        wait(client)
    assert [job["name"] for job in wait(client)] == ["b.txt", "c.txt", "d.txt"]


def test_pages_of_another_collection_or_outside_cannot_be_read(client):
    plans, boilers = (
        client.get(f"/api/files?collection={name}").json()["files"][0]["id"]
        for name in ("plans", "boilers")
    )
    image = "/api/files/{}/pages/1/image?collection={}"
    assert client.get(image.format(plans, "plans")).status_code == 200
    assert client.get(image.format(boilers, "plans")).status_code == 404
    assert client.get(image.format(plans, "boilers")).status_code == 404
    assert client.get(f"/api/files/{plans}/pages/3/image").status_code == 404
    for bad in ("..%2F..%2Fetc%2Fpasswd", "../../etc/passwd", "a" * 63, "A" * 64, "%00" * 64):
        assert client.get(f"/api/files/{bad}/pages/1/image").status_code in (400, 404), bad


def test_an_image_that_a_node_names_elsewhere_is_not_shown(client, tmp_path):
    secret = make_image(tmp_path / "secret.png")
    collection = client.libraries.get("plans").collection
    own = make_image(collection.images_dir / "own.png")
    node = make_node("text", image=own, sha256="c" * 64, page_image=str(own))
    collection.write([node], [{}])
    address = f"/api/files/{'c' * 64}/pages/1/image"
    assert client.get(address).status_code == 200
    (point,) = collection._engine.retrieve([node.node_id])
    text = json.dumps(point.payload).replace("images/own.png", "images/../../secret.png")
    collection._engine.upsert([replace(point, payload=json.loads(text))])
    assert (collection.images_dir / "../../secret.png").resolve() == secret
    assert client.get(address).status_code == 404


def test_page_images_are_scaled_and_bounded(client):
    (row,) = client.get("/api/files").json()["files"]
    image = f"/api/files/{row['id']}/pages/1/image"
    small = client.get(f"{image}?width=200")
    assert small.headers["content-type"] == "image/webp"
    assert Image.open(io.BytesIO(small.content)).width == 200
    assert "private" in small.headers["cache-control"]
    for bad in ("width=0", "width=9999", "mark=1,2,3", "mark=nan,1,2,3", "mark=a,b,c,d"):
        assert client.get(f"{image}?{bad}").status_code == 400, bad


def test_boxes_are_marked_where_they_are(client):
    (row,) = client.get("/api/files").json()["files"]
    reply = client.get(f"/api/files/{row['id']}/pages/1/image?mark=100,400,200,420")
    image = Image.open(io.BytesIO(reply.content)).convert("RGB")
    assert image.getpixel((300, 820)) == (255, 214, 0)  # points times two at 144 dpi
    assert image.getpixel((300, 900)) == (255, 255, 255)


def test_a_very_large_page_is_marked_from_its_file(tmp_path):
    path = write_pdf(tmp_path / "poster.pdf", BOILER, size=(2400, 2400))
    with UniversalIndex(tmp_path / "c", FakeEmbedder(dim=64)) as index:
        index.add(path)
        (entry,) = index.files()
        data, _ = page_image_bytes(index.collection, entry.sha256, 1, [(1200, 1200, 1800, 1300)])
        image = Image.open(io.BytesIO(data)).convert("RGB")
        middle = tuple(round(edge * image.width / 2400) for edge in (1500, 1250))
        assert image.getpixel(middle) == (255, 214, 0)
        path.write_bytes(b"changed")
        with pytest.raises(ApiError, match="its file was moved, changed or deleted"):
            page_image_bytes(index.collection, entry.sha256, 1, [(1, 1, 2, 2)])


def test_boxes_survive_an_address():
    boxes = ((72.04, 80.5, 400.0, 96.1), (0.0, 0.0, 5.0, 5.0))
    assert format_boxes(boxes) == "72,80.5,400,96.1;0,0,5,5"
    assert parse_boxes(format_boxes(boxes)) == ((72.0, 80.5, 400.0, 96.1), (0, 0, 5, 5))
    assert parse_boxes("9,9,1,1") == ((1, 1, 9, 9),)
    assert parse_boxes(None) == ()
    with pytest.raises(ConfigError):
        parse_boxes(";".join(["1,1,2,2"] * 201))
