"""The web page: static files of this package, nothing from anywhere else."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter, Response
from fastapi.responses import FileResponse

from mmrag.server.errors import not_found

router = APIRouter()

_FOLDER = Path(__file__).parents[1] / "web"
_KINDS = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}
# Listed once, so that no request can name a path.
_FILES = {path.name: path for path in _FOLDER.iterdir()}
# Asked for anew each time, which costs a 304: an upgrade must not meet old scripts.
_HEADERS = {"Cache-Control": "no-cache"}


@router.get("/", include_in_schema=False)
async def page() -> Response:
    """The page."""
    return await static("index.html")


@router.get("/static/{name}", include_in_schema=False)
async def static(name: str) -> Response:
    """A script, the style, or the icon."""
    if name not in _FILES:
        raise not_found(f"There is no {name} here.")
    path = _FILES[name]
    return FileResponse(path, media_type=_KINDS[path.suffix], headers=_HEADERS)
