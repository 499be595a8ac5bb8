"""What an embedder takes: a text, an image, both, or a clip; and safe loading of images.

Images come as PIL images, paths, bytes, BytesIO, data URLs or numpy arrays. They are checked
against limits on bytes and pixels *before* they are decoded, turned upright by their EXIF
orientation, laid on white where they are transparent, and returned as RGB.
"""

from __future__ import annotations

import base64
import io
import os
import re
import struct
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from mmrag.errors import ContentError

ImageSource: TypeAlias = (
    Image.Image | str | os.PathLike[str] | bytes | bytearray | io.BytesIO | NDArray[Any]
)
Modality: TypeAlias = Literal["text", "image", "fused", "clip"]
UrlLoader: TypeAlias = Callable[[str], bytes]

_WEB_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
# Raster formats only: some that Pillow knows, such as EPS, start other programs to be decoded.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "JPEG2000", "AVIF", "PPM", "ICO")
# What Pillow's decoders raise for broken files.
_BROKEN = (
    *(OSError, SyntaxError, ValueError, EOFError, RuntimeError, OverflowError),
    *(TypeError, AttributeError, LookupError, struct.error, zlib.error),
)
_ON_THEIR_SIDE = (5, 6, 7, 8)  # EXIF orientations that swap width and height
# A progressive JPEG is decoded once for each of its scans: ten or so, but a hostile one has
# thousands. Pixels times scans may be this many times the limit on pixels.
_MOST_SCANS = 20
_START_OF_SCAN = b"\xff\xda"  # stands nowhere else in the coded pixels of a JPEG
_STRIP = 1 << 20  # pixels of a deep image that are scaled at once
# For images of the caller, each of which may be used by several threads at once.
_LOCKS = tuple(threading.RLock() for _ in range(32))
_SIXTEEN_BIT_MODES = ("I;16", "I;16B", "I;16L", "I;16N", "I", "F")


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """Upper bounds that an image must keep, checked before it is decoded.

    max_bytes: size of the encoded file, in bytes.
    max_pixels: width times height, in pixels.

    Examples:
        >>> from PIL import Image
        >>> load_image(Image.new("RGB", (40, 30)), limits=ImageLimits(max_pixels=2000)).size
        (40, 30)
    """

    max_bytes: int = 64 * 1024 * 1024
    max_pixels: int = 100_000_000


DEFAULT_LIMITS = ImageLimits()


@dataclass(frozen=True, slots=True)
class Clip:
    """A part of a video: frames in order, all of one size, and when each is shown.

    seconds: counted from the clip's beginning, one number for each frame.

    Raises:
        ContentError: For no frames, and for times that are not one a frame or do not go up.

    Examples:
        >>> clip = Clip(["0.jpg", "1.jpg", "2.jpg", "3.jpg"], [0, 1, 2, 3])
        >>> Content(clip=clip).modality
        'clip'
    """

    frames: Sequence[ImageSource]
    seconds: Sequence[float]

    def __post_init__(self) -> None:
        if not len(self.frames) or len(self.frames) != len(self.seconds):
            raise ContentError(
                f"A Clip needs frames and a time for each: got {len(self.frames)} frames and "
                f"{len(self.seconds)} times."
            )
        # Written so that NaN, which is not above anything, is refused too.
        if not (self.seconds[0] >= 0 and all(a <= b for a, b in pairwise(self.seconds))):
            raise ContentError("Clip.seconds must begin at 0 or later and never go back.")


@dataclass(frozen=True, slots=True)
class Content:
    """One thing to embed: a text, one or more images, or both; or a clip, alone or with them.

    ``image`` may be a sequence of images for families that take several; the others refuse
    more than one. ``instruction`` overrides the one given to ``Embedder.encode`` for this item.
    ``clip`` is for embedders whose ``modalities`` have ``clip``; the others refuse it.
    An empty text is a text; ``None`` means that there is none.

    Examples:
        >>> Content("a page about wells").modality
        'text'
        >>> Content("what is this?", image="photo.jpg").modality
        'fused'
    """

    text: str | None = None
    image: ImageSource | Sequence[ImageSource] | None = None
    instruction: str | None = None
    clip: Clip | None = None

    def __post_init__(self) -> None:
        if self.text is None and not self.images and self.clip is None:
            raise ContentError("A Content needs a text, an image or a clip; all are missing.")
        if self.clip is not None and not isinstance(self.clip, Clip):
            raise ContentError(f"Content.clip must be a Clip, got {type(self.clip).__name__}.")
        if self.text is not None and not isinstance(self.text, str):
            raise ContentError(f"Content.text must be a str, got {type(self.text).__name__}.")

    @property
    def images(self) -> tuple[ImageSource, ...]:
        """The images, in order; empty for a text."""
        if self.image is None:
            return ()
        if isinstance(self.image, (list, tuple)):
            return tuple(self.image)
        return (cast(ImageSource, self.image),)

    @property
    def modality(self) -> Modality:
        """``text``, ``image`` or ``fused`` (both); ``clip`` with a clip, whatever is beside it."""
        if self.clip is not None:
            return "clip"
        if not self.images:
            return "text"
        return "image" if self.text is None else "fused"


