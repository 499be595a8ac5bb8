"""HTTP clients that sign requests and repair replies that stray from OpenAI's format."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import openai

from mmrag.llms.address import Address

# Content as a list, which some servers send. Lines without it, nearly all, are not parsed.
_PARTS = re.compile(rb'"content"\s*:\s*\[')


class Client(openai.DefaultHttpxClient):
    """An ``httpx.Client`` for one server."""

    def __init__(self, address: Address, **options: Any) -> None:
        super().__init__(**options)
        self._address = address

    def send(self, request: httpx.Request, **options: Any) -> httpx.Response:
        """Sign, send, and repair the reply."""
        self._address.sign(request)
        response = super().send(request, **options)
        if _is_json(response):
            response.read()
            return repaired(response)
        if _is_event_stream(response):
            response.stream = _Events(response.stream)
        return response


class AsyncClient(openai.DefaultAsyncHttpxClient):
    """An ``httpx.AsyncClient`` for one server."""

    def __init__(self, address: Address, **options: Any) -> None:
        super().__init__(**options)
        self._address = address

    async def send(self, request: httpx.Request, **options: Any) -> httpx.Response:
        """Sign, send, and repair the reply."""
        self._address.sign(request)
        response = await super().send(request, **options)
        if _is_json(response):
            await response.aread()
            return repaired(response)
        if _is_event_stream(response):
            response.stream = _AsyncEvents(response.stream)
        return response


def _is_json(response: httpx.Response) -> bool:
    return "json" in response.headers.get("content-type", "")


def _is_event_stream(response: httpx.Response) -> bool:
    # A compressed stream cannot be cut into lines before it is decoded.
    plain = "content-encoding" not in response.headers
    return plain and "event-stream" in response.headers.get("content-type", "")


class _Lines:
    """Cuts a stream of bytes into lines and repairs those that hold content in parts."""

    def __init__(self) -> None:
        self._rest = b""

    def add(self, data: bytes) -> bytes:
        """The lines that are whole with this piece."""
        # Pieces are cut anywhere, also within a line or a character.
        *lines, self._rest = (self._rest + data).split(b"\n")
        return b"".join(self._repaired(line) + b"\n" for line in lines)

    def end(self) -> bytes:
        """What is left behind the last line."""
        return self._rest

    def _repaired(self, line: bytes) -> bytes:
        head, _, body = line.partition(b":")
        if head != b"data" or not _PARTS.search(body):
            return line
        try:
            value = json.loads(body)
            for choice in value["choices"]:
                choice["delta"]["content"] = _joined(choice["delta"]["content"])
        except (ValueError, TypeError, LookupError):
            return line
        return b"data: " + json.dumps(value).encode()


class _Events(httpx.SyncByteStream):
    """An event stream with repaired lines."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[bytes]:
        lines = _Lines()
        for data in self._stream:
            yield lines.add(data)
        yield lines.end()

    def close(self) -> None:
        """Close the connection's stream."""
        self._stream.close()


class _AsyncEvents(httpx.AsyncByteStream):
    """As ``_Events``."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        lines = _Lines()
        async for data in self._stream:
            yield lines.add(data)
        yield lines.end()

    async def aclose(self) -> None:
        """Close the connection's stream."""
        await self._stream.aclose()


def repaired(response: httpx.Response) -> httpx.Response:
    """A chat completion as OpenAI would send it.

    Content in parts becomes a text, a missing role the assistant's, and an error that was sent
    with status 200 gets its own status, so that it is treated as one.
    """
    try:
        value = response.json()
    except ValueError:
        return response
    if not isinstance(value, dict):
        return response
    choices = value.get("choices")
    status = response.status_code
    if status == 200 and value.get("error") and not choices:
        status = _error_status(value["error"])
    for choice in choices if isinstance(choices, list) else ():
        message = choice.get("message") if isinstance(choice, dict) else None
        if isinstance(message, dict):
            # The SDK's model demands a role that some servers leave out.
            message["role"] = message.get("role") or "assistant"
            message["content"] = _joined(message.get("content"))
    # The body is decoded already, and its length may be another now.
    kept = {
        name: text
        for name, text in response.headers.items()
        if name.lower() not in ("content-encoding", "content-length", "transfer-encoding")
    }
    body = json.dumps(value).encode()
    return httpx.Response(
        status, headers=kept, content=body, request=response.request, extensions=response.extensions
    )


def _error_status(error: object) -> int:
    # OpenRouter, for one, sends the upstream server's status as the error's code.
    code = error.get("code") if isinstance(error, dict) else None
    return code if isinstance(code, int) and 400 <= code < 600 else 502


def _joined(content: object) -> object:
    """The text of a list of parts; anything else as it is."""
    if not isinstance(content, list):
        return content
    texts = [part.get("text") if isinstance(part, dict) else part for part in content]
    return "".join(text for text in texts if isinstance(text, str))
