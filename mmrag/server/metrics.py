"""Figures about a running server, in Prometheus' text format."""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mmrag.server.gate import Gate
from mmrag.server.library import Libraries

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Metrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        # Not the global one, in which two servers of one process (or test run) would collide.
        self.registry = CollectorRegistry()
        labels = ("method", "route")
        self.requests = Counter(
            "mmrag_http_requests", "Requests by route and status.", (*labels, "status"),
            registry=self.registry,
        )  # fmt: skip
        self.seconds = Histogram(
            "mmrag_http_request_seconds", "Time to the end of the answer.", labels,
            buckets=_SECONDS, registry=self.registry,
        )  # fmt: skip
        self.batches = Histogram(
            "mmrag_embed_batch_contents", "Contents embedded together for queries.",
            buckets=(1, 2, 4, 8, 16, 32, 64), registry=self.registry,
        )  # fmt: skip

    def watch(self, gate: Gate, libraries: Libraries) -> None:
        """Add what is read when the figures are asked for."""
        for name, text, read in (
            ("mmrag_requests_running", "Searches and answers that run.", lambda: gate.running),
            ("mmrag_requests_waiting", "Searches and answers that wait.", lambda: gate.waiting),
            (
                "mmrag_jobs_active",
                "Files that wait for indexing or are indexed.",
                lambda: sum(library.writer.busy() for library in libraries),
            ),
        ):
            Gauge(name, text, registry=self.registry).set_function(read)

    def text(self) -> bytes:
        """All of it."""
        return generate_latest(self.registry)


class CountRequests:
    """ASGI middleware that counts and times requests."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        # What raises before a status was sent ends as a 500.
        started, status = time.perf_counter(), 500

        async def seen(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, seen)
        finally:
            # The pattern, not the path: ids in labels would grow without bound.
            route = getattr(scope.get("route"), "path", "other")
            method = scope["method"]
            self.metrics.requests.labels(method, route, str(status)).inc()
            self.metrics.seconds.labels(method, route).observe(time.perf_counter() - started)
