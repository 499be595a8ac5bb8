"""Words and sentences of plain text, as every lexical measure here sees them.

Language-neutral where that is cheap: scripts written without spaces are cut into pairs of
characters, plurals are folded by Harman's S-stemmer (JASIS 42(1), 1991), and the common words
of seven European languages are left out.
"""

from __future__ import annotations

import math
import re
import textwrap
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

import regex

from mmrag.numerals import decimal_mark, plain_digits, readings_of

# Thai, Lao, Burmese and Khmer; kana, Han and Hangul.
_UNSPACED = (
    r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
    r"\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff"
)
_WORD = regex.compile(
    rf"""
    (?P<unspaced>[{_UNSPACED}]+)
    | (?P<number>\d+(?:[.,']\d+)*)
    | ['\u2019]s\b  # a genitive is not a word
    | (?P<word>[[\p{{L}}\p{{M}}]--[{_UNSPACED}]]+)
    """,
    regex.VERBOSE | regex.VERSION1,
)
_UNSPACED_RUN = re.compile(rf"[{_UNSPACED}]+")
_BROKEN_WORD = re.compile(r"([^\W\d_]+)[-\u2010]\n([^\W\d_]+)")
_GROUPED = re.compile(r"(?<![\d.,])\d{1,3}(?: \d{3})+(?![.,]?\d)")
_NO_LETTERS = str.maketrans({"\u00ad": None, "\u0640": None})  # soft hyphen, Arabic tatweel
# Accents, and the vowel points of Hebrew and Arabic. Marks of other scripts tell words apart:
# without them Japanese ga is ka, and Hindi is bare consonants.
_ACCENTS = re.compile(r"[\u0300-\u036f\u0591-\u05c7\u064b-\u0652\u0670]")
_BARE_LETTERS = str.maketrans({"ø": "o", "ł": "l", "đ": "d", "ı": "i", "æ": "ae", "œ": "oe"})

STOP_WORDS = frozenset(
    re.findall(
        r"\S+",
        """
        a about after all also an and any are as at be been before being but by can could did do
        does doing during each for from had has have how if in into is it its may me might more
        most must my no nor not of on only or other our out over own same shall she should so some
        such than that the their them then there these they this those through to too under until
        up us very was we were what when where which while who whom whose why will with would you
        your i he her his him yes tell give list show explain describe
        der die das den dem des ein eine einer eines und oder ist sind war wie was wer wo wann
        warum welche welcher welches mit von zu im auf fur nicht
        le la les un une des du de et ou est sont que qui quoi dans pour avec sur quel quelle
        quels comment pourquoi quand
        el los las una del y o es son que quien cual cuales como cuando donde por para con en
        il lo gli uno di e sono che chi quale come quando dove perche per con
        os um uma do da dos das em no na qual quais quando onde para com
        het een van en zijn dat wat wie waar hoe met voor op
        """,
    )
)

# A full stop after one of these does not end a sentence.
_ABBREVIATIONS = frozenset(
    re.findall(
        r"\S+",
        "e.g i.e etc vs cf dr mr mrs ms st no nos fig figs eq sec pp p vol ed al approx inc ltd co"
        " jr sr u.s z.b d.h bzw usw ca nr",
    )
)
_SENTENCE_END = re.compile(
    r"[.!?][\"'\u201d\u2019)\]]*(?:\s*\[\d[\d,\s\u2013-]*\])*(?=\s)|[。！？]+"
)
_ITEM_OR_ROW = re.compile(
    r"\s*(?:[\u2022\u25cf\u25e6\u2023\u2043\u00b7*\u2013-]\s|\(?\d{1,2}[.)]\s|\|)"
)
_WRAPPED_LINE = 50  # characters; a shorter line without an end mark is a heading or a table cell
_SHORT = 16  # bytes of UTF-8; a shorter piece says nothing on its own
_LONGEST = 400  # characters of one sentence; text without end marks is cut here


def terms(text: str) -> list[str]:
    """Content words in order, without case, accents, plural endings and common words."""
    folded = (fold(word) for word in words(text))
    return [stem(word) for word in folded if word not in STOP_WORDS]


def words(text: str) -> list[str]:
    """All words in order and in lower case, each in one spelling.

    Letters and digits are apart (``XR-2000/B`` is ``xr``, ``2000``, ``b``), numbers have one
    spelling, and ligatures, full-width forms and soft hyphens are undone. Scripts without
    spaces and Korean are cut into pairs of characters. What may be read in two ways is there in
    both: a number such as ``1.577``, digits in groups or in two columns (``12 500``), and a word
    broken over two lines, where ``infor-mation`` and ``well-known`` look alike.
    """
    text = plain_digits(text.translate(_NO_LETTERS))
    mark = decimal_mark(text)
    text = _BROKEN_WORD.sub(r"\1\2 \1 \2", text)
    text = _GROUPED.sub(lambda group: f"{group[0].replace(' ', '')} {group[0]}", text)
    found: list[str] = []
    for match in _WORD.finditer(text.casefold()):
        match match.lastgroup:
            case "unspaced":
                run = match[0]
                found += [run[i : i + 2] for i in range(max(1, len(run) - 1))]
            case "number":
                readings = readings_of(match[0], mark)
                found += dict.fromkeys(value for each in readings for value in each)
            case "word":
                found.append(match[0])
    return found


