"""Whether the server is well, and what it has done."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response

from mmrag.server.state import Server

router = APIRouter()


@router.get("/health")
async def health() -> dict[str, str]:
    """The process answers."""
    return {"status": "ok"}


@router.get("/ready")
async def ready(server: Server) -> Response:
    """Requests are taken; 503 while the server stops or its queue is full."""
    gate = server.gate
    full = gate.waiting >= gate.max_waiting and gate.running >= gate.slots
    state = "stopping" if server.stopping else "busy" if full else "ready"
    return JSONResponse({"status": state}, 200 if state == "ready" else 503)


@router.get("/metrics")
async def metrics(server: Server) -> Response:
    """Figures for Prometheus."""
    return Response(server.metrics.text(), media_type="text/plain; version=0.0.4")
