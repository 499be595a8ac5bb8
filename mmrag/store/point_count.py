"""How many points a shard had when it was last closed, in a file beside it."""

from __future__ import annotations

import logging
from contextlib import suppress
from pathlib import Path

log = logging.getLogger(__name__)

COUNT = ".count"
"""Suffix of the file beside the shard's folder."""


class PointCount:
    """The number of points, kept while nothing is written, so that opening can compare it.

    A process that is killed while it writes leaves no number, and the next one compares nothing.

    Attributes:
        missing: how many points fewer there are than were stored; negative for points that came
            back, 0 where the number is not known.
    """

    def __init__(self, shard: Path) -> None:
        self._shard = shard
        self._file = Path(f"{shard}{COUNT}")
        self.missing = 0

    def compare(self, found: int) -> None:
        """Warn if points were lost, or came back, since the shard was last closed."""
        try:
            expected = int(self._file.read_text(encoding="ascii"))
        except (FileNotFoundError, ValueError):
            return
        self.missing = expected - found
        if self.missing:
            log.warning(
                "%s holds %d points, and %d were stored: its files were damaged. Run mmrag doctor.",
                self._shard,
                found,
                expected,
            )

    def forget(self) -> None:
        """Delete the number: points are about to change."""
        self._file.unlink(missing_ok=True)

    def settle(self) -> None:
        """Take the present number for the right one."""
        self.missing = 0
        self.forget()

    def keep(self, found: int) -> None:
        """Write the number, whole or not at all; points that are missing go on being so."""
        # Nothing was written since it was read, so it still holds.
        if self._file.exists():
            return
        unfinished = Path(f"{self._file}.new")
        # On a full disk there is no number, as after a kill.
        with suppress(OSError):
            unfinished.write_text(str(found + self.missing), encoding="ascii")
            unfinished.replace(self._file)
