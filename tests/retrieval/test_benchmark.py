"""The script of the docs writes what version 0.1 found as runs."""

import importlib.util
import json
from pathlib import Path

import pymupdf
from fakes import FakeEmbedder

from mmrag.evaluation.trec import read_run
from mmrag.index import UniversalIndex

SCRIPT = Path(__file__).parents[2] / "docs" / "benchmarks" / "retrieval.py"


def test_the_rankings_of_version_0_1_are_written_as_runs(tmp_path, monkeypatch):
    embedder = FakeEmbedder()
    monkeypatch.setattr("mmrag.embedders.load_embedder", lambda name, **_: embedder)
    files = tmp_path / "files"
    files.mkdir()
    rows = []
    for name in ("boilers", "dentists"):
        document = pymupdf.open()
        document.new_page().insert_text((72, 72), f"All {name} of the town cost 1,577 euros.")
        document.save(files / f"{name}.pdf")
        place = {"file": f"{name}.pdf", "page": 1}
        rows.append({"question": f"What do {name} cost?", "pages": [place], "kind": "text"})
    with UniversalIndex(tmp_path / "c", embedder) as index:
        index.add(files)
    questions = tmp_path / "questions.jsonl"
    questions.write_text("\n".join(json.dumps(row) for row in rows))
    spec = importlib.util.spec_from_file_location("benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main([str(questions), "-c", str(tmp_path / "c"), "--out", str(tmp_path / "runs")])
    for name in ("bm25", "fusion"):
        tag, run = read_run(tmp_path / "runs" / f"{name}.run")
        assert tag == f"{name}-of-0.1"
        assert run["q1"][0][0] == ("boilers.pdf", 1)
        assert run["q2"][0][0] == ("dentists.pdf", 1)
