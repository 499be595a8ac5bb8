"""Citations: find each ``[n]``, check it against its source, and locate the words that carry it.

A claim is a sentence of the answer. It is supported by a source if one passage of the source
(a sentence, two neighbours, or a row of a table) has most of its weighted content words, or means
the same to the embedder, and every number of the claim stands on the page. Passages of several
sources cited for it may support it together. That is a check of evidence, not of truth: a negated
sentence passes it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mmrag.answering.context import Source
from mmrag.answering.passages import strip_bullet, table_rows
from mmrag.embedders.base import Embedder
from mmrag.errors import MMRagError
from mmrag.lexical import Idf, sentences, stays_open, terms
from mmrag.numerals import missing_numbers, numerals, seen_numbers
from mmrag.prompting import CITATION
from mmrag.reading import locate_quote, words_path

logger = logging.getLogger(__name__)

Similarity: TypeAlias = Callable[[Sequence[str], Sequence[str]], NDArray[np.float32]]
"""Cosines, shape (len(first), len(second))."""
Choice: TypeAlias = Literal["flag", "remove"]

SUPPORT = 0.4
"""Share of a claim's weighted words that one passage must have."""
SUPPORT_COSINE = 0.85
"""Cosine of claim and passage that stands in for shared words, where the embedder's calibration
does not say; set with ``mmrag-nano`` 0.1."""

_IDLE = SUPPORT / 2  # below it, a source cited beside others adds nothing to a claim
_TO_EMBED = 32  # passages of a page that are compared by meaning, those with most words first

# A mark followed by ( is the text of a Markdown link, not a citation.
_MARK = re.compile(rf"[ \t]{{0,3}}(?:{CITATION.pattern})(?!\()", re.IGNORECASE)
_RANGE = re.compile(r"(\d{1,4})\s*[\u2013-]\s*(\d{1,4})")

# A sentence's end takes the marks behind it along: "... euros. [1]" cites for that sentence.
# Repetitions are bounded, since an answer is text from outside.
_END = re.compile(
    rf"(?:[.!?][\"'\u201d\u2019)*]{{0,5}}(?={CITATION.pattern}|\s|$)"
    rf"|[。！？।॥؟۔][\"'\u201d\u2019\u300d\u300f\uff09)*]{{0,5}})"
    rf"(?:\s{{0,3}}(?:{CITATION.pattern})(?!\()){{0,20}}",
    re.IGNORECASE,
)


class Evidence(NamedTuple):
    """A passage beside a claim.

    support: in [0, 1]. quote: as it stands on the page. words: what it is compared by; those of a
        row of a table have the heads of its columns.
    """

    support: float
    quote: str
    words: Sequence[str]


@dataclass(frozen=True)
class Claim:
    """One sentence of an answer.

    text: without its citation marks.
    citations: the sources that it cites and that exist.
    dangling: the numbers that it cites and that no source has.
    supported: None where no cited source has text to check against.
    idle: sources cited beside those that support it, which have almost none of its words.

    Examples:
        >>> claim = Claim("The well is nine metres deep.", citations=(1,), supported=True)
        >>> claim.dangling
        ()
    """

    text: str
    citations: tuple[int, ...] = ()
    dangling: tuple[int, ...] = ()
    supported: bool | None = None
    idle: tuple[int, ...] = ()


@dataclass(frozen=True)
class CheckedAnswer:
    """An answer with its claims checked.

    text: the answer as it may be shown: with ``[n]`` in one spelling, and without what was to be
        removed.
    sources: all of them; those cited carry ``cited``, ``quote`` and ``boxes``.
    """

    text: str
    claims: tuple[Claim, ...]
    sources: tuple[Source, ...]

    @property
    def problems(self) -> list[str]:
        """What a reader should know before trusting the answer."""
        found: list[str] = []
        for claim in self.claims:
            for n in claim.dangling:
                found.append(f"[{n}] points to no source: {claim.text}".rstrip(": "))
            if claim.supported is False and not claim.dangling:
                cites = "".join(f"[{n}]" for n in claim.citations)
                where = f"{cites} does not support" if cites else "no source supports"
                found.append(f"{where}: {claim.text}")
            found += [f"[{n}] is cited but does not support: {claim.text}" for n in claim.idle]
        return found


