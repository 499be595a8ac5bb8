"""Indexes are built on a copy, which then takes the place of the shard."""

import dataclasses
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from engines import nearest
from fakes import FakeEmbedder

from mmrag import UniversalIndex
from mmrag.errors import CollectionError
from mmrag.store import edge, optimizing
from mmrag.store.edge import EdgeEngine
from mmrag.store.engine import AnyOf, Filter, Point, Schema
from mmrag.store.trees import copy_sparse

ALL = Filter()
SCHEMA = Schema({"text": 8}, ("file",), ())
ROWS = np.random.default_rng(0).standard_normal((60, 8)).astype(np.float32)


def point(number, file="a"):
    id_ = f"00000000-0000-0000-0000-{number:012d}"
    return Point(id_, {"file": file, "number": number}, {"text": ROWS[number]})


POINTS = [point(number) for number in range(40)]


@pytest.fixture
def engine(tmp_path, monkeypatch):
    # Every vector without an index is worth it.
    monkeypatch.setattr(edge, "WORTH_BYTES", 1)
    made = EdgeEngine(tmp_path / "shard", SCHEMA)
    made.upsert(POINTS)
    yield made
    made.close()


def contents(engine):
    return {
        each.id: (each.payload, each.vectors["text"].tobytes())
        for each in engine.scroll(ALL, vectors=True)
    }


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


def test_what_is_written_meanwhile_is_kept_and_searches_go_on(engine, tmp_path):
    before = contents(engine)
    shard, told = engine._open, []

    def tick():
        if not told:
            engine.upsert([point(50, "new")])
            engine.delete(Filter(must=(AnyOf("number", (3, 4)),)))
            engine.upsert([dataclasses.replace(POINTS[5], payload={"file": "moved"})])
        told.append(nearest(engine, "text", ROWS[50], 1, ALL, ("file",))[0].payload)

    engine.optimize(SCHEMA, tick)
    assert engine._open is not shard
    assert told and all(payload == {"file": "new"} for payload in told)
    after = contents(engine)
    new, gone, moved = point(50).id, {POINTS[3].id, POINTS[4].id}, POINTS[5].id
    assert set(after) == (set(before) - gone) | {new}
    assert after[moved][0] == {"file": "moved"}
    unchanged = set(before) - gone - {moved}
    assert {id_: after[id_] for id_ in unchanged} == {id_: before[id_] for id_ in unchanged}
    assert engine.facet("file") == {"a": 37, "new": 1, "moved": 1}
    engine.close()
    assert names(tmp_path) == ["shard"]
    again = EdgeEngine(tmp_path / "shard")
    assert contents(again) == after
    assert again.missing == 0
    again.close()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_building_can_be_ended_and_nothing_is_changed(engine, tmp_path, error):
    before = contents(engine)

    def tick():
        raise error

    with pytest.raises(error):
        engine.optimize(SCHEMA, tick)
    assert names(tmp_path) == ["shard"]
    assert contents(engine) == before
    engine.upsert([point(50)])
    assert len(contents(engine)) == 41


def test_a_process_that_fails_says_why_and_nothing_is_changed(engine, tmp_path, monkeypatch):
    before = contents(engine)
    monkeypatch.setattr(optimizing, "_PROGRAM", "raise SystemExit('no memory')")
    with pytest.raises(CollectionError, match=r"no memory.*as it was before"):
        engine.optimize(SCHEMA)
    assert names(tmp_path) == ["shard"]
    assert contents(engine) == before


@pytest.mark.parametrize("replaced", [False, True], ids=["before", "between the two names"])
def test_a_killed_process_leaves_the_shard_as_it_was(engine, tmp_path, replaced):
    before = contents(engine)
    engine.close()
    (tmp_path / "shard.optimize-x").mkdir()
    if replaced:
        (tmp_path / "shard").rename(tmp_path / "shard.old")
    else:
        (tmp_path / "shard.old").mkdir()
    again = EdgeEngine(tmp_path / "shard")
    assert contents(again) == before
    assert names(tmp_path) == ["shard"]
    again.close()


def test_few_vectors_are_searched_without_an_index(engine, monkeypatch):
    monkeypatch.setattr(edge, "WORTH_BYTES", optimizing.WORTH_BYTES)
    monkeypatch.setattr(edge, "build", None)
    shard = engine._open
    engine.optimize(SCHEMA)
    assert engine._open is shard


def test_files_are_copied_without_their_holes(tmp_path):
    data = np.random.default_rng(1).bytes(5000)
    source, copy = tmp_path / "source", tmp_path / "copy"
    with source.open("wb") as file:
        file.write(data)
        file.seek(8 << 20)
        file.write(data)
        file.truncate(32 << 20)
    copy_sparse(str(source), str(copy))
    assert copy.read_bytes() == source.read_bytes()
    assert copy.stat().st_blocks <= source.stat().st_blocks
    empty = tmp_path / "empty"
    empty.touch()
    copy_sparse(str(empty), str(copy))
    assert copy.stat().st_size == 0


def test_indexing_says_that_it_builds_and_builds_again_what_was_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(edge, "WORTH_BYTES", 1)
    file = tmp_path / "a.txt"
    file.write_text("The well is nine metres deep.")
    told = []
    with UniversalIndex(tmp_path / "library", FakeEmbedder()) as index:
        index.add([file], progress=told.append)
        assert told[-1].optimizing and not told[0].optimizing

        def stop(now):
            if now.optimizing:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            index.add([file], progress=stop)
        assert index.as_retriever().search("well")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such signal")
def test_the_process_that_builds_ends_with_the_program(tmp_path):
    started = tmp_path / "started"
    program = f"""
import mmrag.store.optimizing as optimizing
own = "import time; open({str(started)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
optimizing._PROGRAM = optimizing._PROGRAM.split("shard =")[0] + own
optimizing.build({str(tmp_path)!r})
"""
    parent = subprocess.Popen([sys.executable, "-c", program])
    try:
        until(lambda: started.is_file() and started.read_text())
    finally:
        parent.kill()
        parent.wait()
    child = Path("/proc", started.read_text(), "cmdline")
    until(lambda: not (child.is_file() and child.read_bytes()))


def until(condition):
    """Wait for a minute at most."""
    for _ in range(600):
        if condition():
            return
        time.sleep(0.1)
    raise TimeoutError
