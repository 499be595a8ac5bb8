"""Training pairs (query, passage) from free text. One reader per source, one row per pair.

The data folder holds one sub-folder per source; a source that is not there is reported and
left out. See README.md for where each comes from and its license.
"""

from __future__ import annotations

import gzip
import html
import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmrag.errors import ConfigError


@dataclass(frozen=True)
class Pair:
    """A query and a passage that answers it."""

    query: str
    text: str
    source: str


def passages(text: str, words: int) -> list[str]:
    """Cut ``text`` after about ``words`` words, at ends of sentences where there are any."""
    out: list[str] = []
    current: list[str] = []
    for sentence in sentences(text):
        pieces = sentence.split()
        if current and len(current) + len(pieces) > words:
            out.append(" ".join(current))
            current = []
        # A "sentence" without end marks is a table or a list; its beginning is enough.
        current.extend(pieces[: 2 * words])
    if current:
        out.append(" ".join(current))
    return out


def sentences(text: str) -> list[str]:
    """Sentences of ``text``, white space joined."""
    flat = re.sub(r"\s+", " ", text).strip()
    return [s for s in re.split(r"(?<=[.!?;])\s+(?=[A-Z0-9(])", flat) if s]


def medquad(folder: Path, words: int) -> Iterator[Pair]:
    """``pairs.jsonl.gz``: question and answer (MedQuAD, CC BY 4.0)."""
    with gzip.open(folder / "pairs.jsonl.gz", "rt", encoding="utf-8") as lines:
        for line in lines:
            row: dict[str, Any] = json.loads(line)
            for passage in passages(str(row["answer"]), words)[:2]:
                yield Pair(str(row["question"]).replace(" ?", "?"), passage, "medquad")


def wordnet(folder: Path, words: int) -> Iterator[Pair]:
    """``data.noun`` and the like: words of a synset and its gloss (WordNet 3.0 license)."""
    for path in sorted(folder.glob("data.*")):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("  ") or "|" not in line:
                continue
            head, gloss = line.split("|", 1)
            fields = head.split()
            lemmas = [fields[4 + 2 * i].replace("_", " ") for i in range(int(fields[3], 16))]
            yield Pair(", ".join(lemmas), " ".join(gloss.split()[:words]), "wordnet")


def factbook(folder: Path, words: int) -> Iterator[Pair]:
    """JSON files of the CIA World Factbook (public domain): heading path and text."""
    for path in sorted(folder.rglob("*.json")):
        country = json.loads(path.read_text(encoding="utf-8"))
        names = country.get("Government", {}).get("Country name", {})
        name = str(names.get("conventional short form", {}).get("text", "")) or path.stem
        for heading, text in _leaves(country, ()):
            plain = re.sub(r"<[^>]+>", " ", html.unescape(text))
            if len(plain.split()) >= 25:
                for passage in passages(plain, words)[:2]:
                    yield Pair(f"{name}: {heading[-1]}", passage, "factbook")


def _leaves(node: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str]]:
    if isinstance(node, dict):
        if isinstance(node.get("text"), str) and path:
            yield path, node["text"]
        for key, value in node.items():
            yield from _leaves(value, (*path, str(key)))


def manual(folder: Path, words: int) -> Iterator[Pair]:
    """HTML manuals: each heading with the paragraphs that follow it."""
    for path in sorted(folder.rglob("*.html")):
        page = path.read_text(encoding="utf-8", errors="replace")
        parts = re.split(r"<h[1-4][^>]*>(.*?)</h[1-4]>", page, flags=re.S)
        for heading, body in zip(parts[1::2], parts[2::2], strict=True):
            text = " ".join(_plain(p) for p in re.findall(r"<p[^>]*>(.*?)</p>", body, flags=re.S))
            if len(text.split()) >= 25:
                title = re.sub(r"^[\dA-Z]+(\.\d+)*\.\s", "", _plain(heading).replace("¶", ""))
                for passage in passages(text, words)[:2]:
                    yield Pair(title, passage, folder.name)


def _plain(markup: str) -> str:
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", "", markup))).strip()


READERS: dict[str, Callable[[Path, int], Iterator[Pair]]] = {
    "medquad": medquad,
    "wordnet": wordnet,
    "factbook": factbook,
    "postgresql": manual,
    "python": manual,
}


# Most pairs of each source; the sources are the sub-folders of the data folder.
LIMITS = {"medquad": 9000, "wordnet": 15000, "factbook": 4500, "postgresql": 4000, "python": 4000}
PASSAGE_WORDS = 120


def read_pairs(data: Path, seed: int) -> list[Pair]:
    """At most ``LIMITS[source]`` pairs of each source, chosen and shuffled by ``seed``.

    A passage of several sentences also gives a pair (one of its sentences, the rest): the
    inverse cloze task (arXiv 1906.00300).

    Raises:
        ConfigError: If no source is there.
    """
    rng = random.Random(seed)
    chosen: list[Pair] = []
    for source, limit in LIMITS.items():
        if not (data / source).is_dir():
            print(f"no folder {data / source}: source left out")
            continue
        pairs = list(READERS[source](data / source, PASSAGE_WORDS))
        rng.shuffle(pairs)
        chosen.extend(pairs[:limit])
    if not chosen:
        raise ConfigError(f"{data}: none of the folders {', '.join(LIMITS)} is there.")
    chosen.extend([cloze for pair in chosen if (cloze := inverse_cloze(pair, rng))])
    rng.shuffle(chosen)
    return chosen


def inverse_cloze(pair: Pair, rng: random.Random) -> Pair | None:
    """One sentence of the passage as the query, the others as the passage."""
    parts = sentences(pair.text)
    usable = [i for i, part in enumerate(parts) if 5 <= len(part.split()) <= 40]
    if len(parts) < 3 or not usable:
        return None
    taken = rng.choice(usable)
    rest = " ".join(part for i, part in enumerate(parts) if i != taken)
    return Pair(parts[taken], rest, pair.source)
