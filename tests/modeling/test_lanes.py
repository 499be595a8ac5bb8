"""Which batches of a model may run at once."""

import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from mmrag.modeling.lanes import SHORT, Lanes

WAIT = 10  # seconds, which no run of these takes


@pytest.fixture
def lanes():
    return Lanes(torch.device("cpu"))


@pytest.fixture
def pool():
    with ThreadPoolExecutor(8) as pool:
        yield pool


class Held:
    """A forward that runs until it is let go."""

    def __init__(self):
        self.runs, self.go = threading.Event(), threading.Event()

    def __call__(self):
        self.runs.set()
        assert self.go.wait(WAIT)
        return "done"


def test_a_short_batch_runs_beside_a_large_one(lanes, pool):
    large = Held()
    running = pool.submit(lanes.run, large, SHORT + 1)
    assert large.runs.wait(WAIT)
    assert pool.submit(lanes.run, lambda: "query", SHORT).result(WAIT) == "query"
    assert not running.done()
    large.go.set()
    assert running.result(WAIT) == "done"


@pytest.fixture
def torch_threads():
    """Puts back what torch takes for threads of later tests."""
    usual = torch.get_num_threads()
    yield
    torch.set_num_threads(usual)


def test_a_short_batch_beside_a_large_one_leaves_it_half_of_the_cores(lanes, pool, torch_threads):
    large, asker = Held(), ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(6,))
    asked = []

    def query(fails=False):
        asked.append(torch.get_num_threads())
        if fails:
            raise KeyError("no such token")

    def ask(fails=False):
        try:
            lanes.run(lambda: query(fails), SHORT)
        finally:
            asked.append(torch.get_num_threads())

    asker.submit(ask).result(WAIT)
    running = pool.submit(lanes.run, large, SHORT + 1)
    assert large.runs.wait(WAIT)
    with pytest.raises(KeyError):
        asker.submit(ask, fails=True).result(WAIT)
    asker.submit(torch.set_num_threads, 1).result(WAIT)
    asker.submit(ask).result(WAIT)
    large.go.set()
    assert running.result(WAIT) == "done"
    assert asked == [6, 6, 3, 6, 1, 1]


@pytest.mark.parametrize("tokens", [SHORT, SHORT + 1])
def test_batches_of_one_size_run_one_by_one(lanes, pool, tokens):
    first, second = Held(), Held()
    pool.submit(lanes.run, first, tokens)
    assert first.runs.wait(WAIT)
    pool.submit(lanes.run, second, tokens)
    assert not second.runs.wait(0.1)
    first.go.set()
    assert second.runs.wait(WAIT)
    second.go.set()


def test_a_model_that_keeps_something_runs_one_batch_at_a_time(pool):
    lanes = Lanes(torch.device("cpu"), stateful=True)
    large, query = Held(), Held()
    pool.submit(lanes.run, large, SHORT + 1)
    assert large.runs.wait(WAIT)
    pool.submit(lanes.run, query, 1)
    assert not query.runs.wait(0.1)
    large.go.set()
    assert query.runs.wait(WAIT)
    query.go.set()


def test_a_query_without_memory_runs_after_the_large_batch(lanes, pool):
    large, failed = Held(), threading.Event()
    running = pool.submit(lanes.run, large, SHORT + 1)
    assert large.runs.wait(WAIT)

    def query():
        if not large.go.is_set():
            failed.set()
            raise torch.OutOfMemoryError("no memory beside it")
        return "query"

    asked = pool.submit(lanes.run, query, 1)
    assert failed.wait(WAIT)
    large.go.set()
    assert running.result(WAIT) == "done"
    assert asked.result(WAIT) == "query"


def test_other_errors_are_raised_at_once(lanes):
    calls = []

    def fails():
        calls.append(1)
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        lanes.run(fails, 1)
    assert len(calls) == 1


def test_a_copy_has_lanes_of_its_own(lanes):
    assert pickle.loads(pickle.dumps(lanes)).run(lambda: 7, 1) == 7


def test_queries_beside_indexing_get_the_vectors_that_they_get_alone(gme, pool):
    pages = [Image.new("RGB", (168, 168), (n, 90, 200)) for n in range(24)]
    queries = [f"find the page that answers {n}" for n in range(12)]
    expected, alone = gme.encode(pages), [gme.encode([query]) for query in queries]
    indexing = [pool.submit(gme.encode, pages) for _ in range(4)]
    beside = [gme.encode([query]) for query in queries]
    np.testing.assert_allclose(beside, alone, atol=1e-5)
    for each in indexing:
        np.testing.assert_allclose(each.result(), expected, atol=1e-5)
