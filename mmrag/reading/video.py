"""Videos: frames with the words that are said meanwhile; the ``video`` extra.

A video is cut into stretches of ``STRETCH`` seconds. Each gives its first frame, and what its
subtitles say; the frame is left out where the picture is still the one before. Runs in a worker
process, which decodes by FFmpeg through PyAV.
"""

from __future__ import annotations

import io
import re
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mmrag.errors import is_environment_error
from mmrag.reading import layout
from mmrag.reading.characters import clean
from mmrag.reading.encodings import NotText, UnknownEncoding, decode
from mmrag.reading.files import write
from mmrag.reading.images import encoded, recognised
from mmrag.reading.layout import Token
from mmrag.reading.options import PageRecord, Problem, ReadOptions, Refused, Skipped, Step

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.stream import VideoStream

STRETCH = 20.0
"""Seconds. People say about fifty words in them: enough to be found by, and near enough to cite."""

# The container is named and not detected: a playlist called .mp4 would open other files and hosts.
_CONTAINERS = {
    ".mp4": "mov", ".m4v": "mov", ".mov": "mov",
    ".mkv": "matroska", ".webm": "matroska", ".avi": "avi",
}  # fmt: skip
_SUBTITLES = {".srt": "srt", ".vtt": "webvtt"}
_IMAGES = ("hdmv_pgs_subtitle", "dvd_subtitle", "dvb_subtitle", "xsub")  # subtitles that are drawn
_OVERRIDE = re.compile(r"\{[^{}]*\}")  # colours and places of Advanced SubStation Alpha
_LOCAL = {"protocol_whitelist": "file"}

_JPEG = Path("frame.jpg")  # what a frame of a clip is encoded as
_LEAST_FRAMES, _MOST_FRAMES = 4, 64

_THUMB = (32, 32)
# Of 255, in any cell of the thumbnail. Coding the same picture again moves a cell by a few; a new
# line on a slide moves those it runs through by thirty and more.
_CHANGED = 16


@dataclass(frozen=True, slots=True)
class Cue:
    """A subtitle. start, end: in seconds."""

    start: float
    end: float
    text: str


def read_stretches(
    path: Path, folder: Path, options: ReadOptions, first: int, skipped: Skipped
) -> Iterator[PageRecord | Problem | Step]:
    """Each stretch from ``first`` on that has a new picture or words; ``image`` None: as before.

    Raises:
        Refused: If the file cannot be opened, or holds no video.
    """
    yield Step(None, "open")
    with _opened(path) as container:
        cues = yield from _cues(path, container)
        frames = _Frames(container)
        for number in range(first, frames.n_stretches + 1):
            if number > options.max_pages:
                message = f"only the first {options.max_pages:,} stretches are read"
                yield Problem(None, f"{message}: split the file, or raise max_pages")
                return
            yield Step(number, "image")
            start = (number - 1) * STRETCH
            said = " ".join(cue.text for cue in cues if start <= cue.start < start + STRETCH)
            image = None
            if (number, "image") not in skipped:
                image = yield from frames.save(number, folder / f"p{number:04d}.jpg", options)
            tokens: list[Token] | None = []
            if image is not None:
                tokens = yield from recognised(image, number, options, skipped)
            elif not said:
                continue
            clip = yield from frames.save_clip(number, folder, options, skipped)
            yield PageRecord(
                page=number,
                image=image.as_posix() if image else None,
                text="\n\n".join(filter(None, (layout.text_of(tokens or []), said))),
                text_layer="ocr" if tokens else None,
                # Where people speak, what the picture may say besides is no gap to warn of.
                needs_ocr=tokens is None and not cues,
                page_name=f"at {clock(start)}",
                start=start,
                clip=clip,
            )


def read_frames(
    path: Path, start: float, length: float, options: ReadOptions
) -> Iterator[tuple[bytes, float]]:
    """Frames of a part of a video, as JPEG, and their times; see ``_Frames.sampled``."""
    with _opened(path) as container:
        for image, seconds in _Frames(container).sampled(start, length):
            yield encoded(image, _JPEG, options), seconds


def count_stretches(path: Path) -> Iterator[int]:
    """How many stretches a video has."""
    with _opened(path) as container:
        yield _Frames(container).n_stretches


def _opened(path: Path) -> InputContainer:
    import av

    form = _CONTAINERS[path.suffix.lower()]
    try:
        container = av.open(path, "r", format=form, options=_LOCAL)
    except av.FFmpegError as error:
        if is_environment_error(error):
            raise
        message = f"the video cannot be opened ({error}); it is damaged or of another format"
        raise Refused(f"{message}: convert it with: ffmpeg -i IN OUT.mp4") from error
    if not container.streams.video:
        container.close()
        raise Refused("it holds no video, only sound; get the video, or index a transcript")
    return container


