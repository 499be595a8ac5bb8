"""What an http or https URL names, with limits on time, size and redirects."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from email.message import Message
from importlib import metadata
from pathlib import PurePosixPath
from urllib.parse import unquote

import httpx

from mmrag.errors import ReadError
from mmrag.ingest.copies import Download
from mmrag.reading.files import EXTRAS, not_supported, suffixes

_CONNECT, _SILENCE = 10.0, 30.0  # seconds
_REDIRECTS = 5
_OFFICE = "application/vnd.openxmlformats-officedocument"
_TYPES = {
    "application/pdf": ".pdf",
    "text/html": ".html",
    "application/xhtml+xml": ".xhtml",
    "image/png": ".png",
    "image/jpeg": ".jpg",
    "image/webp": ".webp",
    "image/gif": ".gif",
    "image/bmp": ".bmp",
    "image/tiff": ".tiff",
    "image/avif": ".avif",
    "image/jp2": ".jp2",
    "text/plain": ".txt",
    "text/markdown": ".md",
    "text/csv": ".csv",
    "application/epub+zip": ".epub",
    "video/mp4": ".mp4",
    "video/webm": ".webm",
    "video/quicktime": ".mov",
    "video/x-matroska": ".mkv",
    "message/rfc822": ".eml",
    "application/vnd.ms-outlook": ".msg",
    "application/vnd.ms-excel": ".xls",
    f"{_OFFICE}.wordprocessingml.document": ".docx",
    f"{_OFFICE}.presentationml.presentation": ".pptx",
    f"{_OFFICE}.spreadsheetml.sheet": ".xlsx",
}


def new_client() -> httpx.Client:
    """A client for ``open_url``; it may be used from several threads."""
    return httpx.Client(
        timeout=httpx.Timeout(_SILENCE, connect=_CONNECT),
        headers={
            "User-Agent": f"mmrag/{metadata.version('mmrag')}",
            # A few compressed bytes may unpack to gigabytes, and PDFs are compressed anyway.
            "Accept-Encoding": "identity",
        },
    )


@contextmanager
def open_url(
    client: httpx.Client, name: str, url: str, version: Mapping[str, str]
) -> Iterator[Download | None]:
    """What a URL names; None if it is still the ``version`` that an earlier call gave.

    name: the URL without credentials, for errors.

    Raises:
        ReadError: If the server cannot be reached, refuses, or sends something of no known type.
    """
    try:
        response = _send(client, name, client.build_request("GET", url, headers=dict(version)))
        try:
            if response.status_code == httpx.codes.NOT_MODIFIED and version:
                yield None
                return
            if not response.is_success:
                raise ReadError(_refusal(response), file=name, retry=response.is_server_error)
            size = response.headers.get("Content-Length", "")
            yield Download(
                _suffix(response, name),
                response.iter_bytes(),
                int(size) if size.isdecimal() else None,
                _version(response),
            )
        finally:
            response.close()
    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        message = f"the server cannot be reached ({error}); check the address and the network"
        raise ReadError(message, file=name, retry=True) from error
    except httpx.TimeoutException as error:
        message = f"the server was silent for {_SILENCE:g} s; try again later"
        raise ReadError(message, file=name, retry=True) from error
    except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
        raise ReadError(f"it is no URL that can be used ({error})", file=name) from error
    except httpx.RequestError as error:
        message = f"the connection broke ({error}); try again"
        raise ReadError(message, file=name, retry=True) from error


def _send(client: httpx.Client, name: str, request: httpx.Request) -> httpx.Response:
    """The last response of a chain of redirects, its body unread."""
    first = request.url
    for _ in range(_REDIRECTS + 1):
        response = client.send(request, stream=True)
        if response.next_request is None:
            return response
        response.close()
        request = response.next_request
        _check_redirect(first, request.url, name)
    raise ReadError(f"it redirects more than {_REDIRECTS} times", file=name)


def _check_redirect(first: httpx.URL, target: httpx.URL, name: str) -> None:
    """Raise ReadError for a redirect that could read what the user did not name."""
    if target.scheme not in ("http", "https"):
        raise ReadError(f"it redirects to {target.scheme}:, which is not followed", file=name)
    # Whoever types an address of the own network means it; a page from outside that leads there
    # would have the machine ask its router, or the cloud's metadata service.
    if target.host != first.host and is_private(target.host) and not is_private(first.host):
        raise ReadError(
            f"it redirects to {target.host}, an address of a private network; if that is meant, "
            "give the URL there",
            file=name,
        )


def is_private(host: str) -> bool:
    """Whether a host has an address that is not on the public internet."""
    try:
        found = {str(info[4][0]).partition("%")[0] for info in socket.getaddrinfo(host, None)}
    except (OSError, UnicodeError):  # behind a proxy only that may know the name
        return False
    return any(not ipaddress.ip_address(each).is_global for each in found)


def _refusal(response: httpx.Response) -> str:
    """What a status means for the user."""
    code = response.status_code
    advice = {
        401: "download it in a browser and index the file",
        403: "download it in a browser and index the file",
        404: "check the address",
        410: "check the address",
    }.get(code, "try again later" if code == 429 or code >= 500 else "check the address")
    return f"the server answered {code} {response.reason_phrase}; {advice}"


def _version(response: httpx.Response) -> dict[str, str]:
    """Headers by which the next request asks for a change."""
    asked = {"If-None-Match": "ETag", "If-Modified-Since": "Last-Modified"}
    return {ask: response.headers[said] for ask, said in asked.items() if said in response.headers}


def _suffix(response: httpx.Response, name: str) -> str:
    """The suffix of the type that the server says, or of the name where it says little."""
    headers = Message()
    for key in ("Content-Type", "Content-Disposition"):
        if key in response.headers:
            headers[key] = response.headers[key]
    kind = headers.get_content_type() if "Content-Type" in headers else ""
    names = (headers.get_filename() or "", unquote(response.url.path))
    by_name = [PurePosixPath(each).suffix.lower() for each in names]
    of_extras = (suffix for _, of_extra in EXTRAS.values() for suffix in of_extra)
    known = {*suffixes(), *of_extras}  # without an extra, its name helps more
    read = [suffix for suffix in by_name if suffix in known]
    suffix = _TYPES.get(kind, "")
    # Servers send files of types they do not know as text or as bytes.
    if suffix in ("", ".txt") and read:
        suffix = read[0]
    if suffix not in suffixes():
        message = not_supported(PurePosixPath(f"x{suffix or by_name[-1]}"))
        raise ReadError(f"{message} (the server says: {kind or 'no type'})", file=name)
    return suffix
