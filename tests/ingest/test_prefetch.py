"""Work that runs ahead: complete, bounded, honest about errors, quick to stop."""

import threading
import time

import pytest

from mmrag.ingest.prefetch import THREAD_NAME, End, run_ahead


def alive():
    return [t for t in threading.enumerate() if t.name.startswith(THREAD_NAME)]


def test_every_result_comes_in_its_items_order_and_each_item_ends():
    def work(item, put):
        for number in range(item):
            put(number)

    results = list(run_ahead(work, [3, 0, 5], workers=2, ahead=2))
    for item in (3, 0, 5):
        assert [r for i, r in results if i == item] == [*range(item), End()]
    assert alive() == []


def test_no_items():
    assert list(run_ahead(lambda item, put: None, [], workers=4, ahead=1)) == []


def test_an_error_ends_its_item_only():
    error = ValueError("bad")

    def work(item, put):
        put("first")
        if item == "bad":
            raise error

    results = dict(
        (item, result)
        for item, result in run_ahead(work, ["bad", "good"], workers=1, ahead=9)
        if isinstance(result, End)
    )
    assert results == {"bad": End(error), "good": End()}


def test_work_waits_for_a_slow_consumer():
    made = []

    def work(item, put):
        for number in range(100):
            made.append(number)
            put(number)

    results = run_ahead(work, ["a", "b"], workers=2, ahead=5)
    next(results)
    time.sleep(0.2)
    # Five wait, two are in the hands of their threads, one was taken.
    assert len(made) <= 8
    results.close()


def test_heavy_results_hold_the_work_back_and_still_come():
    made = []

    def work(item, put):
        for number in range(20):
            made.append(number)
            put("x" * 60)

    results = run_ahead(
        work,
        ["a"],
        workers=1,
        ahead=50,
        weigh=lambda r: len(r) if isinstance(r, str) else 0,
        most=100,
    )
    next(results)
    time.sleep(0.2)
    # Two wait, of which the second goes over the bound, one is held back, one was taken.
    assert len(made) == 4
    assert sum(1 for _ in results) == 20


def test_closing_ends_the_threads_even_of_a_full_queue():
    def work(item, put):
        while True:
            put(item)

    results = run_ahead(work, ["a", "b", "c"], workers=3, ahead=1)
    next(results)
    assert len(alive()) == 3
    results.close()
    assert alive() == []


def test_closing_does_not_wait_for_work_that_hangs():
    release = threading.Event()

    def work(item, put):
        put("one")
        release.wait(30)

    results = run_ahead(work, ["a", "b", "c", "d"], workers=4, ahead=9)
    next(results)
    started = time.monotonic()
    results.close()
    assert time.monotonic() - started < 10
    release.set()


def test_more_items_than_workers_are_worked_on_side_by_side():
    both = threading.Barrier(2, timeout=10)

    def work(item, put):
        both.wait()

    ends = [result for _, result in run_ahead(work, [1, 2, 3, 4], workers=2, ahead=1)]
    assert ends == [End()] * 4


def test_the_consumers_error_ends_the_threads():
    def work(item, put):
        while True:
            put(item)

    results = run_ahead(work, ["a"], workers=1, ahead=1)
    with pytest.raises(KeyboardInterrupt):
        try:
            for _ in results:
                raise KeyboardInterrupt
        finally:
            results.close()
    assert alive() == []
