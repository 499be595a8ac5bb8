"""Pages as small images, with the passage marked that comes nearest to a text."""

from __future__ import annotations

import base64
import io
import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path

from llama_index.core.schema import NodeWithScore
from PIL import Image

from mmrag.answering.citations import best_passage
from mmrag.answering.context import Source
from mmrag.errors import MMRagError
from mmrag.evaluation.questions import Page
from mmrag.nodes import node_image, node_text
from mmrag.queries import Where
from mmrag.reading import locate_quote, save_marked_page
from mmrag.store.collection import Collection

logger = logging.getLogger(__name__)

_WIDTH = 680  # pixels: small print of a letter page can be read, at about 50 kB a page
_NODES = 500  # of a page


@dataclass(frozen=True)
class ShownPage:
    """A page of a report. src: a data URL; None where the collection keeps no image of it.

    quote: the passage that comes nearest to what is wanted; marked, whether it is marked.
    """

    page: Page
    label: str
    src: str | None
    quote: str = ""
    marked: bool = False


def show_page(collection: Collection, page: Page, wanted: str) -> ShownPage:
    """The image of a page with the passage marked that comes nearest to ``wanted``."""
    file, number = page
    found = collection.find(Where(files=(file,), pages=(number, number)), _NODES)
    nodes = [collection.node(hit.payload) for hit in found]
    label = f"{file}, page {number}"
    whole = next((node for node in nodes if node.metadata.get("kind") == "page"), None)
    images = [node.metadata.get("page_image") or node_image(node) for node in nodes]
    image = next((Path(each) for each in images if each and Path(each).is_file()), None)
    if whole is None or image is None:
        return ShownPage(page, label, None)
    text = node_text(whole)
    source = Source(1, file, number, NodeWithScore(node=whole), text)
    nearest = best_passage(wanted, source)
    quote = nearest.quote if nearest and nearest.support > 0 else ""
    data, marked = _marked(source.path, number, quote, image)
    return ShownPage(page, label, _data_url(data), quote, marked)


def _marked(path: Path, number: int, quote: str, image: Path) -> tuple[bytes, bool]:
    """The page's image as PNG, the quote marked if it can be located."""
    try:
        boxes = locate_quote(path, number, quote, image) if quote else []
        if boxes:
            with tempfile.TemporaryDirectory() as folder:
                out = save_marked_page(path, number, boxes, Path(folder) / "page.png", image)
                return out.read_bytes(), True
    except (MMRagError, OSError) as error:
        logger.warning("%s, page %d is shown without a mark: %s", path.name, number, error)
    return image.read_bytes(), False


def _data_url(data: bytes) -> str:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    if image.width > _WIDTH:
        size = (_WIDTH, max(1, round(image.height * _WIDTH / image.width)))
        image = image.resize(size, Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    image.save(stream, "WEBP", quality=60, method=4)
    return f"data:image/webp;base64,{base64.b64encode(stream.getvalue()).decode()}"