def parse_marks(text: str) -> list[int]:
    """Numbers cited in ``[1]``, ``[1, 2]``, ``[1-3]``, ``[Source 1]`` and the like, in order."""
    found: list[int] = []
    for mark in _MARK.finditer(text):
        for n in _numbers_of(mark[1]):
            if n not in found:
                found.append(n)
    return found


def _numbers_of(inside: str) -> list[int]:
    """The numbers in one mark. A range of more than twenty is taken as its two ends."""
    found: list[int] = []
    for piece in re.split(r"[,;&\uff0c\u3001]|and", inside, flags=re.IGNORECASE):
        if span := _RANGE.search(piece):
            first, last = int(span[1]), int(span[2])
            # A longer range is more likely years or pages than sources.
            found += range(first, last + 1) if 0 <= last - first <= 20 else (first, last)
        else:
            found += [int(n) for n in re.findall(r"\d+", piece)]
    return found


def strip_marks(text: str) -> str:
    """The text without its citation marks and list bullet."""
    return strip_bullet(_MARK.sub("", text)).strip()


def embedder_similarity(embedder: Embedder) -> Similarity:
    """Cosines of texts by an embedder, both sides as documents; each text is embedded once."""
    known: dict[str, NDArray[np.float32]] = {}

    def cosines(first: Sequence[str], second: Sequence[str]) -> NDArray[np.float32]:
        fresh = [text for text in dict.fromkeys([*first, *second]) if text not in known]
        if fresh:
            known.update(zip(fresh, embedder.encode(fresh), strict=True))
        left, right = (np.stack([known[text] for text in side]) for side in (first, second))
        return np.asarray(left @ right.T, dtype=np.float32)

    return cosines


def check_answer(
    text: str,
    sources: Sequence[Source],
    similarity: Similarity | None = None,
    *,
    support_cosine: float = SUPPORT_COSINE,
    dangling: Choice = "flag",
    unsupported: Choice = "flag",
) -> CheckedAnswer:
    """Check each claim of an answer against the sources it cites.

    A claim without a citation is checked against all sources: if none supports it, it counts as
    unsupported.

    Args:
        similarity: lets a paraphrase count as support; see ``embedder_similarity``. None checks
            words alone.
        support_cosine: cosine from which on a paraphrase does.
        dangling: flag or remove marks that point to no source.
        unsupported: flag or remove sentences that their sources do not support.

    Examples:
        >>> from llama_index.core.schema import NodeWithScore, TextNode
        >>> node = NodeWithScore(node=TextNode(text="The pump costs 1,890 euros."))
        >>> page = Source(1, "report.pdf", 3, node, "The pump costs 1,890 euros.")
        >>> checked = check_answer("The pump costs 1890 euros [1]. It is red [1].", [page])
        >>> [claim.supported for claim in checked.claims]
        [True, False]
    """
    known = {source.n: source for source in sources}
    claims: list[Claim] = []
    shown: list[str] = []
    best: dict[int, Evidence] = {}
    nothing = Evidence(SUPPORT, "", ())
    for line, piece in _pieces(text):
        claim, evidence = _check_claim(piece, known, similarity, support_cosine)
        for n, found in evidence.items():
            # A source has one quote: the passage of the claim that it supports best.
            if n in claim.citations and found.support >= best.get(n, nothing).support:
                best[n] = found
        if claim.text or claim.citations or claim.dangling:
            claims.append(claim)
        # None (could not be checked) stays: only what was found wrong is removed.
        if claim.supported is False and unsupported == "remove" and claim.text:
            continue
        shown.append(line + _rewrite(piece, known, dangling))
    cited = {n for claim in claims for n in claim.citations}
    marked = [replace(source, cited=source.n in cited) for source in sources]
    located = [locate(each, best[each.n].quote) if each.n in best else each for each in marked]
    return CheckedAnswer("".join(shown).strip(), tuple(claims), tuple(located))


