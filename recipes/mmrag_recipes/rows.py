"""The one row format of all recipes: JSON lines, images by id in a store beside them.

A row asks ``query`` and knows what answers it::

    {"id": "q1", "task": "page_for_question", "instruction": "Find a page ...",
     "query": {"text": "Which plan covers eye exams?"},
     "positives": [{"image": "1f0c...", "text": "..."}], "negatives": [],
     "positive_scores": [], "negative_scores": [], "source": "a.pdf#3", "license": "MIT"}

A clip of a video is ``{"clip": {"frames": ["5b2a...", "77c0..."], "seconds": [0, 1]}}``.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    ValidationError,
    field_validator,
    model_validator,
)

from mmrag.content import Clip, Content, load_image
from mmrag.content import Modality as ContentModality
from mmrag.errors import ContentError

Modality = Literal["text", "image", "fused"]
IMAGES = "images"
_PLACE = re.compile(r"\S.*?#\d+")  # a.pdf#3


class ItemClip(BaseModel):
    """A clip: ids of its frames in the store, and when each is shown, as in ``Clip``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    frames: tuple[str, ...]
    seconds: tuple[float, ...]

    @model_validator(mode="after")
    def _is_one(self) -> ItemClip:
        try:
            Clip(self.frames, self.seconds)
        except ContentError as error:
            raise ValueError(str(error)) from error
        return self


class Item(BaseModel):
    """One side of a pair: a text, the id of an image in the store, or both; or a clip.

    Several images are for models that take several, clips for models that take clips, alone or
    with the others.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    text: str | None = None
    image: str | tuple[str, ...] | None = None
    clip: ItemClip | None = None

    @model_validator(mode="before")
    @classmethod
    def _no_video(cls, values: Any) -> Any:
        if isinstance(values, dict) and "video" in values:
            raise ValueError("rows hold images and clips: `convert rows` makes them of videos")
        return values

    @field_validator("text")
    @classmethod
    def _is_unicode(cls, text: str | None) -> str | None:
        # Half of a surrogate pair, as a cut in JavaScript leaves it, cannot be written.
        if text is not None:
            text.encode()
        return text

    @model_validator(mode="after")
    def _something(self) -> Item:
        if self.text is None and self.image is None and self.clip is None:
            raise ValueError("an item needs a text, an image, or both, or a clip")
        return self

    @property
    def modality(self) -> ContentModality:
        """``text``, ``image`` or ``fused``; ``clip`` with a clip, as that of a ``Content``."""
        if self.clip is not None:
            return "clip"
        if self.image is None:
            return "text"
        return "image" if self.text is None else "fused"

    @property
    def images(self) -> tuple[str, ...]:
        """Ids of the images, in order."""
        if self.image is None:
            return ()
        return (self.image,) if isinstance(self.image, str) else self.image

    @property
    def files(self) -> tuple[str, ...]:
        """Ids of all that the item has in the store: images, and frames of its clip."""
        return self.images + (self.clip.frames if self.clip else ())

    @property
    def key(self) -> int:
        """A 63-bit hash of the content: equal items are the same document."""
        # Without a clip as before there were clips: vectors are kept by these keys.
        clip = [self.clip.model_dump()] if self.clip else []
        raw = json.dumps([self.text, self.image, *clip]).encode()
        return int.from_bytes(hashlib.sha256(raw).digest()[:8], "big") >> 1


class Row(BaseModel):
    """A query, what answers it, and what does not.

    Scores, where given, are a teacher's: one per positive and one per negative.
    """

    model_config = ConfigDict(extra="forbid")

    id: str = Field(min_length=1)
    task: str = ""
    instruction: str | None = None
    query: Item
    positives: list[Item] = Field(min_length=1)
    negatives: list[Item] = Field(default_factory=list)
    positive_scores: list[FiniteFloat] = Field(default_factory=list)
    negative_scores: list[FiniteFloat] = Field(default_factory=list)
    source: str = ""
    license: str = ""

    @model_validator(mode="after")
    def _consistent(self) -> Row:
        for kind in ("positive", "negative"):
            scores, items = getattr(self, f"{kind}_scores"), getattr(self, f"{kind}s")
            if scores and len(scores) != len(items):
                raise ValueError(f"{len(scores)} {kind}_scores for {len(items)} {kind}s")
        if not set(self.positives).isdisjoint(self.negatives):
            raise ValueError("a negative is the same as a positive")
        return self

    @property
    def pair(self) -> str:
        """Modalities of query and first positive, as in ``text->image``."""
        return f"{self.query.modality}->{self.positives[0].modality}"

    @property
    def place(self) -> str | None:
        """File and page that the source names, as in ``a.pdf#3``; None if it names none.

        What stands on that page may answer the query, in whatever cut.
        """
        found = _PLACE.match(self.source)
        return found.group() if found else None


class ImageStore:
    """Images of a data set, one file each, named by the hash of their bytes."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def add(self, image: Image.Image | Path | bytes) -> str:
        """Store an image unless it is there already. Returns its id.

        Raises:
            ContentError: If it cannot be decoded.
        """
        if isinstance(image, Image.Image):
            buffer = io.BytesIO()
            image.convert("RGB").save(buffer, "PNG")
            raw = buffer.getvalue()
        else:
            raw = image if isinstance(image, bytes) else image.read_bytes()
            # Decoded once here, so that a broken image is found now and not in the middle of a
            # training.
            load_image(raw)
        # By content: the same image is stored once, whatever it was called.
        name = hashlib.sha256(raw).hexdigest()[:24]
        target = self.folder / name
        if not target.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            partial = target.with_suffix(f".{os.getpid()}.part")
            partial.write_bytes(raw)
            partial.replace(target)
        return name

    def path(self, image_id: str) -> Path:
        """File of an image. Raises ContentError if there is none of that id."""
        path = self.folder / image_id
        # An id is no path: rows from elsewhere must not reach outside of the store.
        if Path(image_id).name != image_id or not path.is_file():
            raise ContentError(f"{self.folder}: there is no image with id {image_id!r}.")
        return path

    def content(self, item: Item) -> Content:
        """Turn an item into what an embedder takes; images and frames as paths."""
        paths = [self.path(name) for name in item.images]
        frames = [self.path(name) for name in item.clip.frames] if item.clip else []
        clip = Clip(frames, item.clip.seconds) if item.clip else None
        return Content(item.text, paths[0] if len(paths) == 1 else paths or None, clip=clip)

    def copy_from(self, other: ImageStore, image_id: str) -> None:
        """Take over an image of another store under its id."""
        target = self.folder / image_id
        if not target.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(other.path(image_id), target)


