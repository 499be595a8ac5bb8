"""The headings of a PDF's outline, by their places; and the page numbers printed on its pages."""

from __future__ import annotations

import re
from bisect import bisect_right
from dataclasses import dataclass, field
from typing import Any

from mmrag.reading.characters import clean

_LONGEST_LABEL = 20  # characters; page numbers such as "A-12" are shorter, anything else is not one


@dataclass(frozen=True, slots=True)
class Outline:
    """The headings of a document's outline, in the order of their places."""

    places: list[tuple[int, float]] = field(default_factory=list)
    headings: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, document: Any) -> Outline:
        """The outline of a PyMuPDF document."""
        path: list[str] = []
        found: list[tuple[int, float, int, str]] = []
        for order, (level, title, page, target) in enumerate(document.get_toc(simple=False)):
            title = " ".join(clean(title).split())
            path = [*path[: level - 1], title]
            if page > 0 and title:
                # An entry may name a page alone; its heading is then taken to stand at the top.
                top = getattr(target.get("to"), "y", 0.0)
                found.append((page, float(top), order, " > ".join(filter(None, path))))
        found.sort()
        return cls([entry[:2] for entry in found], [entry[3] for entry in found])

    def at(self, page: int, y: float) -> str | None:
        """The heading that a place lies under, with those above it: ``Plans > Dental``."""
        index = bisect_right(self.places, (page, y)) - 1
        return self.headings[index] if index >= 0 else None

    def of_page(self, page: int) -> str | None:
        """The first heading that begins on the page, else the one that it lies under."""
        index = bisect_right(self.places, (page, float("-inf")))
        if index < len(self.places) and self.places[index][0] == page:
            return self.headings[index]
        return self.headings[index - 1] if index else None


def printed_label(label: str) -> str | None:
    """The page number that PyMuPDF gives, decoded; None if there is none that a person would use.

    PyMuPDF leaves prefixes as they stand in the file: ``<FEFF0058>3`` is X3.
    """
    hexadecimal = re.match(r"<([0-9A-Fa-f\s]*)>", label)
    if hexadecimal:
        digits = "".join(hexadecimal[1].split())
        data = bytes.fromhex(digits + "0" * (len(digits) % 2))
        label = _text_string(data) + label[hexadecimal.end() :]
    elif "\\" in label:
        octal = re.sub(r"\\([0-7]{1,3})", lambda match: chr(int(match[1], 8) & 0xFF), label)
        data = octal.encode("latin-1", errors="replace")
        # Only the prefix is UTF-16; the number behind it is not.
        number = re.search(rb"\d*$" if data.startswith(b"\xfe\xff") else b"$", data)
        cut = number.start() if number else len(data)
        label = _text_string(data[:cut]) + data[cut:].decode("latin-1")
    label = " ".join(clean(label).split())
    return label if 0 < len(label) <= _LONGEST_LABEL and "\\" not in label else None


def _text_string(data: bytes) -> str:
    """A text string of PDF, 32000-1, 7.9.2.2."""
    if data.startswith(b"\xfe\xff"):
        return data[2:].decode("utf-16-be", errors="replace")
    return data.decode("latin-1")
