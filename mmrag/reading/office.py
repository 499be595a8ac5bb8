"""Office documents, web pages, books and mail, by way of Markdown; the ``office`` extra.

markitdown turns a file into Markdown: headings, tables, and images as data URLs at their place.
Docling keeps more of a layout, but needs torch models and torchvision, and minutes where
markitdown needs seconds. Runs in a worker process.
"""

from __future__ import annotations

import base64
import binascii
import email
import email.policy
import hashlib
import io
import re
import zipfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from mmrag.content import load_image
from mmrag.errors import ContentError, is_environment_error
from mmrag.reading.characters import clean
from mmrag.reading.figures import CAPTION
from mmrag.reading.files import write
from mmrag.reading.options import (
    Figure,
    PageRecord,
    Passage,
    Problem,
    ReadOptions,
    Refused,
    Skipped,
    Step,
)
from mmrag.reading.passages import n_words
from mmrag.reading.text import pieces, sections

_CONVERTERS = {
    ".docx": "DocxConverter", ".pptx": "PptxConverter", ".xlsx": "XlsxConverter",
    ".xls": "XlsConverter", ".html": "HtmlConverter", ".htm": "HtmlConverter",
    ".xhtml": "HtmlConverter", ".epub": "EpubConverter", ".msg": "OutlookMsgConverter",
    ".csv": "CsvConverter",
}  # fmt: skip
_ZIPPED = (".docx", ".pptx", ".xlsx", ".epub")
_ZIP, _OLE = b"PK\x03\x04", b"\xd0\xcf\x11\xe0"  # how the two containers begin

# Emphasis and addresses of links would stand between the words of a quote.
_MARKDOWN = {
    "keep_data_uris": True, "escape_underscores": False, "escape_asterisks": False,
    "strip": ["a", "b", "strong", "em", "i", "u", "s", "del"],
}  # fmt: skip

_IMAGE = re.compile(r"!\[([^\]]*)\]\((?:data:image/([\w.+-]+);base64,([A-Za-z0-9+/=\s]*)|[^)]*)\)")
_SLIDE = re.compile(r"^<!-- Slide number: (\d+) -->$", re.MULTILINE)
_SHEET = re.compile(r"^## (.+)$", re.MULTILINE)
# What pandas writes for an empty cell, and for a column without a heading.
_NO_VALUE = re.compile(r"(?<=\| )(?:NaN|NaT|Unnamed: \d+)(?= \|)")
# What stands where an image has no description: its name in PowerPoint, or that of its file.
_NO_ALT = re.compile(
    r"(?:Picture|Image|Graphic|Content Placeholder|Grafik|Bild) \d+|\S+\.(?:png|jpe?g|gif|bmp)",
    re.IGNORECASE,
)
_MIN_SIDE = 48  # pixels: smaller images are icons and bullets


def read_records(
    path: Path, folder: Path, options: ReadOptions, first: int, skipped: Skipped
) -> Iterator[PageRecord | Passage | Problem | Step]:
    """Slides of a presentation from ``first`` on; of any other file, passages and images.

    Raises:
        Refused: If the file cannot be converted.
    """
    yield Step(None, "convert")
    suffix = path.suffix.lower()
    _check(path, suffix, options)
    if suffix == ".eml":
        yield from _read_mail(path, options)
        return
    text, title = _converted(path, suffix)
    figures = _Figures(folder, options)
    if suffix == ".pptx":
        yield from _slides(text, figures, options, first, skipped)
    elif suffix == ".msg":
        body = re.sub(r"^\*\*(\w+):\*\* ", r"\1: ", text, flags=re.MULTILINE)
        body = body.removeprefix("# Email Message").replace("\n## Content\n", "\n", 1)
        yield from _passages([(None, body)], f"message {title}" if title else None, options)
    else:
        yield from _document(text, title, suffix, figures, options)


