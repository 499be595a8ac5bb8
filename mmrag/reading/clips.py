"""Parts of videos as clips, for embedders that were trained on them."""

from __future__ import annotations

from pathlib import Path

from mmrag.content import Clip
from mmrag.errors import ReadError
from mmrag.reading import client
from mmrag.reading.files import file_kind
from mmrag.reading.options import ReadOptions


def read_clip(
    path: str | Path,
    start: float = 0.0,
    seconds: float = 20.0,
    options: ReadOptions | None = None,
) -> Clip:
    """A part of a video as indexing with ``ReadOptions(clips=True)`` takes it: a frame a second.

    At most 64 frames, evenly over the part; a page of a video has 20 seconds or more.

    Args:
        start: where the part begins, in seconds; times in the clip count from there.
        seconds: how long it is; the end of the video ends it.
        options: limits on time, memory, and pixels of a frame.

    Raises:
        ReadError: If it cannot be read, is no video, or shows less than two frames then.

    Examples:
        >>> clip = read_clip("talk.mp4", start=60)  # doctest: +SKIP
        >>> embedder.encode([Content(clip=clip)])  # doctest: +SKIP
    """
    path, options = Path(path), options or ReadOptions()
    name = path.as_posix()
    if file_kind(path, options, name) != "video":
        raise ReadError("it is no video, and has no clips", file=name)
    try:
        found = list(client.ask(options, "clip", path, start, seconds, options))
    except (client.RequestFailed, client.WorkerDied) as error:
        message = f"the clip cannot be read ({error})"
        raise ReadError(message, file=name, retry=error.retry) from error
    if not found:
        raise ReadError(f"it shows less than two frames from {start:g} s on", file=name)
    frames, times = zip(*found, strict=True)
    return Clip(frames, times)


def discard(clip: Clip | None) -> None:
    """Remove the files that the frames of a clip are, as reading with ``clips`` has made them."""
    for frame in clip.frames if clip else ():
        assert isinstance(frame, str)
        Path(frame).unlink(missing_ok=True)
