"""Images of pages: whole, small, or with boxes marked. Only images of the collection are read."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from PIL import Image

from mmrag.nodes import node_image
from mmrag.reading import Box, ReadOptions, file_sha256, save_marked_page
from mmrag.reading.marking import mark_boxes
from mmrag.server.errors import not_found
from mmrag.store.collection import Collection
from mmrag.store.images import original_path

MAX_WIDTH = 4000
_POINTS_PER_INCH = 72


def page_image_bytes(
    collection: Collection,
    file_id: str,
    page: int,
    boxes: Sequence[Box] = (),
    width: int | None = None,
) -> tuple[bytes, str]:
    """Image and media type of a page, marked and scaled down to ``width`` pixels as asked.

    Raises:
        ApiError: 404 if the collection has no such page, or its image lies elsewhere.
    """
    path = find_page_image(collection, file_id, page)
    if not boxes and width is None:
        return path.read_bytes(), "image/jpeg" if path.suffix == ".jpg" else "image/png"
    original = None
    if boxes:  # marking may have to draw the page anew; the hash shows whether it is the same file
        files = (entry for entry in collection.files() if entry.sha256 == file_id)
        if (entry := next(files, None)) is not None:
            original = (original_path(vars(entry), collection.images_dir), entry.sha256)
    reading = ReadOptions(**collection.settings.reading)
    # A part of the cache's key: reading a file anew replaces its images under the same name.
    changed = path.stat().st_mtime_ns
    return _rendered(path, changed, page, tuple(boxes), width, reading, original)


def find_page_image(collection: Collection, file_id: str, page: int) -> Path:
    """The stored image of a page; see ``page_image_bytes``."""
    for node in collection.file_nodes(file_id, page):
        stored = node.metadata.get("page_image") or node_image(node)
        if stored is None:
            continue
        # A node may name any path on this machine. Only images that indexing made are shown.
        path = Path(stored).resolve()
        if path.is_relative_to(collection.images_dir.resolve()) and path.is_file():
            return path
    raise not_found(f"The collection has no image of page {page} of the file {file_id[:16]}.")


# Thumbnails of the same pages are asked for again and again; 64 marked pages are about 30 MB.
@lru_cache(maxsize=64)
def _rendered(
    path: Path,
    _changed: int,
    page: int,
    boxes: tuple[Box, ...],
    width: int | None,
    reading: ReadOptions,
    original: tuple[Path, str] | None,
) -> tuple[bytes, str]:
    data = path.read_bytes()
    if boxes:
        data = _marked(data, page, boxes, reading, original)
    if width is None:
        return data, "image/png"
    image = Image.open(io.BytesIO(data)).convert("RGB")
    # Never enlarged: the browser does that as well, for fewer bytes.
    if width < image.width:
        height = max(1, round(image.height * width / image.width))
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    # WebP takes a fraction of PNG's bytes; method 2 is fast enough to be done on request.
    image.save(stream, "WEBP", quality=80, method=2)
    return stream.getvalue(), "image/webp"


def _marked(
    data: bytes,
    page: int,
    boxes: Sequence[Box],
    reading: ReadOptions,
    original: tuple[Path, str] | None,
) -> bytes:
    """The image with boxes marked."""
    # Reading scales large pages down to ``max_page_pixels``: their images no longer tell how many
    # pixels a point has, so such a page is drawn anew from its file.
    with Image.open(io.BytesIO(data)) as image:
        # Rounding to whole pixels leaves an image that was scaled down slightly below the limit.
        scaled_down = image.width * image.height > 0.99 * reading.max_page_pixels
    if not scaled_down:
        return mark_boxes(data, boxes, reading.dpi / _POINTS_PER_INCH)
    if original is None or not original[0].is_file() or file_sha256(original[0]) != original[1]:
        raise not_found("Cannot mark this large page: its file was moved, changed or deleted.")
    with tempfile.TemporaryDirectory() as folder:
        return save_marked_page(original[0], page, boxes, Path(folder) / "page.png").read_bytes()
