"""The benchmark of the docs runs on any collection in a folder."""

import importlib.util
import json
from pathlib import Path

import pymupdf
from fakes import FakeEmbedder

from mmrag.index import UniversalIndex

SCRIPT = Path(__file__).parents[2] / "docs" / "benchmarks" / "retrieval.py"


def test_it_prints_every_ranking_beside_those_of_version_0_1(tmp_path, monkeypatch, capsys):
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
    module.main([str(questions), "-c", str(tmp_path / "c")])
    shown = capsys.readouterr().out
    for name in ("text", "bm25", "BM25 of 0.1", "fusion", "fusion by ranks", "fusion of 0.1"):
        assert f"| {name} | 1.000 [1.000, 1.000]" in shown
    assert "| fusion less fusion of 0.1 | 0.000" in shown
    assert "inside the document, 2 questions, 2 documents" in shown