def store_of(rows_file: str | Path) -> ImageStore:
    """Find the store of a rows file: the folder ``images`` beside it."""
    return ImageStore(Path(rows_file).parent / IMAGES)


def read_rows(path: str | Path) -> list[Row]:
    """All rows of a file. Raises ContentError that names every bad line, or if there is no row."""
    rows, problems = check_rows(path)
    if problems:
        raise ContentError("\n".join(problems))
    if not rows:
        raise ContentError(f"{path}: there are no rows.")
    return rows


def check_rows(path: str | Path, store: ImageStore | None = None) -> tuple[list[Row], list[str]]:
    """Read a file of rows; with a store, also look for each image.

    Returns:
        The good rows, and one message per bad line: what is wrong and where.

    Raises:
        ContentError: If the file cannot be read.
    """
    rows: list[Row] = []
    problems: list[str] = []
    seen: dict[str, int] = {}
    for number, value in _lines(path, problems):
        try:
            row = Row.model_validate(value)
        except ValidationError as error:
            problems.append(f"{path}:{number}: {first_problem(error)}")
            continue
        if row.id in seen:
            problems.append(f"{path}:{number}: id {row.id!r} is in line {seen[row.id]} already")
            continue
        missing = _missing_image(row, store)
        if missing:
            problems.append(f"{path}:{number}: {missing}")
            continue
        seen[row.id] = number
        rows.append(row)
    return rows, problems


def _lines(path: str | Path, problems: list[str]) -> Iterator[tuple[int, Any]]:
    try:
        # Not splitlines, which also cuts at U+2028 inside of a JSON text.
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise ContentError(f"{path}: the rows cannot be read ({error}).") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except ValueError as error:
            problems.append(f"{path}:{number}: not valid JSON ({error})")


def first_problem(error: ValidationError) -> str:
    """What is wrong with a row, in one line."""
    problem = error.errors()[0]
    where = ".".join(str(part) for part in problem["loc"]) or "row"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{where}: {problem['msg'].removeprefix('Value error, ')}{more}"


def _missing_image(row: Row, store: ImageStore | None) -> str | None:
    if store is None:
        return None
    for item in (row.query, *row.positives, *row.negatives):
        try:
            store.content(item)
        except ContentError as error:
            return str(error)
    return None


def write_rows(path: str | Path, rows: Iterable[Row]) -> int:
    """Write rows whole or not at all. Returns how many."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".part")
    count = 0
    try:
        with partial.open("w", encoding="utf-8") as file:
            for row in rows:
                # Without empty fields, which would double the size of most rows.
                file.write(row.model_dump_json(exclude_defaults=True) + "\n")
                count += 1
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return count


def corpus_of(rows: Sequence[Row]) -> list[Item]:
    """Every distinct document of the rows, in order of first appearance."""
    items = (item for row in rows for item in (*row.positives, *row.negatives))
    return list({item.key: item for item in items}.values())


def images_of(rows: Iterable[Row]) -> set[str]:
    """Ids of all images of the rows, frames of clips included."""
    items = (item for row in rows for item in (row.query, *row.positives, *row.negatives))
    return {name for item in items for name in item.files}
