"""Versions of a collection: equal to what was kept, and whole whatever stops a restore."""

import contextlib
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from fakes import FakeEmbedder, make_image
from kill_restart import content
from llama_index.core.schema import ImageNode
from qdrant_client import QdrantClient, models
from typer.testing import CliRunner

from mmrag.cli.app import app
from mmrag.errors import CollectionError, ConfigError
from mmrag.index import UniversalIndex
from mmrag.store.location import Location
from mmrag.store.snapshots import Snapshots
from mmrag.store.trees import copy_tree, size_on_disk

EMBEDDER = FakeEmbedder()


def write(folder, name, text):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)


@pytest.fixture
def library(tmp_path, monkeypatch):
    """Two files and an inserted picture, kept as ``first``, and changed since."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "texts", "one.md", "The well is nine metres deep.")
    write(tmp_path / "texts", "two.md", "The tower is ninety metres high.")
    red = make_image(tmp_path / "red.png", colour="red")
    with UniversalIndex(tmp_path / "library", EMBEDDER) as index:
        index.add("texts")
        index.insert_nodes([ImageNode(id_="picture", text="A square.", image_path=str(red))])
        write(tmp_path / "library" / "uploads", "own.md", "An uploaded file.")
        index.collection.snapshots.create("first")
    return tmp_path / "library"


def change(library):
    """Another content, another picture under the same id, another upload."""
    write(library.parent / "texts", "one.md", "The well was filled in.")
    blue = make_image(library.parent / "blue.png", colour="blue")
    with UniversalIndex(library, EMBEDDER) as index:
        index.add("texts")
        index.remove("two.md")
        index.insert_nodes([ImageNode(id_="picture", text="A square.", image_path=str(blue))])
    (library / "uploads" / "own.md").unlink()
    write(library / "uploads", "other.md", "Another.")


def state(library):
    """Points and images, what a search finds, uploads, and whether the collection is sound."""
    with UniversalIndex(library, EMBEDDER) as index:
        assert not index.collection.examine().damaged
        hits = index.as_retriever(similarity_top_k=5).retrieve("How deep is the well?")
        found = [(hit.node.node_id, hit.score, hit.text) for hit in hits]
    uploads = {path.name: path.read_text() for path in (library / "uploads").iterdir()}
    return content(library), found, uploads


def test_a_restored_collection_is_as_it_was_kept(library):
    kept = state(library)
    change(library)
    changed = state(library)
    assert changed[0] != kept[0] and changed[1] != kept[1]
    Snapshots.of(library).create("second")
    Snapshots.of(library).restore("first")
    assert state(library) == kept
    Snapshots.of(library).restore("second")  # and back: the first restore changed no snapshot
    assert state(library) == changed
    Snapshots.of(library).restore("first")
    assert state(library) == kept


def test_a_deleted_or_damaged_shard_comes_back(library):
    kept = state(library)
    shutil.rmtree(library / "qdrant")
    Snapshots.of(library).restore("first")
    assert state(library) == kept
    for path in (library / "qdrant" / "segments").rglob("*"):
        if path.is_file():
            path.write_bytes(b"\xff" * 64)
    with pytest.raises(CollectionError):
        UniversalIndex(library, EMBEDDER)
    Snapshots.of(library).restore("first")
    assert state(library) == kept


class Killed(BaseException):
    """No error handler of ours may catch what a kill would not let run."""


class Killer:
    """Stops whatever this process does to files at the n-th operation.

    seen: the operations so far, as the names of audit events with what they were given.
    """

    def __init__(self):
        self.limit, self.seen = None, []

    def __call__(self, event, arguments):
        if self.limit is None or not event.startswith(("os.", "shutil.", "open")):
            return
        self.seen.append((event, str(arguments[1]) if len(arguments) > 1 else ""))
        # From here on nothing reaches the disk, cleaning up included.
        if len(self.seen) >= self.limit:
            raise Killed

    def stop(self, action, limit):
        """Whether the action was stopped."""
        self.limit, self.seen = limit, []
        try:
            action()
        except Killed:
            return True
        finally:
            self.limit = None
        return False


KILLER = Killer()
# A hook stays for the life of the process; it does nothing while there is no limit.
sys.addaudithook(KILLER)


def test_stopped_anywhere_the_collection_is_the_old_one_or_the_new_one(library):
    kept = state(library)
    change(library)
    changed = state(library)
    versions = Snapshots.of(library)
    versions.create("second")
    assert not KILLER.stop(lambda: versions.restore("first"), 10**9)
    total = len(KILLER.seen)
    commit = KILLER.seen.index(("os.rename", str(library / "restored"))) + 1
    versions.restore("second")
    drawn = random.Random(20261127).sample(range(1, total), 4)
    moments = {commit, commit + 1, commit + 2, total, *drawn}
    ends = set()
    for moment in sorted(moments):
        # What an earlier kill left would shift the moments.
        shutil.rmtree(library / "restored.new", ignore_errors=True)
        assert KILLER.stop(lambda: versions.restore("first"), moment)
        found = state(library)
        assert found == (kept if moment > commit else changed), moment
        ends.add("new" if found == kept else "old")
        if found == kept:
            versions.restore("second")
    assert ends == {"old", "new"}
    versions.restore("first")
    assert state(library) == kept
    left = {path.name for path in library.iterdir()} - {"qdrant.count", "qdrant.lock"}
    assert left == {"images", "qdrant", "snapshots", "uploads"}


def test_a_killed_process_leaves_a_collection_that_opens(library):
    kept = state(library)
    change(library)
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from mmrag.store import restoring\n"
        "from mmrag.store.snapshots import Snapshots\n"
        "restoring.mirror = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "Snapshots.of(sys.argv[1]).restore('first')\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(library)], capture_output=True)
    assert done.returncode == -signal.SIGKILL
    assert state(library) == kept


def test_a_snapshot_that_was_cut_short_is_none(library):
    kept = state(library)
    versions = Snapshots.of(library)
    assert not KILLER.stop(lambda: versions.create("second"), 10**9)
    for moment in random.Random(7).sample(range(1, len(KILLER.seen)), 4):
        KILLER.stop(lambda: versions.create("third"), moment)
        assert state(library) == kept
        with contextlib.suppress(ConfigError):  # it was complete after all
            versions.restore("third")
        assert state(library) == kept
        shutil.rmtree(versions.folder / "third", ignore_errors=True)
    assert [each.name for each in versions.list()] == ["first", "second"]


def test_a_full_disk_is_said_before_anything_is_written(library, monkeypatch):
    kept = state(library)
    before = sorted(library.rglob("*"))

    def full(path):
        return shutil._ntuple_diskusage(10**12, 10**12 - 64_100_000, 64_100_000)

    with monkeypatch.context() as disk:
        disk.setattr(shutil, "disk_usage", full)
        with pytest.raises(CollectionError, match=r"64 MB free.*Free some space"):
            Snapshots.of(library).restore("first")
        with pytest.raises(CollectionError, match=r"64 MB free.*Free some space"):
            Snapshots.of(library).create("second")
    assert sorted(library.rglob("*")) == before
    assert state(library) == kept


@pytest.mark.parametrize("name", ["", "..", "../x", "a/b", ".hidden", "-x", "a\nb", "x" * 101, "é"])
def test_names_stay_in_the_folder(library, name):
    versions = Snapshots.of(library)
    for act in (versions.create, versions.restore) if name else (versions.restore,):
        with pytest.raises(ConfigError, match="is no name for a snapshot"):
            act(name)


def test_taken_and_unknown_names_are_said(library):
    with pytest.raises(ConfigError, match="'first' already"):
        Snapshots.of(library).create("first")
    with pytest.raises(ConfigError, match="no snapshot 'other'; it has: first"):
        Snapshots.of(library).restore("other")


def test_a_snapshot_of_another_model_or_schema_is_refused(library, tmp_path):
    other = tmp_path / "other"
    with UniversalIndex(other, FakeEmbedder("second", dim=16)) as index:
        index.add("texts")
    shutil.copytree(library / "snapshots", other / "snapshots")
    with pytest.raises(CollectionError, match=r"built by 'fake'.*dim: 32, not 16"):
        Snapshots.of(other).restore("first")
    manifest = library / "snapshots" / "first" / "snapshot.json"
    manifest.write_text(manifest.read_text().replace('"schema": 3', '"schema": 4'))
    with pytest.raises(CollectionError, match=r"schema 4, this version has 3"):
        Snapshots.of(library).restore("first")


def test_a_collection_that_is_in_use_is_not_restored(library):
    with UniversalIndex(library, EMBEDDER) as index:
        with pytest.raises(CollectionError, match="in use"):
            Snapshots.of(library).restore("first")
        with pytest.raises(CollectionError, match="in use"):
            index.collection.snapshots.restore("first")
        assert index.collection.snapshots.list()


def test_links_in_a_snapshot_lead_nowhere(library, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("secret")
    images = library / "snapshots" / "first" / "images"
    (images / "0123456789abcdef").mkdir()
    (images / "0123456789abcdef" / "page.png").symlink_to(secret)
    (images / "linked").symlink_to(tmp_path)
    Snapshots.of(library).restore("first")
    assert not (library / "images" / "0123456789abcdef").exists()
    assert not (library / "images" / "linked").exists()


def test_holes_are_not_written(tmp_path):
    (tmp_path / "from").mkdir()
    with (tmp_path / "from" / "sparse").open("wb") as file:
        file.write(b"begin")
        file.truncate(50_000_000)
    copy_tree(tmp_path / "from", tmp_path / "to")
    copied = tmp_path / "to" / "sparse"
    assert copied.stat().st_size == 50_000_000
    assert copied.read_bytes()[:8] == b"begin\0\0\0"
    assert size_on_disk(tmp_path / "to") < 1_000_000


def test_snapshots_are_passed_over_by_indexing(library):
    with UniversalIndex(library.parent / "second", EMBEDDER) as index:
        report = index.add(library / "snapshots")
    assert report.indexed == []


def run(*args):
    return CliRunner().invoke(app, ["snapshot", *map(str, args)])


def test_the_commands(library):
    made = run("create", "second", "-c", library)
    assert made.exit_code == 0, made.stderr
    assert "second: 3 files" in made.stdout
    listed = run("list", "-c", library).stdout.split()
    assert {"first", "second"} <= set(listed)
    assert run("restore", "second", "-c", library).exit_code == 0
    assert run("restore", "third", "-c", library).exit_code == 2
    assert "no name for a snapshot" in run("create", "../x", "-c", library).stderr


class Server:
    """Qdrant's snapshots over a client in local mode, which has none of its own."""

    def __init__(self):
        self.client = QdrantClient(":memory:")
        self.kept = {}
        self.client.create_snapshot = self.create
        self.client.recover_snapshot = self.recover

    def create(self, name, wait):
        points, _ = self.client.scroll(name, limit=1000, with_vectors=True)
        self.kept[f"{name}-1.snapshot"] = points
        return models.SnapshotDescription(name=f"{name}-1.snapshot", size=1)

    def recover(self, name, location, api_key, priority, wait):
        assert (api_key, priority, wait) == ("key", models.SnapshotPriority.SNAPSHOT, True)
        assert location.startswith("http://qdrant:6333/collections/papers/snapshots/")
        self.client.delete(name, models.Filter())
        rows = self.kept[location.rpartition("/")[2]]
        self.client.upsert(
            name, [models.PointStruct(id=p.id, vector=p.vector, payload=p.payload) for p in rows]
        )
        return True