def _check(path: Path, suffix: str, options: ReadOptions) -> None:
    """Raise Refused for a file of another format, or one that unpacks to too much."""
    with path.open("rb") as file:
        head = file.read(4)
    wanted = _ZIP if suffix in _ZIPPED else _OLE if suffix in (".xls", ".msg") else None
    if head != wanted and (wanted is not None or head in (_ZIP, _OLE)):
        raise Refused(
            f"the content is not that of a {suffix} file: it may have a password, be damaged, or "
            "be of an older format; open it and save it anew"
        )
    if wanted != _ZIP:
        return
    try:
        with zipfile.ZipFile(path) as archive:
            # zipfile reads no more of a member than the size that is declared here.
            size = sum(member.file_size for member in archive.infolist())
    except zipfile.BadZipFile as error:
        raise Refused(f"it is damaged ({error}): open it and save it anew") from error
    if size > options.max_file_bytes:
        raise Refused(
            f"it unpacks to {size:,} bytes, over the limit of {options.max_file_bytes:,}; "
            "split the file or raise max_file_bytes"
        )


def _converted(path: Path, suffix: str) -> tuple[str, str | None]:
    """The file as Markdown, and its title if it has one."""
    from markitdown import StreamInfo, converters

    try:
        converter = getattr(converters, _CONVERTERS[suffix])()
        with path.open("rb") as file:
            result = converter.convert(file, StreamInfo(extension=suffix), **_MARKDOWN)
    except Exception as error:  # libraries for damaged files raise anything
        if is_environment_error(error):
            raise
        raise Refused(
            f"it cannot be converted ({type(error).__name__}: {error}); it is damaged or has a "
            "password: open it and save it anew"
        ) from error
    title = " ".join(clean(str(result.title or "")).split())
    return clean(result.markdown), title or None


def _slides(
    text: str, figures: _Figures, options: ReadOptions, first: int, skipped: Skipped
) -> Iterator[PageRecord | Problem | Step]:
    parts = _SLIDE.split(text)[1:]
    for number, body in zip(map(int, parts[::2]), parts[1::2], strict=True):
        if number < first:
            continue
        if number > options.max_pages:
            message = f"only the first {options.max_pages:,} slides are read"
            yield Problem(None, f"{message}: split the file, or raise max_pages")
            return
        heading = re.search(r"^# (.+)$", body, re.MULTILINE)
        section = heading[1].strip()[:200] if heading else None
        shown = _without_images(body)
        cut = list(pieces(shown, options.passage_words, options.passage_overlap))
        found: list[Figure] = []
        if options.figures and (number, "figures") not in skipped:
            yield Step(number, "figures")
            for made in figures.of(body, number, section):
                if isinstance(made, Problem):
                    yield made
                else:
                    found.append(Figure(None, made[0], made[1], made[1], section))
        yield PageRecord(
            page=number,
            image=None,
            text=shown,
            text_layer=None,
            page_name=f"slide {number}",
            section=section,
            passages=tuple(Passage(piece, None) for piece in cut) if len(cut) > 1 else (),
            figures=tuple(found),
        )


def _document(
    text: str, title: str | None, suffix: str, figures: _Figures, options: ReadOptions
) -> Iterator[Passage | Problem | Step]:
    """Passages of a file without pages, and then its images, which may be the harder part."""
    parts: list[tuple[str | None, str, str | None]] = []
    if suffix in (".xlsx", ".xls"):
        found = _SHEET.split(text)[1:]
        for name, table in zip(found[::2], found[1::2], strict=True):
            parts.append((None, _NO_VALUE.sub("", table), f"sheet {name.strip()}"))
    else:
        parts = [(section or title, body, None) for section, body in sections(text)]
    for section, body, place in parts:
        yield from _passages([(section, body)], place, options)
    if not options.figures:
        return
    yield Step(None, "figures")
    for section, body, place in parts:
        for made in figures.of(body, None, section):
            if isinstance(made, Problem):
                yield made
            else:
                yield Passage(made[0], None, section, place, image=made[1])


def _passages(
    parts: list[tuple[str | None, str]], place: str | None, options: ReadOptions
) -> Iterator[Passage]:
    for section, body in parts:
        for piece in _cut(_without_images(body).strip(), options):
            yield Passage(piece, None, section, place)