def locate(source: Source, quote: str) -> Source:
    """The source with ``quote`` and the boxes where it stands; without boxes if it cannot be found.

    The words that indexing kept beside the page's image are enough. Without them, a file that
    has gone or changed since loses the boxes, not the answer.
    """
    boxes: Sequence[Sequence[float]] = []
    path = source.path
    image = source.node.node.metadata.get("page_image")
    kept = image is not None and words_path(Path(image)).is_file()
    indexed = str(source.node.node.metadata.get("sha256", ""))
    if source.page is not None and path.suffix.lower() == ".pdf":
        try:
            if kept or path.is_file():
                boxes = locate_quote(path, source.page, quote, image, indexed)
        except (MMRagError, OSError) as error:
            logger.warning("The quote of [%d] cannot be located: %s", source.n, error)
    found = tuple((float(x0), float(y0), float(x1), float(y1)) for x0, y0, x1, y1 in boxes)
    return replace(source, quote=quote, boxes=found)


def best_passage(
    claim: str,
    source: Source,
    similarity: Similarity | None = None,
    support_cosine: float = SUPPORT_COSINE,
) -> Evidence | None:
    """The passage of a source that best supports a claim; None if the source has no text.

    One that has all numbers of the claim is preferred: in a table, most of the other words stand
    in the heads, which are of all rows.
    """
    passages, words, idf = _passages(source.text)
    if not passages:
        return None
    wanted = _wanted(claim, source.text)
    shared = np.asarray([idf.coverage(wanted, having) for having in words])
    # Embedding is slow and only needed where the words do not settle it.
    if similarity is not None and shared.max() < SUPPORT:
        near = np.argsort(-shared, kind="stable")[:_TO_EMBED]
        alike = similarity([claim], [passages[i] for i in near])[0]
        # A cosine below the limit says little about support, so it never raises a word score.
        shared[near] = np.where(alike >= support_cosine, alike, shared[near])
    numbers = set(wanted) - set(_words(claim))

    def worth(i: int) -> tuple[bool, float, int]:
        exact = bool(shared[i] >= SUPPORT) and numbers <= set(words[i])
        # Of equals, the shorter passage is the better quote.
        return exact, round(float(shared[i]), 3), -len(passages[i])

    best = max(range(len(passages)), key=worth)
    return Evidence(min(1.0, float(shared[best])), passages[best], words[best])


@lru_cache(maxsize=32)
def _passages(text: str) -> tuple[list[str], list[list[str]], Idf]:
    """What can be quoted, its words, and the weights of these by sentence.

    Sentences, pairs of neighbours, and rows of tables, which count with the heads of their columns.
    """
    single = sentences(text)
    # Pairs, because a claim often joins a sentence and the one that says what "it" is.
    passages = single + [f"{a} {b}" for a, b in pairwise(single)]
    words = [_having(passage) for passage in passages]
    for row in table_rows(text):
        passages.append(row.quote)
        words.append(_having(f"{row.heads} {row.quote}"))
    # In a single sentence every word would count as common; an empty one beside it prevents that.
    counted = words[: len(single)] if len(single) > 1 else [*words, []]
    return passages, words, Idf(counted)


def _having(passage: str) -> list[str]:
    """Words of a passage, and its numbers by value."""
    return [*_words(passage), *seen_numbers(passage)]


def _wanted(claim: str, page: str) -> list[str]:
    """Words of a claim, and its numbers by the values that the page has for them."""
    seen = seen_numbers(page)
    found = _words(claim)
    for numeral in numerals(claim):
        readings = ((numeral.literal,), *numeral.readings)
        # "1.500" is 1500 or 1.5; where the page has either, the claim means that one.
        found += next((each for each in readings if seen >= set(each)), numeral.readings[0])
    return found


def _words(text: str) -> list[str]:
    # Numbers are compared by value (1,890 and 1890), not as words.
    return [term for term in terms(text) if not term[0].isdecimal()]


def _pieces(text: str) -> list[tuple[str, str]]:
    """Sentences of an answer with the white space before each; joined, they are the answer.

    Marks that follow the full stop, or stand alone, belong to the sentence before them.
    """
    pieces: list[tuple[str, str]] = []
    space = ""
    for line in text.splitlines(keepends=True):
        ends = [found.end() for found in _END.finditer(line)]
        for start, end in pairwise([0, *ends, len(line)]):
            piece = line[start:end]
            words = piece.strip()
            space += piece[: len(piece) - len(piece.lstrip())]
            if not words:
                continue
            if pieces and _runs_on(pieces[-1][1], space, words):
                before, begun = pieces.pop()
                space, words = before, f"{begun}{space}{words}"
            pieces.append((space, words))
            space = piece[len(piece.rstrip()) :]
    return pieces