def clock(seconds: float) -> str:
    """A time as players show it: ``2:05``, ``1:02:05``."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class _Frames:
    """Frames of a video by time."""

    def __init__(self, container: InputContainer) -> None:
        self._container = container
        self._stream = stream = container.streams.video[0]
        self._base = float(stream.time_base or 1 / 90_000)
        self._begin = float(stream.start_time or 0) * self._base
        self._before: NDArray[np.int16] | None = None
        length = container.duration
        if length is None:
            raise Refused("it does not say how long it is; convert it with: ffmpeg -i IN OUT.mp4")
        # In millionths of a second. A stretch begins before the end, if only just.
        self._length = length / 1e6
        self.n_stretches = max(1, int(np.ceil(self._length / STRETCH)))

    def save(
        self, number: int, out: Path, options: ReadOptions
    ) -> Generator[Problem, None, Path | None]:
        """Write the frame of a stretch; None if it shows what the last one did, or is damaged."""
        import av

        start = (number - 1) * STRETCH
        try:
            frame = self._changed(start)
        except av.FFmpegError as error:
            if is_environment_error(error):
                raise
            yield Problem(number, f"the frame at {clock(start)} cannot be decoded ({error})")
            return None
        if frame is None:
            return None
        write(out, encoded(frame, out, options))
        return out

    def save_clip(
        self, number: int, folder: Path, options: ReadOptions, skipped: Skipped
    ) -> Generator[Step | Problem, None, tuple[tuple[str, float], ...]]:
        """Write the frames of a stretch, if clips are asked for; none if one is damaged."""
        import av

        if not options.clips or (number, "clip") in skipped:
            return ()
        yield Step(number, "clip")
        saved: list[tuple[str, float]] = []
        try:
            for image, seconds in self.sampled((number - 1) * STRETCH, STRETCH):
                # Named as what is half written: the frames that a killed run leaves are removed.
                out = folder / f".p{number:04d}-{len(saved):02d}.tmp"
                write(out, encoded(image, _JPEG, options))
                saved.append((out.as_posix(), seconds))
        except av.FFmpegError as error:
            if is_environment_error(error):
                raise
            at = clock((number - 1) * STRETCH)
            yield Problem(number, f"the clip at {at} cannot be decoded ({error})")
            return ()
        return tuple(saved)

    def sampled(self, start: float, length: float) -> Iterator[tuple[Image.Image, float]]:
        """A frame a second of a part, upright, and when it is shown, in seconds from ``start``.

        At least 4, at most 64, an even number, evenly from the first frame to the last: as
        ``smart_nframes`` of qwen-vl-utils 0.0.14 takes them from a file that holds the part.
        """
        rate = float(self._stream.average_rate or 1)
        # A part that is 20 s long at 29.97 frames a second shows a 600th frame at its end.
        n_there = int(np.ceil(min(length, self._length - start) * rate - 1e-6))
        n = int(min(max(n_there / rate, _LEAST_FRAMES), _MOST_FRAMES, n_there)) // 2 * 2
        if n < 2:
            return
        times = np.linspace(0, n_there - 1, n).round() / rate
        left = [float(time) for time in times]
        begin = self._begin + start
        self._container.seek(int(begin / self._base), stream=self._stream, backward=True)
        for frame in self._container.decode(self._stream):
            while left and frame.time is not None and frame.time >= begin + left[0] - 0.5 / rate:
                yield _upright(frame.to_image(), frame, self._stream), left.pop(0)  # type: ignore[no-untyped-call]
            if not left:
                return

    def _changed(self, seconds: float) -> Image.Image | None:
        """The frame at a time or soon after, upright; None if it shows what the last one did."""
        wanted = self._begin + seconds
        # Key frames can be decoded on their own: one that is near saves decoding all before.
        near = wanted + STRETCH / 4
        self._container.seek(int(near / self._base), stream=self._stream, backward=True)
        for frame in self._container.decode(self._stream):
            if frame.time is not None and frame.time >= wanted - STRETCH / 4:
                break
        else:
            return None  # after the last
        image: Image.Image = frame.to_image()  # type: ignore[no-untyped-call]
        thumb = np.asarray(image.convert("L").resize(_THUMB), dtype=np.int16)
        if self._before is not None and int(np.abs(thumb - self._before).max()) < _CHANGED:
            return None
        self._before = thumb
        return _upright(image, frame, self._stream)


def _upright(image: Image.Image, frame: Any, stream: VideoStream) -> Image.Image:
    # Pixels of old cameras are not square.
    ratio = float(stream.sample_aspect_ratio or 1) or 1.0
    if ratio != 1.0:
        image = image.resize((max(1, round(image.width * ratio)), image.height))
    return image.rotate(frame.rotation, expand=True) if frame.rotation else image


def _cues(path: Path, container: InputContainer) -> Generator[Problem, None, list[Cue]]:
    """The subtitles beside the file, else those in it; of several, the first."""
    import av

    beside = sorted(
        each
        for suffix in _SUBTITLES
        for each in (path.with_suffix(suffix), *path.parent.glob(f"{escape(path.stem)}.*{suffix}"))
        if each.is_file()
    )
    try:
        if beside:
            text = decode(beside[0].read_bytes())
            form = _SUBTITLES[beside[0].suffix.lower()]
            with av.open(io.BytesIO(text.encode()), "r", format=form) as subtitles:
                return list(_decoded(subtitles))
        return list(_decoded(container))
    except (av.FFmpegError, OSError, NotText, UnknownEncoding) as error:
        if is_environment_error(error):
            raise
        name = f"the subtitles in {beside[0].name}" if beside else "its subtitles"
        yield Problem(None, f"{name} cannot be read ({error}); the video is read without them")
        return []


def _decoded(container: InputContainer) -> Iterator[Cue]:
    """The cues of the first stream of subtitles that is text."""
    streams = [s for s in container.streams.subtitles if s.codec_context.name not in _IMAGES]
    if not streams:
        return
    last = ""
    for packet in container.demux(streams[0]):
        for subtitle in packet.decode():
            dialogue = getattr(subtitle, "dialogue", b"") or b""
            text = clean(_OVERRIDE.sub("", dialogue.decode(errors="replace")))
            # Captions made by machines roll: the last line of one is the first of the next.
            lines = [line.strip() for line in text.splitlines() if line.strip()]
            if lines and lines[0] == last:
                del lines[0]
            if lines and packet.pts is not None:
                start = float(packet.pts * packet.time_base)
                length = float((packet.duration or 0) * packet.time_base)
                last = lines[-1]
                yield Cue(start, start + length, " ".join(lines))
