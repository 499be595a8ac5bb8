"""Many small files: time and memory of the first and of the second run of ``mmrag index``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

N_FILES = 20_000
_WORDS = ("well", "harbour", "boiler", "ferry", "garden", "plan", "member", "invoice", "valley")


def run(folder: Path) -> None:
    """Seconds and memory to index 20,000 text files, to index them again, and to search them."""
    for number in range(N_FILES):
        path = folder / "texts" / f"{number // 1000:02}" / f"{number:05}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        words = " ".join(_WORDS[(number // 9**place) % 9] for place in range(5))
        path.write_text(f"Note {number}: {words}.\n")
    library = ["-c", str(folder / "library")]
    print("| command | s | CPU s | MiB |")
    print("|---" * 4 + "|")
    for name, command in {
        "first `mmrag index`": ["index", str(folder / "texts")],
        "second `mmrag index`": ["index", str(folder / "texts")],
        "`mmrag list`": ["list"],
        "`mmrag search`": ["search", "ferry bridge"],
        "`mmrag doctor`": ["doctor"],
    }.items():
        print(f"| {name} | {measured([*command, *library])} |", flush=True)


_CHILD = """
import resource, sys, time
started = time.perf_counter()
from mmrag.cli.app import main
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
used = resource.getrusage(resource.RUSAGE_SELF)
row = (time.perf_counter() - started, used.ru_utime + used.ru_stime, used.ru_maxrss // 1024)
print("\\n%.1f | %.1f | %d" % row, file=sys.stderr)
"""


def measured(arguments: list[str]) -> str:
    """One command of mmrag in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done.stderr.strip().splitlines()[-1]