ContentLike: TypeAlias = Content | ImageSource | Clip | Mapping[str, Any]


def as_content(value: ContentLike) -> Content:
    """Turn a plain value into a Content.

    A ``str`` is a text, a path object, bytes, PIL image or array is an image, and a mapping
    has the keys ``text``, ``image``, ``clip`` and ``instruction``, any of which may be left out.

    Raises:
        ContentError: For anything else.
    """
    match value:
        case Content():
            return value
        case str():
            return Content(text=value)
        case Clip():
            return Content(clip=value)
        case Mapping():
            unknown = set(value) - {"text", "image", "clip", "instruction"}
            if unknown:
                known = "text, image, clip, instruction"
                raise ContentError(f"Unknown keys {sorted(unknown)}; use {known}.")
            return Content(**value)
        case Image.Image() | bytes() | bytearray() | io.BytesIO() | np.ndarray() | os.PathLike():
            return Content(image=value)
    raise ContentError(
        f"Cannot embed a {type(value).__name__}: give a str, an image (path object, bytes, PIL "
        "image, array), a mapping with text and image, or a Content."
    )


def load_image(
    source: ImageSource,
    *,
    limits: ImageLimits = DEFAULT_LIMITS,
    loader: UrlLoader | None = None,
    on_white: bool = True,
) -> Image.Image:
    """Load an image as upright RGB, transparent parts on white.

    With ``on_white=False`` they show the colour that is stored under them instead.

    A ``str`` is a path, a data URL, or a web address; web addresses are followed only by the
    ``loader`` given (it returns the bytes). Of an animated file the first frame is taken.
    16-bit images are scaled to 8 bits, floats in [0, 1] are taken as fractions of white.

    Raises:
        ContentError: If the source is missing, broken, of no known format, or too large.
    """
    name = describe(source)
    with _decoding(name), _open(source, limits, loader) as image:
        _check_pixels(image.size, name, limits)
        _check_scans(image, name, limits)
        image.load()
        return _to_rgb(_upright(image, own=image is not source), on_white)


def image_size(
    source: ImageSource,
    *,
    limits: ImageLimits = DEFAULT_LIMITS,
    loader: UrlLoader | None = None,
) -> tuple[int, int]:
    """Width and height in pixels, as they will be after EXIF rotation, without decoding.

    An orientation that a PNG states only after its pixels is not seen here.

    Raises:
        ContentError: As ``load_image`` does, except for damage beyond the header.
    """
    name = describe(source)
    with _decoding(name), _open(source, limits, loader) as image:
        _check_pixels(image.size, name, limits)
        width, height = image.size
        # PngImageFile.getexif would decode the whole image to look behind its pixels.
        orientation = orientation_of(Image.Image.getexif(image))
    # Pillow states the size of a TIFF as it will be once turned.
    turned = orientation in _ON_THEIR_SIDE and image.format != "TIFF"
    return (height, width) if turned else (width, height)


def describe(source: ImageSource) -> str:
    """A short name of an image for messages."""
    match source:
        case str() if _is_data_url(source):
            return "image from a data URL"
        case str() | os.PathLike():
            name = os.fspath(source)
            return name if len(name) <= 300 else f"{name[:300]}..."
        case Image.Image():
            return getattr(source, "filename", "") or f"image of {source.width}x{source.height}"
        case np.ndarray():
            return f"array of shape {source.shape}"
    return "image from bytes"


@contextmanager
def _decoding(name: str) -> Iterator[None]:
    """Turn what Pillow raises for a broken image, or one too large for memory, into our error."""
    try:
        yield
    except MemoryError as error:
        raise ContentError(
            f"{name}: there is not enough memory to decode the image; make it smaller."
        ) from error
    except _BROKEN as error:
        raise ContentError(
            f"{name}: the image is broken and cannot be decoded ({error})."
        ) from error


