"""Asking a server again: after growing pauses, and never past a deadline."""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import tenacity

RETRIED_STATUS = frozenset((408, 409, 425, 429, 500, 502, 503, 504))
"""Statuses of a server that is busy or broken for a while."""

_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 8.0  # seconds between tries, doubled each time
T = TypeVar("T")


class BusyError(Exception):
    """A try that failed and may be repeated; ``error`` is what is raised in the end.

    pause: seconds that the server asks to wait; None: it does not say.
    """

    def __init__(self, error: Exception, pause: float | None = None) -> None:
        super().__init__(str(error))
        self.error = error
        self.pause = pause


@dataclass(frozen=True)
class Deadline:
    """When a call must be over, and whether it already is.

    seconds: from now; None for no end.
    """

    seconds: float | None = None
    started: float = field(default_factory=time.monotonic)
    stop: threading.Event = field(default_factory=threading.Event)

    def left(self) -> float:
        """Seconds to the deadline; infinite if there is none."""
        if self.seconds is None:
            return math.inf
        return max(0.0, self.started + self.seconds - time.monotonic())


def with_retries(ask: Callable[[], T], retries: int, deadline: Deadline) -> T:
    """What ``ask`` returns, called again as often as ``retries`` while it raises BusyError.

    The ``error`` of the last BusyError is raised once tries or time are used up, and what else
    ``ask`` raises, at once.
    """
    failed: BusyError | None = None

    def pause(state: tenacity.RetryCallState) -> float:
        nonlocal failed
        error: Any = state.outcome.exception() if state.outcome else None
        failed = error
        if error.pause is not None:
            return float(error.pause)
        grown = min(_FIRST_PAUSE * 2 ** (state.attempt_number - 1), _LONGEST_PAUSE)
        # Some randomness, so that clients refused together do not all come back together.
        return float(grown * random.uniform(1.0, 1.25))

    def stop(state: tenacity.RetryCallState) -> bool:
        # A pause that ends after the deadline would be waited for in vain.
        return state.attempt_number > retries or state.upcoming_sleep >= deadline.left()

    def sleep(seconds: float) -> None:
        # An event instead of time.sleep: whoever closes the client need not wait for the pause.
        if deadline.stop.wait(seconds) and failed is not None:
            raise failed

    trying = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(BusyError),
        wait=pause,
        stop=stop,
        sleep=sleep,
        reraise=True,
    )
    try:
        return trying(ask)
    except BusyError as error:
        # BusyError is ours to steer with; callers know the error within.
        raise error.error from error.error.__cause__
