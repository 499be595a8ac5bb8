"""Text recognition by RapidOCR (PP-OCR models, in its package); the ``ocr`` extra."""

from __future__ import annotations

import functools
import importlib.util
import logging
from typing import Any

from mmrag.errors import ConfigError
from mmrag.reading.columns import Word

INSTALL = "pip install 'mmrag[ocr]'"


def available() -> bool:
    """Whether the ``ocr`` extra is installed."""
    return all(importlib.util.find_spec(name) for name in ("rapidocr", "onnxruntime"))


def require() -> None:
    """Raise ConfigError with the line to install if the ``ocr`` extra is missing."""
    if not available():
        raise ConfigError(f"Reading with ocr='force' needs the ocr extra: {INSTALL}")


def recognise(png: bytes, scale: float) -> list[Word]:
    """The words on an image. scale: pixels per point, for the boxes."""
    found = _engine()(png, return_word_box=True)
    if found.txts is None:
        return []
    words: list[Word] = []
    for number, line in enumerate(found.word_results):
        for text, _, corners in line:
            if corners is not None:
                # Four corners, since the words of a skewed scan lean; a box is enough here.
                xs = [float(x) / scale for x, _ in corners]
                ys = [float(y) / scale for _, y in corners]
                words.append(Word(text, (min(xs), min(ys), max(xs), max(ys)), 0, number))
    return words


@functools.cache
def _engine() -> Any:
    from rapidocr import RapidOCR

    # It logs at INFO which models it loads, and warns of every image without text.
    logging.getLogger("RapidOCR").setLevel(logging.ERROR)
    return RapidOCR()
