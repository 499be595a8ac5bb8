"""What may be sent to a model: harmless text, estimates of tokens, encoded images."""

from __future__ import annotations

import base64
import io
import re
import secrets
import unicodedata
from collections.abc import Iterable, Sequence

from PIL import Image

PIXELS_PER_TOKEN = 28 * 28  # of the Qwen-VL families; other chat models take fewer tokens
BYTES_PER_TOKEN = 3  # UTF-8; English has more than 4, so this errs on the safe side

_OPEN, _CLOSE = r"[\[\u3010\uff3b\u3014\u27e6]", r"[\]\u3011\uff3d\u3015\u27e7]"
_BETWEEN = r"\s{0,3}(?:[,;&\uff0c\u3001\u2013-]|and\b)\s{0,3}(?:(?:source|doc)s?\s{0,3})?"
# Every repetition is bounded: answers and documents are text from outside.
CITATION = re.compile(
    rf"{_OPEN}{{1,2}}\s{{0,3}}(?:(?:sources?|docs?|documents?|refs?)\.?\s{{0,3}}|\^)?"
    rf"(\d{{1,4}}(?:{_BETWEEN}\d{{1,4}}){{0,40}})"
    r"(?:\u2020[^\]\u3011\n]{0,80}|\s{0,3}[,:]\s{0,3}p(?:ages?|p?\.)\s{0,3}[\d\u2013-]{1,9})?"
    rf"\s{{0,3}}{_CLOSE}{{1,2}}",
    re.IGNORECASE,
)
"""A citation in the spellings that models use: ``[1]``, ``[1, 2]``, ``[Source 3]``, ``[^4]``."""
# Anything like a tag or a chat marker, in half or full width: the markers of models to come are
# not known. Single letters are the formatting of HTML, but for <s>, which begins a turn. Words in
# capitals between square brackets are the markers of the Mistral family.
_TAG = re.compile(
    r"([<\uff1c]{1,2})(/?(?:s|[|\uff5c!?]?[A-Za-z_|\uff5c][^<>\uff1c\uff1e\n]{1,60}))"
    r"([>\uff1e]{1,2})",
    re.IGNORECASE,
)
_BRACKET_MARKER = re.compile(
    r"([\[\uff3b])(/?(?:[A-Z][A-Z_]{1,30}|(?i:inst|system_prompt|think|img)))([\]\uff3d])"
)


_INVISIBLE = frozenset({"Cc", "Cf", "Co", "Cn"})  # control, format, private use, unassigned


def broken_up(text: str, marks: Sequence[str]) -> str:
    """The text with control tokens spelt apart, so that it cannot end its own turn."""
    for mark in marks:
        if mark in text:
            text = text.replace(mark, f"{mark[0]} {mark[1:]}")
    return text


def estimate_tokens(text: str) -> int:
    """A cautious count of a text's tokens, for any tokenizer."""
    # By bytes, for any script: a tokenizer has more tokens for a rare one, and it more bytes.
    return -(-len(text.encode("utf-8")) // BYTES_PER_TOKEN)


def sanitize(text: str) -> str:
    """A document's text made harmless to the format of a prompt; the words stay.

    Chat markers and tags such as ``<|im_end|>``, ``<tool_call>`` and ``[INST]`` get spaces
    inside their brackets, invisible and control characters are dropped, and ``[3]`` becomes
    ``(ref 3)``.
    """
    # What nobody sees can hold instructions that people do not notice. The joiners U+200C and
    # U+200D stay: Persian and Indic scripts need them.
    visible = "".join(
        char
        for char in text
        if char in "\n\t\u200c\u200d" or unicodedata.category(char) not in _INVISIBLE
    )
    # Spaces inside the brackets, so that no tokenizer takes a marker for its own.
    apart = _BRACKET_MARKER.sub(r"\1 \2 \3", _TAG.sub(r"\1 \2 \3", visible))
    # A document's own reference must not be taken for a citation of ours.
    return CITATION.sub(r"(ref \1)", apart)


def new_boundary(texts: Iterable[str]) -> str:
    """A random mark for the fences of one request that occurs in none of its texts."""
    joined = "\n".join(texts)
    while (boundary := secrets.token_hex(8)) in joined:
        pass
    return boundary


def image_bytes(image: Image.Image, max_pixels: int, max_bytes: int | None) -> tuple[bytes, str]:
    """An image scaled and encoded, with its type: PNG where that is small enough, else JPEG.

    ``max_bytes`` of None is no bound: always PNG.
    """
    image = _scaled(image, max_pixels)
    data = _saved(image, "PNG")
    # PNG first: text and lines of a page suffer most from JPEG.
    if max_bytes is None or len(data) <= max_bytes:
        return data, "image/png"
    data = _saved(image, "JPEG")
    # Halved until it fits: how far JPEG compresses an image cannot be foretold.
    while len(data) > max_bytes and image.width * image.height > 1:
        image = _scaled(image, max(1, image.width * image.height // 2))
        data = _saved(image, "JPEG")
    return data, "image/jpeg"


def data_url(
    image: Image.Image, max_pixels: int | None = None, max_bytes: int | None = None
) -> str:
    """An image as servers take it, within bounds on its pixels and bytes; None: no bound."""
    pixels = image.width * image.height if max_pixels is None else max_pixels
    data, mimetype = image_bytes(image, pixels, max_bytes)
    return f"data:{mimetype};base64,{base64.b64encode(data).decode()}"


def _scaled(image: Image.Image, pixels: int) -> Image.Image:
    ratio = (pixels / (image.width * image.height)) ** 0.5
    if ratio >= 1:
        return image
    size = (max(1, int(image.width * ratio)), max(1, int(image.height * ratio)))
    return image.resize(size, Image.Resampling.LANCZOS)


def _saved(image: Image.Image, form: str) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **({"quality": 85} if form == "JPEG" else {}))
    return stream.getvalue()