def _runs_on(before: str, space: str, piece: str) -> bool:
    marks_alone = parse_marks(piece) and not _MARK.sub("", piece).strip(" \t\n.,;*_")
    return bool(marks_alone) or (
        before.endswith(".") and "\n" not in space and stays_open(before[:-1])
    )


def _check_claim(
    piece: str, known: dict[int, Source], similarity: Similarity | None, support_cosine: float
) -> tuple[Claim, dict[int, Evidence]]:
    """A sentence of the answer as a claim, and the best passage of each source checked for it."""
    marks = parse_marks(piece)
    citations = tuple(n for n in marks if n in known)
    text = strip_marks(piece)
    claim = Claim(text, citations, tuple(n for n in marks if n not in known))
    # A line that only announces a list claims nothing.
    if not terms(text) or (text.endswith(":") and not marks):
        return (claim if marks else Claim("")), {}
    sources = [known[n] for n in citations] or list(known.values())
    score, evidence = _evidence(text, sources, bool(citations), similarity, support_cosine)
    if not evidence:
        return claim, {}
    supported = _supported(text, sources, score, bool(citations))
    if supported and citations:
        # Only among supported claims: where nothing supports it, every source would be idle.
        claim = replace(claim, idle=tuple(n for n in evidence if evidence[n].support < _IDLE))
    return replace(claim, supported=supported), evidence


def _evidence(
    text: str,
    sources: Sequence[Source],
    cited: bool,
    similarity: Similarity | None,
    support_cosine: float,
) -> tuple[float, dict[int, Evidence]]:
    """Support of a claim, and the best passage of each source that has text."""
    evidence: dict[int, Evidence] = {}
    for source in sources:
        if passage := best_passage(text, source, similarity, support_cosine):
            evidence[source.n] = passage
    if cited and len(evidence) > 1:
        return _together(text, sources, evidence)
    return max((score for score, *_ in evidence.values()), default=0.0), evidence


def _supported(text: str, sources: Sequence[Source], score: float, cited: bool) -> bool | None:
    """Whether sources support a claim; None where that cannot be checked.

    score: support by the words of the best passages, in [0, 1].
    """
    pages = "\n".join(f"{source.text}\n{source.page}" for source in sources)
    # Words alone are not enough: "costs 80 euros" shares all but the number with "costs 90 euros".
    if score >= SUPPORT and not missing_numbers(text, pages):
        return True
    # A page without a text layer may show in its image what the claim says.
    if any(not source.text.strip() for source in sources):
        return None
    # A list of references names its sources and claims nothing of them.
    places = terms(" ".join(f"{source.file} page {source.page}" for source in sources))
    return None if cited and set(terms(text)) <= set(places) else False


def _together(
    text: str, cited: Sequence[Source], evidence: dict[int, Evidence]
) -> tuple[float, dict[int, Evidence]]:
    """Support by the best passages of several sources as one, and by each among them."""
    # A sentence that joins what two pages say is not to be found on either.
    idf = Idf([words for source in cited for words in _passages(source.text)[1]])
    pages = "\n".join(source.text for source in cited)
    wanted = _wanted(text, pages)
    each = {
        n: found._replace(support=max(found.support, idf.coverage(wanted, found.words)))
        for n, found in evidence.items()
    }
    shared = idf.coverage(wanted, [word for found in each.values() for word in found.words])
    return max(shared, *(found.support for found in each.values())), each


def _rewrite(piece: str, known: Iterable[int], dangling: Choice) -> str:
    """Marks in one spelling; those that point nowhere stay or go."""

    def one(mark: re.Match[str]) -> str:
        cited = _numbers_of(mark[1])
        kept = [n for n in cited if n in known or dangling == "flag"]
        # The space in front goes with the mark: none may be left before a full stop.
        return " " * bool(kept) * mark[0].startswith((" ", "\t")) + "".join(f"[{n}]" for n in kept)

    return _MARK.sub(one, piece)