def test_a_collection_on_a_server_is_restored_with_its_images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    server = Server()
    where = Location.of(server.client, "papers", "key", None)
    red, blue = (make_image(tmp_path / f"{name}.png", colour=name) for name in ("red", "blue"))

    def pixels():
        with UniversalIndex(server.client, EMBEDDER, name="papers") as index:
            (node,) = [hit.node for hit in index.as_retriever().retrieve("square")]
            return Path(node.image_path).read_bytes(), index.collection.count()

    with UniversalIndex(server.client, EMBEDDER, name="papers") as index:
        index.insert_nodes([ImageNode(id_="picture", text="A square.", image_path=str(red))])
        index.collection.snapshots.create("first")
        kept = pixels()
        index.insert_nodes([ImageNode(id_="picture", text="A square.", image_path=str(blue))])
    assert pixels() != kept
    with pytest.raises(ConfigError, match="URL"):
        Snapshots(where).restore("first")
    object.__setattr__(where, "url", "http://qdrant:6333")
    object.__setattr__(where, "api_key", "key")
    monkeypatch.setattr(server.client, "close", lambda: None)  # engines of a URL close theirs
    Snapshots(where).restore("first")
    assert pixels() == kept
    with pytest.raises(CollectionError, match="of a collection on a server"):
        shutil.copytree(
            tmp_path / "mmrag-images" / "papers-snapshots", tmp_path / "f" / "snapshots"
        )
        Snapshots.of(tmp_path / "f").restore("first")
