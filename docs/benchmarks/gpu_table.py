"""The table of a benchmark: lines within a limit of time, printed as they come, then saved."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from mmrag.modeling.batching import default_workers

T = TypeVar("T")
LIBRARIES = ("mmrag", "torch", "transformers", "sentence-transformers", "peft", "pillow")


@dataclass
class Line:
    """One row: a value, its share of the matrix rate, its ratio to another line, or why not."""

    what: str
    unit: str
    value: float | None = None
    share: float | None = None
    ratio: float | None = None
    against: str = ""
    note: str = ""

    def __str__(self) -> str:
        value = "" if self.value is None else f"{self.value:.3g} {self.unit}"
        share = "" if self.share is None else f"{self.share:.2f}"
        ratio = "" if self.ratio is None else f"{self.ratio:.2f} of {self.against}"
        return f"| {self.what} | {value or self.note} | {share} | {ratio} |"


class Table:
    """Lines that are measured one after the other while there is time.

    Args:
        seconds: for all of them; a line that would take longer than what is left is skipped.
    """

    def __init__(self, seconds: float) -> None:
        self.lines: list[Line] = []
        self.matrix_rate = 0.0  # floating point operations per second
        self._seconds = seconds
        self._started = time.monotonic()

    @property
    def elapsed(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self._started

    def head(self, title: str) -> None:
        """Begin a part of the table."""
        print(f"\n**{title}** (after {self.elapsed:.0f} s)\n")
        print("| what | value | of the matrix rate | ratio |\n|---|---|---|---|", flush=True)

    def line(
        self,
        what: str,
        unit: str,
        needs: float,
        measure: Callable[[], float],
        *,
        flops: float = 0.0,
        against: str = "",
    ) -> None:
        """Measure and print one line.

        Args:
            needs: seconds that it takes, roughly.
            flops: operations of one item, for the share of the matrix rate.
            against: the line it is compared with.
        """
        line = Line(what, unit)
        line.value, line.note = self.attempt(needs, measure)
        if line.value is not None and flops and self.matrix_rate:
            line.share = line.value * flops / self.matrix_rate
        base = next((each.value for each in self.lines if each.what == against), None)
        if line.value is not None and base:
            line.ratio, line.against = line.value / base, against
        self.lines.append(line)
        print(line, flush=True)

    def attempt(self, needs: float, work: Callable[[], T]) -> tuple[T | None, str]:
        """What ``work`` gives, or why there is nothing: a broken line stops no other."""
        left = self._seconds - self.elapsed
        if needs > left:
            return None, f"skipped: needs about {needs:.0f} s, and {max(0, left):.0f} s are left"
        try:
            return work(), ""
        except Exception as error:  # noqa: BLE001 - the rest of the table is still wanted
            first = str(error).strip().partition("\n")[0]
            return None, f"failed: {type(error).__name__}: {first[:200]}"

    def save(self, folder: Path, **more: Any) -> None:
        """Write ``gpu.json`` and ``gpu.png``."""
        folder.mkdir(parents=True, exist_ok=True)
        content = {
            "machine": machine(),
            "versions": versions(),
            "seconds": self.elapsed,
            "matrix_tflops": self.matrix_rate / 1e12,
            "lines": [asdict(line) for line in self.lines],
            **more,
        }
        (folder / "gpu.json").write_text(json.dumps(content, indent=1))
        plot(self.lines, f"{machine()}, {time.strftime('%Y-%m-%d')}", folder / "gpu.png")
        print(f"\n{self.elapsed:.0f} s in all; saved {folder}/gpu.json and {folder}/gpu.png")


def machine() -> str:
    """What the numbers belong to."""
    cores = f"{default_workers(None)} usable cores"
    if not torch.cuda.is_available():
        return f"no CUDA, {cores}, {platform.machine()}"
    card = torch.cuda.get_device_properties(0)
    return f"{card.name}, {card.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}, {cores}"


def versions() -> dict[str, str]:
    """Of Python and the libraries, as far as they are installed."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def plot(lines: Sequence[Line], title: str, path: Path) -> None:
    """Bars of the values, each beside its unit; those of one unit share a scale."""
    shown = [line for line in lines if line.value is not None]
    height, left, width = 22, 460, 520
    image = Image.new("RGB", (left + width + 140, height * (len(shown) + 2)), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    draw.text((8, 4), title, "black", font)
    for row, line in enumerate(shown, 1):
        most = max(float(each.value or 0) for each in shown if each.unit == line.unit)
        value, top = float(line.value or 0), row * height + 6
        end = left + width * value / most if most else left
        draw.rectangle((left, top + 2, end, top + height - 6), "steelblue")
        draw.text((8, top), line.what, "black", font)
        draw.text((end + 6, top), f"{value:.3g} {line.unit}", "black", font)
    image.save(path)


def synchronize() -> None:
    """Wait for the card, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(work: Callable[[], object]) -> float:
    """Seconds of one call, with all that it left the card to do."""
    synchronize()
    started = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - started


def median_ms(work: Callable[[T], object], items: Iterable[T], uncounted: int = 0) -> float:
    """Median milliseconds of ``work`` on an item, after some that are not counted."""
    seconds = []
    for item in items:
        started = time.perf_counter()
        work(item)
        seconds.append(time.perf_counter() - started)
    return float(np.median(seconds[uncounted:]) * 1e3)


def rate(
    run: Callable[[Sequence[T]], object], items: Sequence[T], seconds: float, least: int
) -> float:
    """Items per second, over as many as fit into ``seconds``.

    Two runs over ``least`` of them come before: one that is not counted, and one for the pace.
    """
    run(items[:least])
    pace = timed(lambda: run(items[:least])) / least
    count = min(len(items), max(least, int(seconds / pace)))
    return count / timed(lambda: run(items[:count]))
