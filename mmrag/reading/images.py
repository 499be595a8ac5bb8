"""Image files: one upright PNG or JPEG within the pixel limit for each frame; runs in a worker."""

from __future__ import annotations

import io
import math
import struct
import warnings
from collections.abc import Generator, Iterator
from pathlib import Path

from PIL import Image

from mmrag.content import FORMATS, ImageLimits, load_image, orientation_of
from mmrag.errors import ContentError, is_environment_error
from mmrag.reading import layout, ocr
from mmrag.reading.files import write
from mmrag.reading.layout import Token
from mmrag.reading.options import (
    PageRecord,
    Problem,
    ReadOptions,
    Refused,
    Skipped,
    Step,
    TextLayer,
)
from mmrag.reading.pagewords import PageWords, save_words

_LIMITS = ImageLimits(max_bytes=1 << 40)  # the bytes of the file were checked before
_JPEG_QUALITY = 90

# Pillow's decoders signal broken files by all of these.
_BROKEN = (
    ContentError, Image.DecompressionBombError, OSError, SyntaxError, ValueError, EOFError,
    KeyError, TypeError, MemoryError, struct.error,
)  # fmt: skip


def read_frames(
    path: Path, folder: Path, options: ReadOptions, first: int, skipped: Skipped
) -> Iterator[PageRecord | Problem | Step]:
    """Each frame of a TIFF from ``first`` on; the one or the first image of any other file."""
    yield Step(None, "open")
    with _opened(path) as image:
        many = image.format == "TIFF"
        # Lossy files stay lossy: a photograph as PNG would be several times larger.
        suffix = ".jpg" if image.format in ("JPEG", "MPO", "WEBP") else ".png"
        number = first
        while number == 1 or many:
            yield Step(number, "image")
            if number > options.max_pages:
                message = f"only the first {options.max_pages:,} frames are read"
                yield Problem(None, f"{message}: split the file, or raise max_pages")
                return
            try:
                # Frames are not counted before: that would read through the whole file.
                image.seek(number - 1)
            except EOFError:
                return
            except _BROKEN as error:
                yield _problem(number, error)
                return  # where the next frame is stands in this one
            if (number, "image") not in skipped:
                out = folder / f"p{number:04d}{suffix}"
                yield from _read_frame(path, image, number, out, options, skipped)
            number += 1


def _opened(path: Path) -> Image.Image:
    try:
        with warnings.catch_warnings():
            # load_image has a limit on pixels of its own; Pillow's is a warning only.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return Image.open(path, formats=FORMATS)
    except _BROKEN as error:
        if is_environment_error(error):
            raise
        message = f"the image cannot be opened ({error}); it is damaged: get it again"
        raise Refused(message) from error


def _read_frame(
    path: Path,
    image: Image.Image,
    number: int,
    out: Path,
    options: ReadOptions,
    skipped: Skipped,
) -> Iterator[PageRecord | Problem | Step]:
    try:
        decoded = None if out.exists() else _save_frame(path, image, out, options)
    except _BROKEN as error:
        if isinstance(error, OSError) and is_environment_error(error):
            raise
        yield _problem(number, error)
        return
    tokens = yield from recognised(out, number, options, skipped, decoded)
    layer: TextLayer = "ocr" if tokens else "none"
    yield PageRecord(
        page=number,
        image=out.as_posix(),
        text=layout.text_of(tokens or []),
        text_layer=layer,
        needs_ocr=tokens is None,
    )


def recognised(
    image: Path,
    number: int,
    options: ReadOptions,
    skipped: Skipped,
    decoded: Image.Image | None = None,
) -> Generator[Step | Problem, None, list[Token] | None]:
    """The words in an image file, which are saved beside it; None if it was not looked at.

    number: of the frame that it is. decoded: the same in RGB, if that is at hand.
    """
    if decoded is None:
        with Image.open(image) as opened:
            decoded = opened.convert("RGB")
    if len(decoded.getcolors(maxcolors=1) or ()) == 1:
        return []  # of one colour only
    if options.ocr == "off" or (number, "recognition") in skipped:
        return None
    yield Step(number, "recognition")
    try:
        tokens = layout.in_reading_order(ocr.recognise(image.read_bytes(), scale=1.0))
    except Exception as error:  # noqa: BLE001 - the recogniser may raise anything
        yield Problem(number, f"its text cannot be recognised ({error}); it has none")
        return None
    if tokens:
        save_words(image, PageWords(tokens, 1.0))
    return tokens


def _save_frame(path: Path, image: Image.Image, out: Path, options: ReadOptions) -> Image.Image:
    if image.format == "JPEG":  # decoded at a half, a quarter or an eighth, if that will do
        scale = _shrink(image.size, options)
        image.draft("RGB", (math.ceil(image.width * scale), math.ceil(image.height * scale)))
    loaded = load_image(image, limits=_LIMITS)  # decodes it all, so that damage shows
    # A PNG would take longer to encode than all else, and a JPEG would lose quality.
    write(out, path.read_bytes() if _is_ready(image, options) else encoded(loaded, out, options))
    return loaded


def _is_ready(image: Image.Image, options: ReadOptions) -> bool:
    """Whether the file of a decoded image is what is to be stored."""
    return (
        image.format in ("PNG", "JPEG")
        and image.mode == "RGB"
        and not image.has_transparency_data
        and getattr(image, "n_frames", 1) == 1
        and orientation_of(image.getexif()) == 1
        and _shrink(image.size, options) == 1
    )


def _problem(number: int, error: BaseException) -> Problem:
    message = f"the image cannot be decoded ({error}); it is left out"
    retry = is_environment_error(error) or isinstance(error.__cause__, MemoryError)
    return Problem(number, message, retry)


def _shrink(size: tuple[int, int], options: ReadOptions) -> float:
    """What width and height are to be multiplied by, 1 at most."""
    return min(1.0, math.sqrt(options.max_page_pixels / (size[0] * size[1])))


def encoded(image: Image.Image, out: Path, options: ReadOptions) -> bytes:
    """An image within the pixel limit, as JPEG or PNG by the suffix of ``out``."""
    scale = _shrink(image.size, options)
    if scale < 1:
        size = (max(1, int(image.width * scale)), max(1, int(image.height * scale)))
        image = image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
    data = io.BytesIO()
    image.save(data, "JPEG" if out.suffix == ".jpg" else "PNG", quality=_JPEG_QUALITY)
    return data.getvalue()
