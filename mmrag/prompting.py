"""What may be sent to a model: harmless text, estimates of tokens, encoded images."""

from __future__ import annotations

import io
import re
import secrets
import unicodedata
from collections.abc import Iterable, Sequence

from PIL import Image


def broken_up(text: str, marks: Sequence[str]) -> str:
    """The text with control tokens spelt apart, so that it cannot end its own turn."""
    for mark in marks:
        if mark in text:
            text = text.replace(mark, f"{mark[0]} {mark[1:]}")
    return text


PIXELS_PER_TOKEN = 28 * 28  # of the Qwen-VL families; other chat models take fewer tokens


BYTES_PER_TOKEN = 3  # UTF-8; English has more than 4, so this errs on the safe side


def estimate_tokens(text: str) -> int:
    """A cautious count of a text's tokens, for any tokenizer."""
    return -(-len(text.encode("utf-8")) // BYTES_PER_TOKEN)


def sanitize(text: str) -> str:
    """A document's text made harmless to the format of a prompt; the words stay.

    Chat markers such as ``<|im_end|>`` are broken up, so that no tokenizer takes them for its
    own; invisible and control characters, which hide instructions from people, are dropped; and
    ``[3]`` becomes ``(ref 3)``, so that a paper's reference is not copied as our citation.
    """
    visible = "".join(c for c in text if c in "\n\t\u200c\u200d" or not _invisible(c))
    broken = _CHAT_MARKER.sub(
        lambda match: f"{match[0][0]} {match[0][1:-1]} {match[0][-1]}", visible
    )
    return _REFERENCE.sub(r"(ref \1)", broken)


_CHAT_MARKER = re.compile(
    r"<[|\uff5c][^|\uff5c<>\n]{1,60}[|\uff5c]>|</?s>|<</?SYS>>|</?(?:start|end)_of_turn>"
    r"|\[/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS|THINK|IMG)\]"
    r"|</?(?:think|thinking|thought|reasoning|image|img|audio|video)>|<(?:bos|eos|pad)>",
    re.IGNORECASE,
)


_REFERENCE = re.compile(
    r"[\[\u3010\uff3b\u3014](\d{1,3}(?:\s*[,;\uff0c\u3001\u2013-]\s*\d{1,3})*)[\]\u3011\uff3d\u3015]"
)


def _invisible(char: str) -> bool:
    return unicodedata.category(char) in ("Cc", "Cf", "Co", "Cn")


def new_boundary(texts: Iterable[str]) -> str:
    """A random mark for the fences of one request that occurs in none of its texts."""
    joined = "\n".join(texts)
    while (boundary := secrets.token_hex(8)) in joined:
        pass
    return boundary


def image_bytes(image: Image.Image, max_pixels: int, max_bytes: int) -> tuple[bytes, str]:
    """An image scaled and encoded, with its type: PNG where that is small enough, else JPEG."""
    image = _scaled(image, max_pixels)
    data = _saved(image, "PNG")
    if len(data) <= max_bytes:
        return data, "image/png"
    data = _saved(image, "JPEG")
    while len(data) > max_bytes and image.width * image.height > 1:
        image = _scaled(image, max(1, image.width * image.height // 2))
        data = _saved(image, "JPEG")
    return data, "image/jpeg"


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
