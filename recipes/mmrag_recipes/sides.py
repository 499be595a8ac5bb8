"""Sides of rows from files: images, and stretches of videos as the pages that indexing makes.

A video becomes frames in the store when rows are made, by the code that indexes it: images of their
own, or those of a clip. Rows, and all that reads them, know no videos.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, cast

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mmrag.errors import ConfigError, ContentError, ReadError
from mmrag.nodes import node_image, node_text
from mmrag.reading import ReadOptions, count_pages, read_clip, read_file
from mmrag.reading.files import VIDEO_SUFFIXES, missing_extras, suffixes
from mmrag.reading.video import STRETCH
from mmrag_recipes.rows import ImageStore, Item, ItemClip, Modality

logger = logging.getLogger("mmrag_recipes")

# Of Phi-3.5, LLaVA, Qwen and ms-swift: families put in their own.
_PLACEHOLDER = re.compile(r"<\|image_\d+\|>|<image>|<\|image_pad\|>|<video>|<\|video_pad\|>")


class Stretch(NamedTuple):
    """A stretch of a video file, in seconds; the whole of it by default."""

    video: str
    start: float = 0.0
    end: float = math.inf


class Files(NamedTuple):
    """What makes an item: a text, paths of images, and stretches of videos."""

    text: str | None
    images: Sequence[str] = ()
    stretches: Sequence[Stretch] = ()


class Side(BaseModel):
    """A side of a row that names files: a text, images, or a stretch of a video, in seconds.

    Examples:
        >>> Side(video="talk.mp4", start=60).files.stretches
        (Stretch(video='talk.mp4', start=60.0, end=inf),)
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    text: str | None = None
    image: str | tuple[str, ...] | None = None
    video: str | None = None
    start: float = Field(0.0, ge=0)
    end: float = math.inf

    @model_validator(mode="after")
    def _of_a_video(self) -> Side:
        if self.video is None and self.model_fields_set & {"start", "end"}:
            raise ValueError("start and end are those of a video, and there is none")
        if not self.start < self.end:
            raise ValueError(f"start={self.start:g} is not before end={self.end:g}")
        return self

    @property
    def files(self) -> Files:
        """What the side names."""
        images = (self.image,) if isinstance(self.image, str) else self.image or ()
        stretch = () if self.video is None else (Stretch(self.video, self.start, self.end),)
        return Files(self.text, images, stretch)


class Sides(BaseModel):
    """The sides of a row that name files; its other fields are those of ``Row``."""

    query: Side
    positives: list[Side] = Field(min_length=1)
    negatives: list[Side] = Field(default_factory=list)


class _Page(NamedTuple):
    """A page of a video, from start to end in seconds; as much of it as is asked for."""

    start: float
    end: float
    text: str
    image: str | None