def is_pair(word: str) -> bool:
    """Whether a word was cut from a script without spaces."""
    return not word.isascii() and _UNSPACED_RUN.fullmatch(word) is not None


def fold(word: str) -> str:
    """A word without accents and vowel points."""
    if word.isascii():
        return word
    bare = _ACCENTS.sub("", unicodedata.normalize("NFD", word)).translate(_BARE_LETTERS)
    # Composed again: marks of other scripts were kept and must compare equal.
    return unicodedata.normalize("NFC", bare)


def stem(word: str) -> str:
    """Singular of an English plural by Harman's three rules; other words stay as they are."""
    # "gas", "bus": too short to have a plural ending.
    if len(word) < 4 or not word.endswith("s"):
        return word
    if word.endswith("ies") and word[-4] not in "ea":
        return word[:-3] + "y"
    if word.endswith("es") and word[-3] not in "aeo":
        return word[:-1]
    return word if word[-2] in "us" else word[:-1]


def sentences(text: str) -> list[str]:
    """Sentences, headings, list items and table rows of a page's text, in order.

    A blank line ends a sentence; other line breaks inside one are undone; white space is single.
    Pieces under 16 bytes join the next one of their paragraph, and none is much longer than 400
    characters.
    """
    found: list[str] = []
    for is_written, lines in groupby(text.splitlines(), key=lambda line: bool(line.strip())):
        if is_written:
            found += _paragraph_sentences(lines)
    return found


def _paragraph_sentences(lines: Iterable[str]) -> Iterator[str]:
    carry = ""
    for sentence in (each for block in _blocks(lines) for each in _split_block(block)):
        # At spaces; text without spaces is cut anywhere.
        for part in textwrap.wrap(sentence, _LONGEST, break_on_hyphens=False):
            piece = f"{carry} {part}".strip()
            # In bytes: a few ideographs say as much as a dozen letters.
            carry = piece if len(piece.encode()) < _SHORT else ""
            if not carry:
                yield piece
    if carry:
        yield carry


def _blocks(lines: Iterable[str]) -> list[str]:
    """The lines of a paragraph, joined unless the break means something."""
    blocks: list[str] = []
    previous = ""
    for line in lines:
        clean = " ".join(line.split())
        runs_on = len(previous) >= _WRAPPED_LINE or clean[:1].islower()
        if previous and runs_on and not _ITEM_OR_ROW.match(line):
            blocks[-1] += f" {clean}"
        else:
            blocks.append(clean)
        # Nothing runs on from the row of a Markdown table, however long.
        previous = "" if clean.startswith("|") else clean
    return blocks


def _split_block(block: str) -> list[str]:
    pieces: list[str] = []
    start = 0
    for match in _SENTENCE_END.finditer(block):
        if block[match.start()] == "." and stays_open(block[start : match.start()]):
            continue
        pieces.append(block[start : match.end()].strip())
        start = match.end()
    pieces.append(block[start:].strip())
    return [piece for piece in pieces if piece]


def stays_open(text: str) -> bool:
    """Whether a full stop behind a text ends no sentence: an abbreviation, initial or number."""
    word = text.rsplit(" ", 1)[-1].casefold().lstrip("(")
    initial = len(word) == 1 and word.isalpha()
    item = word.isdigit() and text.strip() == word
    return word in _ABBREVIATIONS or initial or item


class Idf:
    """Inverse document frequency over a small set of texts (Robertson-Sparck Jones, as in BM25).

    A term that no text has weighs most: had the collection known it, it would be among them.
    """

    def __init__(self, documents: Sequence[Iterable[str]]) -> None:
        self._n = len(documents)
        self._seen = Counter(term for document in documents for term in set(document))

    def __call__(self, term: str) -> float:
        """The weight of a term, above 0."""
        seen = self._seen[term]
        # The 1 keeps it above 0 for terms that most texts have.
        return math.log(1 + (self._n - seen + 0.5) / (seen + 0.5))

    def coverage(self, wanted: Iterable[str], having: Iterable[str]) -> float:
        """Share, in [0, 1], of the weight of ``wanted`` that ``having`` contains."""
        needed, there = set(wanted), set(having)
        total = sum(self(term) for term in needed)
        return sum(self(term) for term in needed & there) / total if total else 0.0
