"""The results page holds the numbers of the saved means, and no question."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from mmrag.evaluation.run import evaluate

DOCS = Path(__file__).parents[2] / "docs"
KEPT = sorted((DOCS / "results").glob("*.json"))


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("results", DOCS / "benchmarks" / "results.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_that_of_the_saved_means(script):
    found = {
        name: json.loads((DOCS / "results" / f"{name}.json").read_text()) for name in script.SETS
    }
    assert (DOCS / "results.md").read_text() == script.page(found)


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.stem)
def test_every_number_of_the_json_is_on_the_page(path):
    """Read without the code that writes the page."""
    page = (DOCS / "results.md").read_text()
    kept = json.loads(path.read_text())
    assert kept["command"] in page
    for system in kept["systems"]:
        name = system["ranking"]
        name = name if name == "bm25" else f"{system['model']}, {name}"
        first, *_, last = (f"{system['metrics'][m][0]:.3f}" for m in ("hit@1", "hit@5", "ndcg@10"))
        assert re.search(rf"^\| {re.escape(name)} \| {first} \|.*\| {last} \[", page, re.MULTILINE)


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.stem)
def test_no_question_and_no_document_is_kept(path):
    kept = json.loads(path.read_text())
    assert not {"questions", "found", "records"} & set(kept)
    assert "?" not in path.read_text()
    assert ".pdf" not in path.read_text().replace(kept["command"], "")


def test_means_are_those_of_an_evaluation(script, library, questions):
    found = evaluate(library, questions)
    kept = script.summary(found)
    assert [row["ranking"] for row in kept["systems"]][:2] == ["text", "bm25"]
    bm25 = next(row for row in kept["systems"] if row["ranking"] == "bm25")
    assert bm25["metrics"]["hit@1"] == [1.0, 1.0, 1.0]
    first_half = kept["kinds"]["first half"]
    assert (first_half["n"], first_half["means"][1]) == (12, 1.0)
    assert "report a" not in json.dumps(kept)