@dataclass(frozen=True)
class Media:
    """Where a data set's images and videos come from and where images and frames go.

    items: what a page of a video becomes: its frame, what is said meanwhile, or both.
    clips: a stretch becomes one clip, as ``read_clip`` reads it, in place of frames.
    """

    folder: Path
    store: ImageStore
    items: Modality = "image"
    clips: bool = False
    _read_already: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    def item(self, files: Files) -> Item:
        """Make an item of a text, images and all frames of stretches, or the clip of one.

        Placeholders are taken out of the text, images and frames into the store. A text of the
        item's own stands in place of what is said in the videos.

        Raises:
            ContentError: If a file is missing or cannot be read, if nothing remains, and for
                several clips.
            ConfigError: If there is a video, and what reads videos is not installed.
        """
        paths = [self.folder / name for name in files.images]
        if absent := [str(path) for path in paths if not path.is_file()]:
            raise ContentError(f"there is no image {', '.join(absent)}")
        # Copied, so that the rows can be moved to another machine with the folder beside them.
        ids = [self.store.add(path) for path in paths]
        clip = self._clip(files.stretches) if self.clips and files.stretches else None
        if clip is None:
            return _item(files.text, ids, self._pages(files.stretches))
        said = self._lies_on(files.stretches[0]) if self.items == "fused" else []
        return _item(files.text, ids, said, clip)

    def documents(self, files: Files, right: Container[int] = ()) -> list[Item]:
        """Make a document: an item for each frame of stretches, as a collection holds them.

        With ``clips`` it is one item.

        Args:
            right: keys of documents; frames that are one of them are left out.

        Raises:
            ContentError: As ``item`` does, and for images beside a video.
            ConfigError: As ``item`` does.
        """
        if self.clips or not files.stretches:
            return [self.item(files)]
        if files.images:
            raise ContentError("a document has images or a video, not both")
        items = [_item(files.text, (), [page]) for page in self._pages(files.stretches)]
        # Each once: a picture that stays for minutes is on several pages.
        return [item for key, item in {i.key: i for i in items}.items() if key not in right]

    def _pages(self, stretches: Sequence[Stretch]) -> list[_Page]:
        """The pages that stretches lie on."""
        found = []
        for asked in stretches:
            lies_on = [page for page in self._lies_on(asked) if page.image or page.text]
            if not lies_on:
                end = "the end" if asked.end == math.inf else f"{asked.end:g} s"
                path = self.folder / asked.video
                raise ContentError(f"{path}: there is nothing from {asked.start:g} s to {end}")
            found += lies_on
        return found

    def _lies_on(self, asked: Stretch) -> list[_Page]:
        path = self.folder / asked.video
        pages: list[_Page] = self._once(path, lambda: self._read(path))
        return [page for page in pages if page.start < asked.end and asked.start < page.end]

    def _clip(self, stretches: Sequence[Stretch]) -> ItemClip:
        if len(stretches) > 1:
            raise ContentError(
                "an item has one clip at most: leave clips out, or all videos but one"
            )
        clip: ItemClip = self._once(stretches[0], lambda: self._read_clip(stretches[0]))
        return clip

    def _once(self, key: Any, read: Callable[[], Any]) -> Any:
        """What is read once; what cannot be read is refused again."""
        if key not in self._read_already:
            try:
                self._read_already[key] = read()
            except (ContentError, ReadError) as error:
                self._read_already[key] = error
        known = self._read_already[key]
        if isinstance(known, Exception):
            raise ContentError(str(known))
        return known

    def _checked(self, path: Path) -> Path:
        if not path.is_file():
            raise ContentError(f"there is no video {path}")
        suffix = path.suffix.lower()
        if suffix not in VIDEO_SUFFIXES:
            raise ContentError(f"{path}: not a video; use {' '.join(VIDEO_SUFFIXES)}")
        if suffix not in suffixes():
            raise ConfigError(missing_extras([suffix])[0])
        return path

    def _read_clip(self, asked: Stretch) -> ItemClip:
        path = self._checked(self.folder / asked.video)
        clip = read_clip(path, asked.start, asked.end - asked.start)
        frames = [self.store.add(cast(bytes, frame)) for frame in clip.frames]
        return ItemClip(frames=tuple(frames), seconds=tuple(clip.seconds))

    def _read(self, path: Path) -> list[_Page]:
        # Recognition changes no frame, and takes long.
        options = ReadOptions(ocr="off" if self.items == "image" else "auto")
        wants_frames = self.items != "text" and not self.clips
        errors: list[ReadError] = []
        starts: list[float] = []
        seen: list[tuple[str, str | None]] = []
        with TemporaryDirectory(prefix="mmrag-frames-") as scratch:
            for page in read_file(self._checked(path), scratch, options, on_error=errors.append):
                node = page.nodes[0]
                shown = node_image(node) if wants_frames else None
                said = node_text(node).strip() if self.items != "image" else ""
                starts.append(node.metadata["start"])
                seen.append((said, self.store.add(shown) if shown else None))
        if not seen:
            raise errors[0]
        for error in errors:
            logger.warning("%s", error)
        # What stays as it is, without a word, has no page of its own.
        ends = [*starts[1:], count_pages(path) * STRETCH]
        timed = zip(starts, ends, seen, strict=True)
        return [_Page(start, end, said, image) for start, end, (said, image) in timed]


def _item(
    text: str | None, ids: Sequence[str], pages: Sequence[_Page], clip: ItemClip | None = None
) -> Item:
    plain = _PLACEHOLDER.sub("", text or "").strip()
    plain = plain or "\n\n".join(page.text for page in pages if page.text)
    shown = (*ids, *dict.fromkeys(page.image for page in pages if page.image))
    if not plain and not shown and not clip:
        raise ContentError("an item has neither text nor image")
    image = shown[0] if len(shown) == 1 else shown or None
    return Item(text=plain or None, image=image, clip=clip)
