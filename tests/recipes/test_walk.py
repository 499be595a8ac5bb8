"""The walk of docs/adapt.md: its commands as they are written, over a tiny corpus."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PAGE = (REPOSITORY / "docs" / "adapt.md").read_text(encoding="utf-8")
# What a corpus of ten pages has rows for.
SMALLER = {"train": ["--steps", "2", "--batch-size", "4"]}


@pytest.mark.slow
def test_the_commands_of_the_walk_run(tmp_path):
    script = REPOSITORY / "docs" / "samples" / "make_samples.py"
    subprocess.run([sys.executable, script, tmp_path / "reports"], check=True)
    (tmp_path / "reports" / "well-letter.pdf").unlink()  # a scan, which takes long to recognise
    questions = tmp_path / "docs" / "benchmarks" / "reports.jsonl"
    questions.parent.mkdir(parents=True)
    asked = json.loads((REPOSITORY / "docs" / "samples" / "questions.json").read_text())
    there = [each for each in asked if each["pages"][0]["file"] != "well-letter.pdf"]
    questions.write_text("\n".join(json.dumps(each) for each in there))

    walk = PAGE.split("## Before and after on")[1]
    block = re.findall(r"```bash\n(.*?)```", walk, re.DOTALL)[0]
    commands = block.replace("\\\n", " ").strip().splitlines()
    assert len(commands) == 7
    for command in commands:
        program, *words = shlex.split(command)
        module = ["-m", "mmrag"] if program == "mmrag" else []
        smaller = SMALLER.get(words[2], []) if program == "python" else []
        done = subprocess.run(
            [sys.executable, *module, *words, *smaller],
            cwd=tmp_path,
            env=os.environ | {"COLUMNS": "160"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{command}\n{done.stderr[-3000:]}"
    before, after = ((tmp_path / f"{name}.json").read_text() for name in ("before", "after-0"))
    assert json.loads(before) != json.loads(after)
    assert "fusion" in done.stdout  # of the comparison