def _cut(text: str, options: ReadOptions) -> Iterator[str]:
    """Passages of a section; each part of a long table begins with the table's heading."""
    limit, overlap = options.passage_words, options.passage_overlap
    if "\n|" not in f"\n{text}" or _length(text) <= limit:
        yield from pieces(text, limit, overlap)
        return
    for is_table, run in groupby(text.split("\n"), lambda line: line.startswith("|")):
        lines = list(run)
        if not is_table:
            yield from pieces("\n".join(lines), limit, overlap)
            continue
        head = lines[:2]
        rows: list[str] = []
        size = start = _length("\n".join(head))
        for row in lines[2:]:
            words = _length(row)
            if rows and size + words > limit:
                yield "\n".join([*head, *rows])
                rows, size = [], start
            rows.append(row)
            size += words
        yield "\n".join([*head, *rows])


def _length(text: str) -> int:
    """Words of a text, without the bars of tables."""
    return sum(map(n_words, text.replace("|", " ").split()))


def _read_mail(path: Path, options: ReadOptions) -> Iterator[Passage | Problem]:
    """The text of a mail under its headings; attachments are named and not read."""
    with path.open("rb") as file:
        mail = email.message_from_binary_file(file, policy=email.policy.default)
    names = ("From", "To", "Cc", "Date", "Subject")
    heads = [f"{name}: {' '.join(str(mail[name]).split())}" for name in names if mail[name]]
    body = mail.get_body(("plain", "html"))
    text = "" if body is None else str(body.get_content())
    if body is not None and body.get_content_subtype() == "html":
        from markitdown.converters import HtmlConverter

        text = HtmlConverter().convert_string(text, **_MARKDOWN).markdown
    if not heads and not text.strip():
        raise Refused("it holds neither headings nor a text: it is no mail, or damaged")
    subject = " ".join(clean(str(mail["Subject"] or "")).split())
    whole = clean("\n".join([*heads, "", text.replace("\r\n", "\n")]))
    yield from _passages([(None, whole)], f"message {subject}" if subject else None, options)
    for part in mail.iter_attachments():
        name = part.get_filename() or part.get_content_type()
        yield Problem(None, f"its attachment {name} is not read; save it and index it")


def _without_images(text: str) -> str:
    """Images replaced by their alternative text, where they are links; embedded ones go."""
    return _IMAGE.sub(lambda match: "" if match[3] else match[1], text)


class _Figures:
    """Saves the images that Markdown embeds; one that comes again, as a logo, is saved once."""

    def __init__(self, folder: Path, options: ReadOptions) -> None:
        self._folder = folder
        self._options = options
        self._seen: set[str] = set()

    def of(self, text: str, page: int | None, section: str | None) -> Iterator[Any]:
        """Caption and path of each image of a text, or a Problem."""
        for match in _IMAGE.finditer(text):
            if not match[3]:
                continue
            mark = hashlib.sha256(match[3].encode()).hexdigest()[:16]
            if mark in self._seen:
                continue
            self._seen.add(mark)
            try:
                path = self._saved(match[3], mark)
            except (ContentError, binascii.Error) as error:
                if isinstance(error.__cause__, MemoryError):
                    raise error.__cause__ from error
                told = f"an image of the type {match[2]} cannot be decoded; it is left out"
                yield Problem(page, told)
                continue
            if path is None:
                continue
            below = text[match.end() :].lstrip().split("\n", 1)[0].strip()
            alt = "" if _NO_ALT.fullmatch(match[1]) else match[1].strip()
            yield (below if CAPTION.match(below) else alt or section or ""), path.as_posix()

    def _saved(self, encoded: str, mark: str) -> Path | None:
        image = load_image(base64.b64decode(encoded))
        if min(image.size) < _MIN_SIDE:
            return None
        pixels = self._options.max_page_pixels
        if image.width * image.height > pixels:
            scale = (pixels / (image.width * image.height)) ** 0.5
            image.thumbnail((max(1, int(image.width * scale)), max(1, int(image.height * scale))))
        out = self._folder / f"e{mark}.png"
        if not out.exists():
            data = io.BytesIO()
            image.save(data, "PNG")
            write(out, data.getvalue())
        return out
