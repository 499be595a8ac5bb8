"""Page retrieval over a folder: right pages are counted right, per view and fused."""

import json
from pathlib import Path

import pymupdf
import pytest
from fakes import FakeEmbedder

from mmrag.errors import ContentError
from mmrag_recipes.evaluate_pages import evaluate_pages, read_questions

REPORTS = Path(__file__).parents[2] / "docs" / "benchmarks" / "reports.jsonl"


def test_pages_are_found_and_counted(tmp_path):
    pdf = pymupdf.open()
    for words in ("tigers live in forests", "whales swim in oceans", "camels cross deserts"):
        pdf.new_page().insert_text((72, 72), words)
    folder = tmp_path / "pdfs"
    folder.mkdir()
    pdf.save(folder / "animals.pdf")
    lines = [
        {"question": "whales oceans", "pages": [{"file": "animals.pdf", "page": 2}], "kind": "sea"},
        {"question": "camels", "pages": [{"file": "animals.pdf", "page": 1}], "kind": "land"},
    ]
    questions = tmp_path / "questions.jsonl"
    questions.write_text("\n".join(json.dumps(line) for line in lines))
    found = evaluate_pages(FakeEmbedder(), folder, questions, tmp_path / "library")
    assert found["bm25"]["n"] == 2
    assert found["bm25, sea"]["hit@1"] == 1.0
    assert found["bm25, land"]["hit@1"] == 0.0
    assert found["fusion, sea"]["hit@5"] == 1.0
    assert {"text", "image", "bm25", "fusion"} <= set(found)


def test_a_question_without_pages_is_named(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text('{"question": "a", "pages": [{"file": "x", "page": 1}]}\n{"question": "b"}\n')
    with pytest.raises(ContentError, match=r"q\.jsonl:2"):
        read_questions(path)


def test_rows_that_name_their_page_are_questions(tmp_path):
    path = tmp_path / "dev.jsonl"
    rows = [{"id": "r", "query": {"text": "whales"}, "positives": [{"text": "oceans"}]}]
    path.write_text(json.dumps({**rows[0], "source": "sea life.pdf#2 (in oceans)"}) + "\n")
    (read,) = read_questions(path)
    assert (read.text, read.pages) == ("whales", (("sea life.pdf", 2),))
    path.write_text(json.dumps({**rows[0], "source": "a data set"}) + "\n")
    with pytest.raises(ContentError, match=r"dev\.jsonl:1"):
        read_questions(path)


def test_the_questions_on_the_reports_are_well_formed():
    rows = read_questions(REPORTS)
    assert len({row.text for row in rows}) == len(rows) >= 60
    assert {row.kind for row in rows} == {"narrative", "pilot", "flight"}
    assert len({file for row in rows for file, _ in row.pages}) == 20
    assert all(row.answer and row.text.endswith("?") for row in rows)


def test_the_pages_of_the_questions_exist(shared_data):
    for row in read_questions(REPORTS):
        for file, page in row.pages:
            with pymupdf.open(shared_data / "reports" / file) as pdf:
                assert 1 <= page <= len(pdf)


def test_rows_that_ask_with_an_image_are_left_out_and_counted(tmp_path, caplog):
    """``dev.jsonl`` of all nine pairs goes with ``--pdfs``."""
    path = tmp_path / "dev.jsonl"
    row = {"id": "r", "positives": [{"text": "oceans"}], "source": "sea.pdf#2"}
    pictured = json.dumps({**row, "query": {"text": "this whale", "image": "abc"}})
    path.write_text(pictured + "\n\n" + json.dumps({**row, "query": {"text": "whales"}}) + "\n")
    assert [question.text for question in read_questions(path)] == ["whales"]
    assert "1 rows ask with an image" in caplog.text
    path.write_text(pictured)
    with pytest.raises(ContentError, match="no question in words"):
        read_questions(path)


def test_a_line_that_is_no_json_is_named(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text('{"question": "a", "pages": [{"file": "x", "page": 1}]}\n{"question": "b"\n')
    with pytest.raises(ContentError, match=r"q\.jsonl:2"):
        read_questions(path)
