"""Fields of all points are read in the background, and are never those of before a write."""

import logging
import subprocess
import sys
import threading

import numpy as np
import pytest
from engines import nearest

from mmrag.errors import CollectionError
from mmrag.store import edge
from mmrag.store.edge import EdgeEngine
from mmrag.store.engine import AnyOf, Filter, Point, Schema
from mmrag.store.read_ahead import ReadAhead

ALL = Filter()
FIELDS = ("file", "page")
ROWS = np.random.default_rng(0).standard_normal((20, 4)).astype(np.float32)


def point(number, file="a"):
    id_ = f"00000000-0000-0000-0000-{number:012d}"
    return Point(id_, {"file": file, "page": number, "more": "x"}, {"text": ROWS[number]})


class Reads:
    """The engine's shard; keeps the ids of which payloads were read."""

    def __init__(self, shard):
        self._shard, self.ids = shard, []

    def __getattr__(self, name):
        return getattr(self._shard, name)

    def retrieve(self, ids, payload, vectors):
        self.ids += [str(id_) for id_ in ids]
        return self._shard.retrieve(ids, payload, vectors)


@pytest.fixture
def engine(tmp_path, monkeypatch):
    monkeypatch.setattr(edge, "_AHEAD_PAGE", 6)
    made = EdgeEngine(tmp_path / "shard", Schema({"text": 4}, ("file",), ("page",)))
    made.upsert([point(number) for number in range(20)])
    made._shard = Reads(made._shard)
    yield made
    made.close()


def search(engine):
    found = nearest(engine, "text", ROWS[0], 20, ALL, FIELDS)
    return {int(hit.id[-12:]): hit.payload for hit in found}


def test_a_search_reads_nothing_after_it(engine):
    assert len(list(engine.read_ahead(FIELDS))) == 4
    assert len(engine._shard.ids) == 20
    assert search(engine) == {n: {"file": "a", "page": n} for n in range(20)}
    assert len(engine._shard.ids) == 20


def test_a_point_deleted_after_it_was_found_is_left_out(engine, monkeypatch):
    whole = engine._shard.retrieve

    def without_four(ids, payload, vectors):
        return whole([id_ for id_ in ids if str(id_) != point(4).id], payload, vectors)

    monkeypatch.setattr(engine._shard, "retrieve", without_four)
    assert set(search(engine)) == {*range(20)} - {4}


def test_a_write_meanwhile_is_seen_and_other_points_stay_kept(engine):
    steps = engine.read_ahead(FIELDS)
    next(steps)
    engine.upsert([point(2, "moved"), point(10, "moved")])
    engine.delete_ids([point(3).id])
    list(steps)
    expected = {n: {"file": "moved" if n in (2, 10) else "a", "page": n} for n in range(20)}
    del expected[3]
    del engine._shard.ids[:]
    assert search(engine) == expected
    # Point 10 had not come yet when it was written.
    assert engine._shard.ids == [point(2).id]
    list(engine.read_ahead(FIELDS))
    assert engine._shard.ids == [point(2).id]


def test_points_deleted_by_a_filter_are_gone(engine):
    list(engine.read_ahead(FIELDS))
    engine.delete(Filter(must=(AnyOf("page", (1, 2)),)))
    del engine._shard.ids[:]
    assert set(search(engine)) == {0, *range(3, 20)}
    # Written again with the same ids, they have the new fields.
    engine.upsert([point(1, "new")])
    assert search(engine)[1] == {"file": "new", "page": 1}
    assert engine._shard.ids == [point(1).id]


def test_no_more_is_read_than_is_kept(engine):
    kept = engine._kept(FIELDS)
    kept._most = 10
    list(engine.read_ahead(FIELDS))
    assert len(kept) == 10
    assert len(engine._shard.ids) == 12  # whole pages


def test_stop_ends_it_between_two_steps():
    ahead, taken, going = ReadAhead(), [], threading.Event()

    def steps():
        while True:
            taken.append(1)
            going.set()
            yield

    ahead.start(steps())
    assert going.wait(10)
    ahead.stop()
    n_taken = len(taken)
    # A second run can be started, and ends in its own time.
    ahead.start(taken.append(None) for _ in range(3))
    ahead.join()
    assert len(taken) == n_taken + 3
    ahead.stop()


def test_another_run_takes_the_place_of_the_first():
    ahead, going = ReadAhead(), threading.Event()

    def endless():
        while True:
            going.set()
            yield

    ahead.start(endless())
    assert going.wait(10)
    ahead.start(iter(()))
    ahead.join()


@pytest.mark.parametrize(
    ("error", "said"),
    [(CollectionError("the disk is gone"), "the disk is gone"), (ZeroDivisionError(), "failed")],
)
def test_an_error_is_logged(error, said, caplog):
    def steps():
        yield
        raise error

    ahead = ReadAhead()
    with caplog.at_level(logging.WARNING):
        ahead.start(steps())
        ahead.join()
    (record,) = caplog.records
    assert said in record.getMessage()


def test_a_program_that_ends_without_closing_does_not_wait(tmp_path):
    program = (
        "import sys, time\n"
        "from mmrag.store.read_ahead import ReadAhead\n"
        "ahead = ReadAhead()\n"
        "ahead.start(time.sleep(0.01) for _ in iter(int, 1))\n"
        "print('ended')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert (done.stdout, done.stderr) == ("ended\n", "")
