"""Characters of a text: which are mended, which are dropped, and how their scripts behave."""

from __future__ import annotations

import re
import unicodedata

from mmrag.reading.symbols import PRIVATE_USE

_LIGATURES = {
    "\ufb00": "ff", "\ufb01": "fi", "\ufb02": "fl", "\ufb03": "ffi", "\ufb04": "ffl",
    "\ufb05": "st", "\ufb06": "st",
}  # fmt: skip
_DROPPED = "\u200b\u2060\ufeff\ufffd\ufffe\uffff"
_SPACES = "\u00a0\u2007\u202f\u2028\u2029\u0085\x0b\x0c"
_TABLE = str.maketrans(
    _LIGATURES
    | dict.fromkeys(_DROPPED, "")
    | dict.fromkeys(_SPACES, " ")
    | {chr(code): char for code, char in PRIVATE_USE.items()}
)
# Glyph variants that stand for letters: Arabic and Hebrew presentation forms, and radicals
# that some fonts give in place of the ideograph. No reader types them into a question.
_VARIANTS = re.compile("[\u2e80-\u2fdf\ufb1d-\ufdff\ufe70-\ufefc]+")
# Control characters, lone surrogates, private use, unassigned.
MEANINGLESS = frozenset({"Cc", "Cs", "Co", "Cn"})
# Scripts that are written without spaces between words.
UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3001-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\uff01-\uff60"
)
_UNSPACED = re.compile(f"[{UNSPACED}\U00020000-\U0003ffff]")


def clean(text: str) -> str:
    """Text in plain characters, without those that mean nothing, such as control characters.

    Ligatures and glyph variants are spelt out, and the codes of symbol fonts mapped to Unicode.
    """
    if text.isascii() and text.isprintable():
        return text
    # NFKC has a lone vowel sign stand on a space, which no text has.
    text = _VARIANTS.sub(
        lambda match: unicodedata.normalize("NFKC", match[0]).replace(" ", ""),
        text.translate(_TABLE),
    )
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in MEANINGLESS)


def is_unspaced(text: str) -> bool:
    """Whether a text has characters of a script without spaces, as Chinese or Thai."""
    return _UNSPACED.search(text) is not None


def is_right_to_left(text: str) -> bool:
    """Whether a text has Hebrew, Arabic or other letters that run to the left."""
    if text.isascii():
        return False
    return any(unicodedata.bidirectional(c) in ("R", "AL") for c in text)


def is_left_to_right(text: str) -> bool:
    """Whether a text has letters that run to the right."""
    return any(unicodedata.bidirectional(c) == "L" for c in text)
