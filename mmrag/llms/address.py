"""Where a model's server is, and how a request to it is signed."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import unquote

import httpx

from mmrag.errors import ConfigError

_SUFFIXES = ("/chat/completions", "/completions", "/models")


@dataclass(frozen=True)
class Address:
    """A server's address, apart from what must not be shown.

    url: up to ``/v1``, without credentials and query.
    query: parameters of every request, such as Azure's ``api-version``.
    headers: of every request; they hold the key, so they are left out of the repr.
    """

    url: str
    query: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def public(self) -> str:
        """The address with its query, without credentials."""
        return str(httpx.URL(self.url).copy_merge_params(dict(self.query)))

    def sign(self, request: httpx.Request) -> None:
        """Put key and query into a request."""
        # The SDK's own header, made of the placeholder that stands in for the key.
        request.headers.pop("Authorization", None)
        request.headers.update(self.headers)
        if self.query:
            request.url = request.url.copy_merge_params(dict(self.query))


def parse_address(base_url: str, api_key: str | None = None) -> Address:
    """An address as users write it: with a user and password, a query, or a path too much.

    A password in the address is sent as basic authentication, in place of ``api_key``. Azure's
    servers get the key in the header that they read.

    Raises:
        ConfigError: If it is not an http address.
    """
    text = base_url.strip()
    try:
        url = httpx.URL(text)
    except (httpx.InvalidURL, ValueError) as error:
        raise ConfigError(f"{text!r} is not a server address ({error}).") from error
    if url.scheme not in ("http", "https") or not url.host:
        # "localhost:8000" is completed to an example; "true" or "yes" would make a misleading one.
        looks_like = text if ":" in text or "." in text or "/" in text else "HOST:PORT/v1"
        raise ConfigError(
            f"{text!r} is not a server address. Write it with its scheme, as in "
            f"http://{looks_like.removeprefix('//')}"
        )
    headers: dict[str, str] = {}
    if url.userinfo:
        login = base64.b64encode(unquote(url.userinfo.decode()).encode()).decode()
        # Sent from here: an address with a password in it would end up in logs and messages.
        headers = {"Authorization": f"Basic {login}"}
    elif api_key:
        azure = url.host.endswith(".azure.com")
        headers = {"api-key": api_key} if azure else {"Authorization": f"Bearer {api_key}"}
    path = url.path.rstrip("/")
    # Addresses are often copied from an example of curl, with the path of one call.
    for suffix in _SUFFIXES:
        path = path.removesuffix(suffix)
    bare = url.copy_with(userinfo=b"", path=path or "/", query=None, fragment=None)
    return Address(str(bare).rstrip("/"), dict(url.params), headers)
