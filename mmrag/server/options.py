"""How a server runs: where it listens, who may ask, and how much a request may take."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field

from mmrag.errors import ConfigError


@dataclass(frozen=True)
class ServerOptions:
    """Options of a server.

    host, port: where it listens; loopback unless asked otherwise. Port 0 takes a free one.
    api_keys: any of them opens the API; without keys everyone who reaches it may ask.
    without_keys: allow an address that others can reach without any key.
    allowed_hosts: names in the Host header that are answered, besides those of loopback.
        Empty on another address: every name.
    cors_origins: web pages of other origins that may call the API; none by default.
    public_url: how links in answers start; default: as the request names the server.
    slots: requests that search or answer at once. waiting: those that may wait; more get 429.
    max_upload_bytes, max_upload_pages: of one uploaded file.
    max_body_bytes: of a request without a file; images travel in it as base64.
    max_image_pixels: of an image in a request.
    batch_ms: how long a query waits for others to be embedded with it, in milliseconds.
    stop_seconds: how long running requests may take to finish when the server stops.

    Raises:
        ConfigError: For values that make no sense, or for an open door without a key.
    """

    host: str = "127.0.0.1"
    port: int = 8321
    api_keys: tuple[str, ...] = ()
    without_keys: bool = False
    allowed_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    public_url: str | None = None
    slots: int = 4
    waiting: int = 64
    max_upload_bytes: int = 200 * 1024 * 1024
    max_upload_pages: int = 2000
    max_body_bytes: int = 32 * 1024 * 1024
    max_image_pixels: int = 40_000_000
    batch_ms: float = 2.0
    stop_seconds: int = 20
    loopback: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "loopback", is_loopback(self.host))
        least_one = ("slots", "max_upload_bytes", "max_upload_pages", "max_body_bytes")
        for name in (*least_one, "max_image_pixels"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: give at least 1.")
        for name in ("waiting", "batch_ms", "stop_seconds"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)}: give 0 or more.")
        if any(len(key) < 8 for key in self.api_keys):
            raise ConfigError("An API key is shorter than 8 characters; use a long random one.")
        if not self.loopback and not self.api_keys and not self.without_keys:
            raise ConfigError(
                f"Anyone who reaches {self.host} could read the collection: set an API key "
                "(MMRAG_API_KEYS, or --api-keys FILE), or pass --without-keys."
            )

    @property
    def hosts(self) -> frozenset[str]:
        """Names that the Host header may hold; empty: any."""
        # On loopback a web page could otherwise reach the server under a name of its own, which
        # it points to 127.0.0.1 (DNS rebinding).
        if not self.loopback and not self.allowed_hosts:
            return frozenset()
        return frozenset({"localhost", "127.0.0.1", "::1", self.host, *self.allowed_hosts})


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
