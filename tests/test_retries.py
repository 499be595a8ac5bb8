"""Asking a server again, against a clock that the test controls through short pauses."""

import threading
import time

import pytest

from mmrag import retries
from mmrag.errors import EndpointError
from mmrag.retries import BusyError, Deadline, with_retries


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(retries, "_FIRST_PAUSE", 0.001)


def failing(times, pause=None):
    calls = []

    def ask():
        calls.append(time.monotonic())
        if len(calls) <= times:
            raise BusyError(EndpointError(f"failure {len(calls)}"), pause)
        return "answer"

    return ask, calls


def test_a_busy_server_is_asked_again_until_it_answers():
    ask, calls = failing(3)
    assert with_retries(ask, 4, Deadline()) == "answer"
    assert len(calls) == 4


def test_the_last_error_is_raised_once_the_tries_are_used_up():
    ask, calls = failing(9)
    with pytest.raises(EndpointError, match="failure 3"):
        with_retries(ask, 2, Deadline())
    assert len(calls) == 3


def test_other_errors_are_raised_at_once():
    calls = []

    def ask():
        calls.append(1)
        raise ValueError("refused")

    with pytest.raises(ValueError, match="refused"):
        with_retries(ask, 5, Deadline())
    assert calls == [1]


def test_no_pause_goes_past_the_deadline():
    ask, calls = failing(9, pause=30.0)
    with pytest.raises(EndpointError, match="failure 1"):
        with_retries(ask, 5, Deadline(5.0))
    assert len(calls) == 1


def test_a_pause_ends_when_the_call_is_over():
    ask, calls = failing(9, pause=30.0)
    deadline = Deadline(60.0)
    threading.Timer(0.05, deadline.stop.set).start()
    with pytest.raises(EndpointError, match="failure 1"):
        with_retries(ask, 5, deadline)
    assert len(calls) == 1


def test_time_left():
    assert Deadline().left() == float("inf")
    assert 0 < Deadline(10).left() <= 10
    assert Deadline(0).left() == 0
