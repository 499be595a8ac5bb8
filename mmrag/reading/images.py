"""Picture files: one upright PNG or JPEG within the pixel limit for each frame."""

from __future__ import annotations

import io
import math
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from mmrag.content import FORMATS, ImageLimits, load_image
from mmrag.errors import ContentError, is_environment_error
from mmrag.reading.files import write
from mmrag.reading.options import Problem, ReadOptions

_LIMITS = ImageLimits(max_bytes=1 << 40)  # the bytes of the file were checked before

# Pillow's decoders signal broken files by all of these.
_BROKEN = (
    ContentError, Image.DecompressionBombError, OSError, SyntaxError, ValueError, EOFError,
    KeyError, TypeError, struct.error,
)  # fmt: skip


def read_frames(
    path: Path, folder: Path, options: ReadOptions
) -> Iterator[tuple[int, Path] | Problem]:
    """Page number and image of each frame of a TIFF, of the first frame of any other file."""
    try:
        with warnings.catch_warnings():
            # load_image has a limit on pixels of its own; Pillow's is a warning only.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(path, formats=FORMATS)
        frames = getattr(image, "n_frames", 1) if image.format == "TIFF" else 1
    except _BROKEN as error:
        message = f"the image cannot be opened ({error}); it is damaged: get it again"
        yield Problem(None, message, is_environment_error(error))
        return
    with image:
        suffix = ".jpg" if image.format in ("JPEG", "MPO", "WEBP") else ".png"
        for page in range(1, frames + 1):
            out = folder / f"p{page:04d}{suffix}"
            if out.exists():
                yield page, out
                continue
            try:
                image.seek(page - 1)
                write(out, _encoded(load_image(image, limits=_LIMITS), out, options))
            except _BROKEN as error:
                message = f"the image cannot be decoded ({error}); it is left out"
                yield Problem(page, message, is_environment_error(error))
            else:
                yield page, out


def _encoded(image: Image.Image, out: Path, options: ReadOptions) -> bytes:
    shrink = math.sqrt(options.max_page_pixels / (image.width * image.height))
    if shrink < 1:
        size = (max(1, int(image.width * shrink)), max(1, int(image.height * shrink)))
        image = image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
    data = io.BytesIO()
    image.save(data, "JPEG" if out.suffix == ".jpg" else "PNG", quality=90)
    return data.getvalue()
