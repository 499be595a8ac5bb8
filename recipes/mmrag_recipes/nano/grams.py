"""Character trigrams: what a vision tower can learn to read where words are too many.

Every letter or digit of a text is the middle of one trigram; a word's ends count as blanks.
A page's text is then the sum of its trigrams' vectors, and these live in the space of the token
vectors (word hashing of DSSM, Huang et al., CIKM 2013, with learned vectors).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

_PLAIN = re.compile(r"[a-z0-9]")


def trigrams(text: str) -> list[str | None]:
    """The trigram around each character; None for a character that is no letter or digit."""
    plain = "".join(c if _PLAIN.fullmatch(c) else " " for c in (d.lower() for d in text))
    padded = f" {plain} "
    return [None if c == " " else padded[i : i + 3] for i, c in enumerate(plain)]


def count(text: str) -> Counter[str]:
    """How often each trigram occurs in ``text``."""
    return Counter(gram for gram in trigrams(text) if gram is not None)


def vocabulary(texts: Sequence[str], least: int) -> dict[str, int]:
    """Trigrams that occur at least ``least`` times, by falling frequency."""
    total: Counter[str] = Counter()
    for text in texts:
        total.update(count(text))
    return {gram: i for i, (gram, n) in enumerate(total.most_common()) if n >= least}
