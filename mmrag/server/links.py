"""Addresses of page images, and of the view of a page in the web page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from urllib.parse import urlencode

from mmrag.errors import ConfigError
from mmrag.reading import Box

MAX_BOXES = 200


def page_image_url(
    collection: str, file_id: str, page: int, boxes: Iterable[Sequence[float]] = ()
) -> str:
    """The image of a page, with boxes (in points) marked; relative to the server."""
    query = {"collection": collection}
    if marks := format_boxes(boxes):
        query["mark"] = marks
    return f"/api/files/{file_id}/pages/{page}/image?{urlencode(query)}"


def view_url(
    base: str,
    collection: str,
    file_id: str,
    page: int | None,
    boxes: Iterable[Sequence[float]] = (),
) -> str:
    """The web page with a page of a file open. base: how the server is reached, without ``/``."""
    query = {"collection": collection, "file": file_id}
    if page is not None:
        query["page"] = str(page)
    if marks := format_boxes(boxes):
        query["mark"] = marks
    return f"{base}/#view?{urlencode(query)}"


def format_boxes(boxes: Iterable[Sequence[float]]) -> str:
    """Boxes for an address: ``72,80.5,400,96;72,100,180,112``."""
    # A tenth of a point is less than a pixel at 144 dpi, and keeps addresses short.
    return ";".join(",".join(f"{round(edge, 1):g}" for edge in box) for box in boxes)


def parse_boxes(text: str | None) -> tuple[Box, ...]:
    """The boxes that ``format_boxes`` gave. Raises ConfigError for anything else."""
    if not text:
        return ()
    try:
        boxes = tuple(tuple(float(edge) for edge in box.split(",")) for box in text.split(";"))
    except ValueError:
        boxes = ((),)
    # Comparisons are False for NaN, and an infinite edge cannot be drawn.
    sound = all(len(box) == 4 and all(abs(edge) < 1e6 for edge in box) for box in boxes)
    if not sound or len(boxes) > MAX_BOXES:
        raise ConfigError(
            f"mark: give at most {MAX_BOXES} boxes as x0,y0,x1,y1 in points, joined by semicolons."
        )
    # Clients may give the corners in any order.
    return tuple(_upright(*box) for box in boxes)


def _upright(x0: float, y0: float, x1: float, y1: float) -> Box:
    return (min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1))
