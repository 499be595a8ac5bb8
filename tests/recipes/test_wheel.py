"""Whoever installed with pip can run the recipes: from a wheel, in a fresh environment."""

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_recipe_runs_from_the_wheel(tmp_path):
    def run(*command):
        # Nothing of this checkout may be found.
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run(command, cwd=tmp_path, env=kept, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=REPOSITORY, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    venv.create(tmp_path / "fresh", with_pip=True)
    python = str(tmp_path / "fresh" / "bin" / "python")
    run(python, "-m", "pip", "install", "--no-deps", "--quiet", str(wheel))
    # What mmrag depends on is taken from here; its own packages are those of the wheel, for a
    # path in a .pth file does not bring the editable installations of that folder.
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    fresh = Path(run(python, "-c", code).strip())
    (fresh / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
    where = run(python, "-c", "import mmrag, mmrag_recipes as r; print(mmrag.__path__, r.__path__)")
    assert where.count(str(fresh)) == 2

    (tmp_path / "notes").mkdir()
    for bird, nest in (("kingfisher", "sandy banks of a river"), ("stork", "the roof of a barn")):
        (tmp_path / "notes" / f"{bird}.txt").write_text(
            f"The {bird} nests on or in {nest}, which both parents prepare in early spring. "
            f"A young {bird} leaves the nest after some weeks and learns to fish by itself. " * 3
        )
    shown = run(python, "-m", "mmrag_recipes", "train", "--help")
    assert "adapt" in shown
    shown = run(python, "-m", "mmrag_recipes", "synthesize", "notes", "--out", "data")
    assert "rows kept" in shown
    assert (tmp_path / "data" / "rows.jsonl").read_text()
    overrides = ["--data", "data/rows.jsonl", "--out", "run", "--steps", "2", "--batch-size", "2"]
    shown = run(python, "-m", "mmrag_recipes", "train", "--config", "adapt", *overrides)
    assert (tmp_path / "run" / "final" / "trained.safetensors").is_file()
