"""Running a server with uvicorn until it is told to stop."""

from __future__ import annotations

import socket
from collections.abc import Callable
from types import FrameType

import uvicorn

from mmrag.errors import ConfigError
from mmrag.server.app import create_app
from mmrag.server.library import Libraries
from mmrag.server.metrics import Metrics
from mmrag.server.options import ServerOptions


class _Uvicorn(uvicorn.Server):
    """Says when it is ready, and that it stops."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # /ready answers 503 from now on, so that a load balancer sends no more.
        self.config.app.state.server.stopping = True  # type: ignore[union-attr]
        super().handle_exit(sig, frame)


def serve(
    libraries: Libraries,
    options: ServerOptions,
    metrics: Metrics | None = None,
    ready: Callable[[str], None] = lambda _: None,
) -> None:
    """Serve until SIGTERM or Ctrl-C; then let running requests end, and close the collections.

    ready: is told the address once requests are taken.

    Raises:
        ConfigError: If the address cannot be used.
    """
    app = create_app(libraries, options, metrics)
    listening = _listen(options.host, options.port)
    host, port = listening.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    config = uvicorn.Config(
        app,
        log_level="warning",
        timeout_graceful_shutdown=options.stop_seconds,
        server_header=False,
    )
    # Every-interface addresses listen; they are none to connect to.
    own = address.replace("0.0.0.0", "127.0.0.1").replace("[::]", "[::1]")

    def tell() -> None:
        for library in libraries:
            library.announce(own)
        ready(address)
        # After it: the first questions need not wait for this.
        libraries.warm_up()

    try:
        _Uvicorn(config, tell).run([listening])
    finally:
        listening.close()


def _listen(host: str, port: int) -> socket.socket:
    """A socket bound before anything else, so that its port is known."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With its protocol named, or asyncio leaves Nagle's algorithm on: headers and body of a reply
    # are two packets, and the second would wait 40 ms for the other side to acknowledge the first.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        raise ConfigError(
            f"{host}:{port} cannot be used ({error.strerror}); choose another --port."
        ) from error
    return listening
