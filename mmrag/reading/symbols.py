"""What the characters of Symbol, Wingdings and Zapf Dingbats mean in Unicode.

These fonts draw Greek letters, operators or check marks where others draw letters. A PDF gives
them as the codes of the font, plain or in the private use area from U+F000 on.
Sources: Adobe's Symbol and Zapf Dingbats encodings (PDF 32000-1, annex D.5 and D.6), and
Unicode's mapping of Wingdings (L2/11-052R).
"""

from __future__ import annotations

import re

_PRIVATE = 0xF000  # where the codes of a symbol font are put by its (3, 0) cmap

_SYMBOL_LOW = (
    " !∀#∃%&∋()∗+,−./0123456789:;<=>?≅ΑΒΧΔΕΦΓΗΙϑΚΛΜΝΟΠΘΡΣΤΥςΩΞΨΖ[∴]⊥_\u203e"
    "αβχδεφγηιϕκλμνοπθρστυϖωξψζ{|}∼"
)  # from 0x20
_SYMBOL_HIGH = (
    "€ϒ′≤⁄∞ƒ♣♦♥♠↔←↑→↓°±″≥×∝∂•÷≠≡≈…⏐⎯↵ℵℑℜ℘⊗⊕∅∩∪⊃⊇⊄⊂⊆∈∉∠∇®©™∏√⋅¬∧∨⇔⇐⇑⇒⇓◊⟨®©™∑⎛⎜⎝⎡⎢⎣⎧⎨⎩⎪"
    "\ufffd⟩∫⌠⎮⌡⎞⎟⎠⎤⎥⎦⎫⎬⎭"
)  # from 0xA0
SYMBOL = {
    first + i: char
    for first, chars in ((0x20, _SYMBOL_LOW), (0xA0, _SYMBOL_HIGH))
    for i, char in enumerate(chars)
}

# Pictures that stand for nothing but the beginning of a list item become one bullet.
_BULLETS = (*range(0x6C, 0x78), 0x9E, 0x9F, 0xA4, 0xA7, 0xAA, 0xD8, 0xDC)
WINGDINGS = (
    {0x20: " "}
    | dict.fromkeys(_BULLETS, "•")
    | {0x6F: "☐", 0xA8: "☐", 0x78: "☒", 0xFB: "✗", 0xFC: "✓", 0xFD: "☒", 0xFE: "☑"}
    | {0x28: "☎", 0x2A: "✉", 0x46: "☞", 0x4A: "☺", 0x4C: "☹", 0xDF: "←", 0xE0: "→"}
    | {0xE1: "↑", 0xE2: "↓", 0xE8: "→", 0xEF: "⇦", 0xF0: "⇨", 0xF1: "⇧", 0xF2: "⇩"}
    | {0x80 + n: chr(0x2460 + n - 1) for n in range(1, 11)}
    | {0x8B + n: chr(0x2776 + n - 1) for n in range(1, 11)}
)

# Unicode's block was made after the font; what other blocks had before is missing from it.
DINGBATS = (
    {0x20: " "}
    | {code: chr(0x2700 + code - 0x20) for code in range(0x21, 0x7F)}
    | {code: chr(0x2700 + code - 0x40) for code in range(0xA1, 0xFF)}
    | dict(
        zip((0x25, 0x2A, 0x2B, 0x48, 0x6C, 0x6E, 0x73, 0x74, 0x75, 0x77), "☎☛☞★●■▲▼◆◗", strict=True)
    )
    | dict(zip((0xA8, 0xA9, 0xAA, 0xAB, 0xD5, 0xD6, 0xD7), "♣♦♥♠→↔↕", strict=True))
    | {0xAC + n: chr(0x2460 + n) for n in range(10)}
)

_FONTS = (
    (re.compile(r"Symbol(MT|PS|Std)?([-,].*)?"), SYMBOL),
    (re.compile(r"Wingdings(-?Regular)?([-,].*)?", re.IGNORECASE), WINGDINGS),
    (re.compile(r"(ITC)?Zapf ?Dingbats(ITC|Std|MT)?([-,].*)?", re.IGNORECASE), DINGBATS),
)


def table_of(font: str) -> dict[int, str] | None:
    """The codes of a symbol font by its name, with or without a subset's prefix; else None."""
    name = re.sub(r"^[A-Z]{6}\+", "", font)
    return next((table for pattern, table in _FONTS if pattern.fullmatch(name)), None)


def spelt_out(text: str, table: dict[int, str]) -> str:
    """Text of a symbol font in Unicode; what is no code of the font stays."""
    return "".join(table.get(_code(char), char) for char in text)


def _code(char: str) -> int:
    code = ord(char)
    return code - _PRIVATE if _PRIVATE <= code < _PRIVATE + 256 else code


# Where the font is not known, a private character is one of Symbol, but for those codes that
# Word takes from Wingdings for bullets and check boxes, and that Symbol hardly uses.
_OF_WINGDINGS = (0x76, 0xA7, 0xA8, 0xD8, 0xFB, 0xFC, 0xFD, 0xFE)
# Adobe's own private characters for the parts of large brackets and the serifless marks.
_ADOBE = dict(zip(range(0xF8E8, 0xF8FF), "®©™⎛⎜⎝⎡⎢⎣⎧⎨⎩⎪⌠⎞⎟⎠⎤⎥⎦⎫⎬⎭", strict=True))
PRIVATE_USE = (
    {_PRIVATE + code: char for code, char in SYMBOL.items()}
    | {_PRIVATE + code: WINGDINGS[code] for code in _OF_WINGDINGS}
    | _ADOBE
)
"""Code point in a private use area to what it most likely means."""
