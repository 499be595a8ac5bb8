"""Numbers in text, found in every spelling and compared by value.

``1,250.50``, ``1.250,50``, ``1 250,50`` and ``1'250.50`` are one number; ``1,5`` is not 15 and
``-18`` is not 18. A form such as ``1.000`` means a thousand in German and one in English: it is
read as the rest of the text is written, and both ways where that says nothing.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

Reading: TypeAlias = tuple[str, ...]
"""The values that a piece of text stands for: one number, or several that touch (a date)."""

_LONGEST = 40  # characters; what is longer is not a quantity and is compared as it is written

_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹", "0123456789")
_EXPONENT = re.compile(r"(?<=\d)(?=[⁰¹²³⁴⁵⁶⁷⁸⁹])")
_MARKS = str.maketrans({"\u2212": "-", "\u2013": "-", "\u066b": ".", "\u066c": "'", "\u2019": "'"})
# No-break and thin spaces between digits group them, as an apostrophe does.
_FIXED_SPACE = re.compile(r"(?<=\d)[\u00a0\u2007\u2009\u202f](?=\d{3}(?!\d))")
_FOREIGN_DIGIT = re.compile(r"(?![0-9])\d")

# The power of a unit begins no group: "80 m2 150 euros" of a table has no 2150.
_NUMERAL = re.compile(
    r"(?<!m)(?<!ft)(?<!in)\d{1,3}(?: \d{3})+(?![\d'])(?:[.,]\d{1,2}(?!\d))?|\d+(?:[.,']\d+)*"
)
_UNIT_POWER = re.compile(r"(?<![^\W\d_])[cdkm]?m$|(?<![^\W\d_])(?:ft|in|sq)$", re.IGNORECASE)
_SIGN = re.compile(r"(?:^|[\s(\[{:=<>/~])-$|\bminus\s$", re.IGNORECASE)
_BELOW_ZERO = re.compile(
    r"[^\d.;]{0,20}?\b(?:below zero|unter null|sous z[ée]ro|bajo cero|sotto zero)\b", re.IGNORECASE
)
_LABEL = re.compile(
    r"(?:\b(?:v|ver|version|release|rev|revision|firmware|build|section|chapter|clause|article"
    r"|annex|figure|fig|table|kapitel|abschnitt|ziffer)\.?|§)\s?$",
    re.IGNORECASE,
)
_DATE = re.compile(r"\d{1,2}\.\d{1,2}\.(?:\d{4}|\d{2})")
_GROUPS = re.compile(r"\d{1,3}([.,' ])\d{3}(?:\1\d{3})*|\d{1,2}(?:,\d{2})+,\d{3}")
_UNIT_BEHIND = re.compile(r" ?(?:[^\W\d_]|[%€$£¥°])")

_ENGLISH = frozenset(
    re.findall(r"\S+", "the of and is are was for with by from this that to at be or")
)
_COMMA_LANGUAGES = frozenset(
    re.findall(
        r"\S+",
        "der die das und ist sind mit von für den beträgt le la les des et est sont pour du el los"
        " las y es por para una il di che per della het een van och att det og em não são",
    )
)
_DOT_DECIMAL = re.compile(r"(?<![\d.,])\d+\.(?:\d{1,2}|\d{4,})(?![\d]|[.,]\d)")
_COMMA_DECIMAL = re.compile(r"(?<![\d.,])\d+(?:\.\d{3})*,(?:\d{1,2}|\d{4,})(?!\d|[.,]\d)")

_SCALE = re.compile(
    r"[\s-]{0,2}(?:(thousand|tausend|mille|mil)|(millions?|millionen|mio|millones|millón|mln)"
    r"|(billions?|milliarden?|milliards?|mrd|bn))\b",
    re.IGNORECASE,
)
_SPELLED = {
    word: str(value)
    for words in (
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
        " fifteen sixteen seventeen eighteen nineteen twenty",
        "null eins zwei drei vier fünf sechs sieben acht neun zehn elf zwölf",
        "zéro - deux trois quatre cinq - sept huit neuf dix onze douze",
        "cero - dos tres cuatro cinco seis siete ocho nueve diez - doce",
    )
    for value, word in enumerate(words.split())
} | {
    word: str(10 * tens)
    for tens, word in enumerate(
        ["thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety", "hundred"], start=3
    )
}
_HAN_NUMERAL = re.compile(r"[〇零一二两三四五六七八九十百千万]{1,12}")


@dataclass(frozen=True, slots=True)
class Numeral:
    """A number as it is written.

    literal: its characters, digits and marks in ASCII, with its sign.
    readings: what it may mean, the likeliest first.
    """

    literal: str
    readings: tuple[Reading, ...]


def plain_digits(text: str) -> str:
    """The text with digits, signs and separators of all scripts in ASCII; NFKC otherwise.

    A superscript behind a digit is a footnote or an exponent and is set apart: ``5²`` is not 52.
    """
    if text.isascii():
        return text
    text = _FIXED_SPACE.sub("'", _EXPONENT.sub(" ", text).translate(_SUPERSCRIPTS))
    text = unicodedata.normalize("NFKC", text.translate(_MARKS))
    return _FOREIGN_DIGIT.sub(lambda digit: str(unicodedata.decimal(digit[0])), text)


def numerals(text: str) -> list[Numeral]:
    """The numbers of a text in their order."""
    plain = plain_digits(text)
    mark = decimal_mark(plain)
    found: list[Numeral] = []
    for match in _NUMERAL.finditer(plain):
        before = plain[max(0, match.start() - 20) : match.start()]
        behind = plain[match.end() : match.end() + 40]
        token = match[0]
        if token in ("2", "3") and _UNIT_POWER.search(before):
            continue  # m2 is a unit
        if "." in token and _LABEL.search(before):
            readings: tuple[Reading, ...] = ((token,),)  # release 2.10 is not 2.1
        else:
            readings = readings_of(token, mark, bool(_UNIT_BEHIND.match(behind)))
            readings = _scaled(readings, behind)
        found.append(_signed(token, readings, before, behind))
    return found


def number(token: str) -> str:
    """The likeliest value of one number, in one spelling: ``1,000`` and ``1.000,00`` are 1000."""
    return " ".join(readings_of(token, None)[0])


def numbers(text: str) -> set[str]:
    """The likeliest values of the numbers in a text, each in one spelling."""
    return {value for numeral in numerals(text) for value in numeral.readings[0]}


def missing_numbers(claim: str, source: str) -> list[str]:
    """The numbers of a claim, as written, that the source does not have in any spelling.

    Numbers that the source spells out in words count; signs must agree.
    """
    seen = seen_numbers(source)
    return [
        numeral.literal
        for numeral in numerals(claim)
        if numeral.literal not in seen and not any(seen >= set(each) for each in numeral.readings)
    ]


@lru_cache(maxsize=64)
def seen_numbers(text: str) -> frozenset[str]:
    """Every number that a text may be read to contain, those spelled out in words as well."""
    seen: set[str] = set()
    for numeral in numerals(text):
        seen.add(numeral.literal)
        for reading in numeral.readings:
            seen.update(reading)
    words = re.findall(r"[^\W\d_]+", text.casefold())
    seen.update(_SPELLED[word] for word in words if word in _SPELLED)
    seen.update(str(_han_value(match[0])) for match in _HAN_NUMERAL.finditer(text))
    return frozenset(seen)


def decimal_mark(text: str) -> str | None:
    """How a text writes decimals: ``.`` or ``,``; None if neither its language nor it tells."""
    words = re.findall(r"[^\W\d_]+", text[:5000].casefold())
    english = sum(word in _ENGLISH for word in words)
    other = sum(word in _COMMA_LANGUAGES for word in words)
    dots, commas = bool(_DOT_DECIMAL.search(text)), bool(_COMMA_DECIMAL.search(text))
    if english > other:
        # English prose with a German table in it: the numbers say more than the words.
        return "," if commas and not dots else "."
    if other > english:
        return ","
    return "," if commas and not dots else None


def readings_of(token: str, mark: str | None, unit_behind: bool = False) -> tuple[Reading, ...]:
    """What digits with separators between them may mean, the likeliest first.

    mark: of decimals, as ``decimal_mark`` gives it. unit_behind: whether a unit follows.
    """
    if len(token) > _LONGEST:
        return ((token,),)
    if " " in token:  # groups of three, or two numbers side by side, as in the row of a table
        joined = readings_of(token.replace(" ", "'"), mark, unit_behind)
        apart = tuple(
            value for part in token.split(" ") for value in readings_of(part, mark, True)[0]
        )
        return joined if unit_behind else (*joined, apart)
    if token.isdigit():
        return ((_value(token),),)
    return _separated(token, mark)


def _separated(token: str, mark: str | None) -> tuple[Reading, ...]:
    """The readings of digits with dots, commas or apostrophes between them."""
    at = max(token.rfind(separator) for separator in ".,'")
    whole, last, part = token[:at], token[at], token[at + 1 :]
    grouped = _GROUPS.fullmatch(token) is not None and not token.startswith("0")
    joined = (_value(re.sub(r"\D", "", token)),)
    may_be_decimal = last != "'" and token.count(last) == 1
    if may_be_decimal and whole.isdigit():
        decimal = (_value(whole, part),)
        if not grouped or mark == last:
            return (decimal,)
        return (joined, decimal) if mark is None else (joined,)
    if grouped:
        return (joined,)
    if may_be_decimal and _GROUPS.fullmatch(whole):
        return ((_value(re.sub(r"\D", "", whole), part),),)
    if _is_version(token):
        return ((token,),)
    return (tuple(_value(piece) for piece in re.split(r"\D", token)),)


def _is_version(token: str) -> bool:
    """Whether digits and dots are a version or an address, and no date."""
    return set(token) <= set("0123456789.") and not _DATE.fullmatch(token)


def _value(whole: str, part: str = "") -> str:
    """One spelling: no zeros in front, none at the end of the decimals."""
    whole, part = whole.lstrip("0") or "0", part.rstrip("0")
    return f"{whole}.{part}" if part else whole


def _scaled(readings: tuple[Reading, ...], behind: str) -> tuple[Reading, ...]:
    """With ``3.2 million``, 3200000 is a reading too."""
    scale = _SCALE.match(behind)
    if not scale or len(readings[0]) != 1:
        return readings
    zeros = 3 * (scale.lastindex or 0)
    whole, _, part = readings[0][0].partition(".")
    # "3.25 thousand" has a value; "0.12345 thousand" is more likely two numbers.
    if len(part) > zeros:
        return readings
    return (*readings, (_value(whole + part.ljust(zeros, "0")),))


def _signed(token: str, readings: tuple[Reading, ...], before: str, behind: str) -> Numeral:
    """The numeral with its sign; ``5 -10`` may be a range, so it has both."""
    if not _SIGN.search(before) and not _BELOW_ZERO.match(behind):
        return Numeral(token, readings)
    negative = tuple((f"-{each[0]}", *each[1:]) for each in readings)
    if re.search(r"\d\s*(?:-|minus\s)$", before):
        return Numeral(token, (*readings, *negative))
    return Numeral(f"-{token}", negative)


def _han_value(numeral: str) -> int:
    """三十 is 30, 二百五十 is 250."""
    total = digit = 0
    for char in numeral:
        value = 2 if char == "两" else int(unicodedata.numeric(char))
        if value < 10:
            digit = value
        else:
            # 十 alone is ten, not zero times ten.
            total += max(1, digit) * value
            digit = 0
    return total + digit
