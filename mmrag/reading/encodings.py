"""Bytes of a text file to characters: Unicode, and the encodings from before it."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import charset_normalizer

from mmrag.reading.legibility import evidence, is_ideograph, script

_MARKS = (
    (b"\xef\xbb\xbf", "utf-8-sig"),
    (b"\xff\xfe\x00\x00", "utf-32"),
    (b"\x00\x00\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
)
_SAMPLE = 200_000  # bytes that are looked at to tell the encoding

# What the letters with accents of a language are. Encodings of one region differ in them alone.
_ALPHABETS = [
    frozenset(letters + letters.upper())
    for letters in (
        *("äöüß", "àâæçéèêëîïôœùûüÿ", "áéíñóúüªº", "áâãàçéêíóôõúªº", "àèéìòùºª", "æøåéèóôü"),
        *("åäöéàü", "áðéíóúýþæö", "ëïéèöüáóíú", "àçèéíïòóúü", "ąćęłńóśźż", "áčďéěíňóřšťúůýž"),
        *("áäčďéíĺľňóôŕšťúýž", "áéíóöőúüű", "ăâîșțşţ", "čćđšž", "âçğıi̇öşüû", "ąčęėįšųūž"),
        *("āčēģīķļņšūž", "äöõüšž", "ëç", "àâéèêëîïôûŵŷ", "ĉĝĥĵŝŭ"),
    )
]
_LATIN = ("cp1252", "cp1250", "cp1254", "cp1257", "iso8859_2", "cp850", "cp852", "mac_roman")
_SCRIPTS = {
    "cp1251": "CYRILLIC", "koi8_u": "CYRILLIC", "cp866": "CYRILLIC", "iso8859_5": "CYRILLIC",
    "mac_cyrillic": "CYRILLIC", "cp1253": "GREEK", "cp1255": "HEBREW", "cp1256": "ARABIC",
    "iso8859_6": "ARABIC", "cp874": "THAI",
}  # fmt: skip
_EAST_ASIAN = ("cp932", "euc_jp", "iso2022_jp", "cp949", "gb18030", "big5")
_MESS = 0.4  # share of odd characters over which charset-normalizer drops an encoding
# Bits of evidence, as legibility.evidence counts them:
_HEADSTART = 2.0  # for the most frequent ones by far, cp1252 and cp1251
_LEAST_LEAD = 1.5  # that the best encoding must be ahead of the next
_LEAST = -0.05  # a byte, of the best: texts of rare letters are a little below 0
# A letter of an alphabet with fewer than the 32 of Russian is less of a coincidence: log2(32 / 22).
_SMALL_ALPHABET = {"HEBREW": 0.54, "GREEK": 0.4}
_FOREIGN = -4.0  # for a letter that the languages of an encoding do not have
_CONTROLS = re.compile("[\x80-\x9f]")  # of ISO 8859; Windows has letters there
_SPACED_HAN = re.compile("[\u4e00-\u9fff] (?=[\u4e00-\u9fff])")


class NotText(ValueError):
    """The bytes are not text in any encoding that is known here."""


class UnknownEncoding(ValueError):
    """The bytes are text, but of which encoding cannot be told."""


def decode(data: bytes) -> str:
    """Text from Unicode, with or without a byte order mark, or from an older encoding.

    UTF-8 that is damaged here and there is still taken for UTF-8.

    Raises:
        NotText: For binary data.
        UnknownEncoding: Where several encodings fit, or none.
    """
    for mark, encoding in _MARKS:
        if data.startswith(mark):
            return _strictly(data, encoding)
    # UTF-16 without a mark; text of one byte a character has no zeros.
    if b"\0" in data[:4096]:
        half = data[: len(data) // 2 * 2]
        little = half[1::2].count(0) > half[0::2].count(0)
        return _strictly(half, "utf-16-le" if little else "utf-16-be")
    text = data.decode("utf-8", errors="replace")
    damaged = text.count("\ufffd")
    # Letters of the older encodings make no valid sequences of UTF-8. ISO 2022 is all ASCII.
    shifted = b"\x1b$" in data
    if shifted or (damaged and damaged >= sum(not c.isascii() for c in text) - damaged):
        text = _of_older_encoding(data)
    return _checked(text)


def _strictly(data: bytes, encoding: str) -> str:
    try:
        return _checked(data.decode(encoding))
    except UnicodeDecodeError as error:
        raise NotText from error


def _checked(text: str) -> str:
    sample = text[:100_000]
    odd = sum(not (c.isprintable() or c in "\n\r\t\f\v\u00a0\u00ad") for c in sample)
    odd += sample.count("\ufffd")
    if odd > 0.02 * len(sample):
        raise NotText
    return text


def _of_older_encoding(data: bytes) -> str:
    """Text in the encoding that charset-normalizer allows and our letters fit best."""
    sample = data[:_SAMPLE]
    if len(sample) < len(data):  # not in the middle of a character
        sample = sample[: max(sample.rfind(b" "), sample.rfind(b"\n")) + 1]
    matches = charset_normalizer.from_bytes(
        sample,
        cp_isolation=[*_LATIN, *_SCRIPTS, *_EAST_ASIAN],
        # Twice the package's own: short files of rare letters are left to our evidence.
        threshold=_MESS,
        enable_fallback=False,
    )
    fits = sorted(
        (_fit(str(match), match.could_be_from_charset), match.encoding) for match in matches
    )
    if not fits:
        raise NotText
    best, encoding = fits[-1]
    lead = best - fits[-2][0] if len(fits) > 1 else math.inf
    if best < _LEAST * len(sample) or lead < _LEAST_LEAD:
        raise UnknownEncoding(", ".join(name for _, name in reversed(fits[-3:])))
    return data.decode(encoding, errors="replace")


def _fit(text: str, encodings: Sequence[str]) -> float:
    """Bits of evidence that a text was written in one of the encodings that give it."""
    foreign = [char for char in text if char.isalpha() and not char.isascii()]
    expected = max(_expected(foreign, encoding) for encoding in encodings)
    small = max(_SMALL_ALPHABET.get(_SCRIPTS.get(each, ""), 0.0) for each in encodings) * expected
    headstart = _HEADSTART if {"cp1252", "cp1251"} & set(encodings) else 0.0
    # Chinese has no spaces; Korean read as Chinese has one behind every few characters.
    odd = len(_SPACED_HAN.findall(text)) + len(_CONTROLS.findall(text))
    return evidence(text) + headstart + small + _FOREIGN * (len(foreign) - expected + odd)


def _expected(foreign: Sequence[str], encoding: str) -> int:
    """How many of the letters that are not ASCII the languages of an encoding have."""
    if encoding in _LATIN:
        return max(sum(char in letters for char in foreign) for letters in _ALPHABETS)
    if encoding in _SCRIPTS:
        return sum(script(char) == _SCRIPTS[encoding] for char in foreign)
    kana = sum("\u3040" <= char <= "\u30ff" for char in foreign)
    hangul = sum("\uac00" <= char <= "\ud7a3" for char in foreign)
    han = sum(map(is_ideograph, foreign)) - hangul
    # These share most of their codes: what mixes their scripts up is of another one.
    match encoding:
        case "cp949":
            return hangul
        case "gb18030" | "big5":
            return han
    return min(10 * kana, kana + han)  # Japanese is never without kana for long
