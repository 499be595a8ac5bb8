"""A server that takes JSON by POST: connections, retries, and errors without its key."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Mapping
from typing import Any

import httpx

from mmrag.errors import ConfigError, EndpointError
from mmrag.retries import RETRIED_STATUS, BusyError, Deadline, with_retries


class RefusedError(EndpointError):
    """An answer that will be the same at the next try; ``status`` is its HTTP status."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status

    def __reduce__(self) -> tuple[type[RefusedError], tuple[str, int]]:
        """Pickle with the status, which ``args`` does not hold."""
        return type(self), (self.args[0], self.status)


class JsonServer:
    """One address that JSON is posted to. Safe to call from several threads, and picklable.

    Args:
        url: the whole address of the endpoint.
        model: the name of the model there, for messages.
        api_key: sent as a bearer token; never part of a message or a repr.
        hint: what to check where the address is not found.
        timeout: seconds for one request.
        retries: how often a request is repeated after a busy, broken or absent answer.
        concurrency: requests under way at once, over all threads.

    Raises:
        ConfigError: For an address or a key that cannot be sent.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        api_key: str | None = None,
        hint: str = "check base_url and the model's name",
        timeout: float = 60.0,
        retries: int = 4,
        concurrency: int = 8,
    ) -> None:
        if concurrency < 1 or retries < 0 or timeout <= 0:
            raise ConfigError("concurrency and timeout must be above 0, retries at least 0.")
        self.url = _checked_url(url)
        self.model = model
        self.hint = hint
        self.timeout = timeout
        self.retries = retries
        self.concurrency = concurrency
        self._api_key = (api_key or "").strip() or None  # keys read from a file end in a newline
        # A header is ASCII; httpx would raise an error that shows the key.
        if self._api_key and not (self._api_key.isascii() and self._api_key.isprintable()):
            raise ConfigError("api_key holds characters that cannot be sent.")
        self._connect()

    def __repr__(self) -> str:
        return f"JsonServer({self.shown!r}, {self.model!r})"

    def __getstate__(self) -> dict[str, Any]:
        # Sockets and semaphores cannot be pickled; the copy connects anew.
        return {k: v for k, v in self.__dict__.items() if k not in ("_client", "_slots")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._connect()

    def _connect(self) -> None:
        headers = {"Authorization": f"Bearer {self._api_key}"} if self._api_key else {}
        # The semaphore alone bounds what runs at once: its wait knows the deadline.
        pool = httpx.Limits(max_connections=None, max_keepalive_connections=self.concurrency)
        self._client = httpx.Client(headers=headers, timeout=self.timeout, limits=pool)
        self._slots = threading.BoundedSemaphore(self.concurrency)

    @property
    def shown(self) -> str:
        """The address without a user name, a password or a query in it."""
        scheme, _, rest = self.url.partition("://")
        host, slash, path = rest.partition("/")
        return f"{scheme}://{host.rpartition('@')[2]}{slash}{path.partition('?')[0]}"

    def post(self, body: Mapping[str, Any], deadline: Deadline) -> bytes:
        """The answer to one request, tried again with growing pauses.

        Raises:
            RefusedError: For a status that says that trying again is of no use.
            EndpointError: If the server cannot be reached, or stays busy or broken.
        """
        raw = json.dumps(body).encode()
        tries = 0

        def ask() -> bytes:
            nonlocal tries
            tries += 1
            asked: float | None = None
            try:
                status, answer, asked = self._send(raw, deadline)
            except httpx.RequestError as error:
                problem = f"cannot be reached ({type(error).__name__}: {error})"
            else:
                if status == 200:
                    return answer
                problem = f"answers {status}: {excerpt(answer)}"
                if status not in RETRIED_STATUS:
                    raise RefusedError(self._message(problem + self._advice(status)), status)
            # A server under repair may ask for hours.
            pause = None if asked is None else min(asked, self.timeout)
            raise BusyError(self.error(f"{problem}, tried {tries} times"), pause)

        return with_retries(ask, self.retries, deadline)

    def _send(self, raw: bytes, deadline: Deadline) -> tuple[int, bytes, float | None]:
        """Status, body and the pause that the server asks for; raises httpx.RequestError."""
        if not self._slots.acquire(timeout=min(deadline.left(), threading.TIMEOUT_MAX)):
            raise httpx.PoolTimeout("the deadline passed while waiting for a free connection")
        try:
            seconds = min(self.timeout, deadline.left())
            ends = time.monotonic() + seconds
            headers = {"Content-Type": "application/json"}
            wait = max(seconds, 0.001)
            with self._client.stream(
                "POST", self.url, content=raw, headers=headers, timeout=wait
            ) as response:
                parts = []
                for part in response.iter_bytes():  # httpx bounds each read, not their sum
                    parts.append(part)
                    if time.monotonic() > ends:
                        raise httpx.ReadTimeout("the answer came too slowly")
                return response.status_code, b"".join(parts), _retry_after(response)
        finally:
            self._slots.release()

    def error(self, problem: str) -> EndpointError:
        """An error that names the server and the model, and never the key."""
        return EndpointError(self._message(problem))

    def _message(self, problem: str) -> str:
        message = f"{self.shown}, model {self.model!r}: {problem}."
        # Some servers repeat the request's headers in their errors.
        return message.replace(self._api_key, "***") if self._api_key else message

    def _advice(self, status: int) -> str:
        match status:
            case 401 | 403:
                return " (check api_key)"
            # A missing /v1 shows as any of these, by server.
            case 404 | 405 | 307 | 308:
                return f" ({self.hint})"
        return ""


def excerpt(answer: bytes, most: int = 300) -> str:
    """The beginning of an answer, on one line, for a message."""
    text = " ".join(answer[: 4 * most].decode("utf-8", "replace").split())
    return text if len(text) <= most else f"{text[:most]}..."


def _checked_url(url: str) -> str:
    if not url.startswith(("http://", "https://")):
        raise ConfigError("base_url must begin with http:// or https://.")
    try:
        httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ConfigError(f"base_url is not a web address ({error}).") from error
    return url


def _retry_after(response: httpx.Response) -> float | None:
    """Seconds that the server asks to wait; ``None`` where it does not, or gives a date."""
    try:
        seconds = float(response.headers.get("Retry-After", ""))
    except ValueError:
        return None
    # "nan" and "inf" are floats to Python.
    return seconds if 0 <= seconds < math.inf else None
