"""The benchmark of a card runs offline, within its time, on a machine with models alone."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "docs/benchmarks"
# As on a machine that has torch and transformers, and none of these.
RUN = """
import runpy, sys
for name in ("llama_index", "qdrant_client", "qdrant_edge", "pymupdf", "typer", "openai"):
    sys.modules[name] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_gpu(out: Path, seconds: float) -> tuple[dict, str]:
    paths = map(str, (BENCHMARKS, ROOT, ROOT / "recipes"))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", RUN, str(BENCHMARKS / "gpu.py")]
    command += ["--seconds", str(seconds), "--out", str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads((out / "gpu.json").read_text()), done.stdout


@pytest.mark.slow
def test_every_line_is_measured_and_the_vectors_are_those_of_the_baselines(tmp_path):
    found, printed = run_gpu(tmp_path, 300)
    values = {line["what"]: line["value"] for line in found["lines"]}
    missing = {line["what"]: line["note"] for line in found["lines"] if not line["value"]}
    assert not missing
    assert len(values) == 36
    assert "Least cosine to the plain loop's vectors: 1.0000" in printed
    assert "Least cosine to sentence-transformers' vectors: 1.0000" in printed
    assert re.search(r"UniversalIndex.add \| skipped: \S+ is not installed", printed)
    assert sum(found["profile"]["plain"]["groups"].values()) == pytest.approx(1)
    assert (tmp_path / "gpu.png").stat().st_size > 1000


def test_what_does_not_fit_into_the_time_is_skipped_and_said(tmp_path):
    found, printed = run_gpu(tmp_path, 2.5)
    assert found["lines"]
    assert "training: skipped: needs about" in printed


def test_the_table_in_the_documentation_is_that_of_the_saved_run(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    from gpu_table import Line

    found = json.loads((BENCHMARKS / "h200.json").read_text())
    page = (ROOT / "docs/benchmarks.md").read_text()
    shown = [
        line for line in page.splitlines() if line in {str(Line(**one)) for one in found["lines"]}
    ]
    assert shown == [str(Line(**line)) for line in found["lines"]]
    for group in found["profile"]["plain"]["groups"]:
        shares = [found["profile"][kind]["groups"][group] for kind in ("plain", "compiled")]
        assert f"| {group} | {shares[0]:.3f} | {shares[1]:.3f} |" in page