@contextmanager
def _open(
    source: ImageSource, limits: ImageLimits, loader: UrlLoader | None
) -> Iterator[Image.Image]:
    """Open an image lazily, header only; an image of the caller stays open."""
    if isinstance(source, Image.Image):
        # Pillow reads a file when its pixels are asked for: two threads would share its handle.
        with _LOCKS[id(source) // 64 % len(_LOCKS)]:
            yield source
    elif isinstance(source, np.ndarray):
        yield _from_array(source, limits)
    else:
        with _open_file(source, limits, loader) as image:
            yield image


def _open_file(
    source: str | os.PathLike[str] | bytes | bytearray | io.BytesIO,
    limits: ImageLimits,
    loader: UrlLoader | None,
) -> Image.Image:
    name = describe(source)
    raw = _raw(source, limits, loader)
    size = raw.stat().st_size if isinstance(raw, Path) else len(raw)
    if size > limits.max_bytes:
        raise ContentError(
            f"{name}: {size:,} bytes is over the limit of {limits.max_bytes:,}; "
            "make it smaller or raise ImageLimits.max_bytes."
        )
    try:
        with warnings.catch_warnings():
            # Our own limit on pixels is checked by the caller; Pillow's is a warning only.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return Image.open(raw if isinstance(raw, Path) else io.BytesIO(raw), formats=FORMATS)
    except UnidentifiedImageError as error:
        raise ContentError(
            f"{name}: not an image, or in none of the formats {', '.join(FORMATS)}."
        ) from error
    except Image.DecompressionBombError as error:
        raise ContentError(
            f"{name}: {error} Make it smaller; should it be trusted, raise "
            "PIL.Image.MAX_IMAGE_PIXELS and ImageLimits.max_pixels."
        ) from error


def _raw(
    source: str | os.PathLike[str] | bytes | bytearray | io.BytesIO,
    limits: ImageLimits,
    loader: UrlLoader | None,
) -> bytes | Path:
    """The encoded bytes, or the path to them."""
    if isinstance(source, (bytes, bytearray)):
        return bytes(source)
    if isinstance(source, io.BytesIO):
        return source.getvalue()
    if not isinstance(source, (str, os.PathLike)):
        raise ContentError(f"An image cannot be made from a {type(source).__name__}.")
    text = os.fspath(source)
    if _is_data_url(text):
        return _from_data_url(text, limits)
    if _WEB_ADDRESS.match(text):
        return _from_loader(text, loader)
    path = Path(text)
    try:
        found = path.is_file()
    except OSError:  # a name too long for the file system
        found = False
    if not found:
        raise ContentError(f"{describe(text)}: there is no such image file.")
    return path


def _is_data_url(text: str) -> bool:
    return text[:5].lower() == "data:"


def _from_data_url(url: str, limits: ImageLimits) -> bytes:
    head, comma, body = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise ContentError("A data URL must look like data:image/png;base64,...")
    # Before decoding: four characters of base64 are three bytes.
    if len(body) * 3 // 4 > limits.max_bytes:
        raise ContentError(f"The data URL is over the limit of {limits.max_bytes:,} bytes.")
    try:
        # Browsers and mail wrap long lines; validate would refuse the line ends.
        return base64.b64decode("".join(body.split()), validate=True)
    except ValueError as error:
        raise ContentError(f"The data URL is not valid base64 ({error}).") from error


def _from_loader(url: str, loader: UrlLoader | None) -> bytes:
    if loader is None:
        raise ContentError(
            f"{describe(url)}: web addresses are not followed; download the image, or pass a "
            "`loader` that returns its bytes."
        )
    try:
        raw = loader(url)
    except Exception as error:  # the loader is the caller's and may raise anything
        raise ContentError(f"{describe(url)}: the loader failed ({error}).") from error
    if not isinstance(raw, bytes):
        raise ContentError(f"{describe(url)}: the loader must return bytes, not {type(raw)}.")
    return raw


def _from_array(array: NDArray[Any], limits: ImageLimits) -> Image.Image:
    """Height x width, or height x width x 1, 3 or 4; uint8, uint16, bool, or float in [0, 1]."""
    name = describe(array)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise ContentError(f"{name}: an array must be (h, w), (h, w, 1), (h, w, 3) or (h, w, 4).")
    if 0 in array.shape:
        raise ContentError(f"{name}: the image is empty.")
    _check_pixels((array.shape[1], array.shape[0]), name, limits)
    # A slice or a transposed array has strides that Pillow does not take.
    return Image.fromarray(np.ascontiguousarray(_to_uint8(array, name)))


def _to_uint8(array: NDArray[Any], name: str) -> NDArray[np.uint8]:
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * np.uint8(255)
    if array.dtype.kind == "u" and array.dtype.itemsize == 2:  # in any byte order
        # 65535 / 257 is 255: white stays white.
        return np.round(array / 257).astype(np.uint8)
    if np.issubdtype(array.dtype, np.floating):
        if not np.isfinite(array).all() or array.min() < 0 or array.max() > 1:
            raise ContentError(f"{name}: a float image must be finite and within [0, 1].")
        return np.round(array * 255).astype(np.uint8)
    raise ContentError(f"{name}: pixels of type {array.dtype} are not supported; use uint8.")


def _check_pixels(size: tuple[int, int], name: str, limits: ImageLimits) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise ContentError(f"{name}: the image is empty ({width}x{height}).")
    if width * height > limits.max_pixels:
        raise ContentError(
            f"{name}: {width}x{height} is {width * height:,} pixels, over the limit of "
            f"{limits.max_pixels:,}; make it smaller or raise ImageLimits.max_pixels."
        )


def _check_scans(image: Image.Image, name: str, limits: ImageLimits) -> None:
    """Raise ContentError for a JPEG that takes minutes to decode."""
    stream = getattr(image, "fp", None)
    # Only progressive files decode all pixels once for each scan.
    if stream is None or not image.info.get("progressive"):
        return
    place = stream.tell()
    stream.seek(0)
    n_scans = stream.read(limits.max_bytes).count(_START_OF_SCAN)
    # Pillow goes on from where it stopped reading.
    stream.seek(place)
    if n_scans * image.width * image.height > _MOST_SCANS * limits.max_pixels:
        raise ContentError(
            f"{name}: {image.width}x{image.height} pixels in {n_scans:,} scans take too long to "
            "decode; save the image anew, as a JPEG that is not progressive or as a PNG."
        )


def orientation_of(exif: Image.Exif) -> int:
    """How an image is to be turned, as EXIF counts it; 1 is upright."""
    value = exif.get(ExifTags.Base.Orientation, 1)
    return value if isinstance(value, int) else 1


def _upright(image: Image.Image, own: bool) -> Image.Image:
    """The image turned as its EXIF data say. own: whether it may be changed."""
    if orientation_of(image.getexif()) == 1:
        return image
    # Pillow would write the EXIF data anew, and fail over damaged ones that it has just read.
    upright = image if own else image.copy()
    upright.getexif()
    upright.info.pop("exif", None)
    ImageOps.exif_transpose(upright, in_place=True)
    return upright


def _to_rgb(image: Image.Image, on_white: bool) -> Image.Image:
    if image.mode in _SIXTEEN_BIT_MODES:  # Pillow's own convert clips them at 255
        return _from_deep(image).convert("RGB")
    if on_white and image.has_transparency_data:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")  # a copy where it is RGB already


def _from_deep(image: Image.Image) -> Image.Image:
    """Scale 16-bit and float grey images to 8 bits."""
    # No field of the file says what is white: floats are in [0, 1] or [0, 255], integers of 8 or
    # 16 bits, and the brightest pixel tells which.
    white = 65535.0
    if image.mode in ("F", "I"):
        brightest = max((float(values.max()) for _, values in _strips(image)), default=0.0)
        if image.mode == "F":
            white = 1.0 if brightest <= 1.0 else 255.0
        elif brightest <= 255:
            white = 255.0
    transparent = image.info.get("transparency")  # one grey value, where a PNG declares it
    out = np.empty((image.height, image.width), np.uint8)
    for top, values in _strips(image):
        scaled = np.clip(values / white, 0, 1) * 255
        if isinstance(transparent, int):
            scaled[values == transparent] = 255
        out[top : top + len(values)] = np.round(scaled)
    return Image.fromarray(out)


def _strips(image: Image.Image) -> Iterator[tuple[int, NDArray[np.float64]]]:
    """The values of a grey image, some rows at a time, so that memory stays bounded."""
    rows = max(1, _STRIP // image.width)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        yield top, np.nan_to_num(np.asarray(strip, dtype=np.float64))
