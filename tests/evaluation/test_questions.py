"""Questions from JSON lines."""

import json

import pytest

from mmrag.errors import ContentError
from mmrag.evaluation.kept import Kept
from mmrag.evaluation.questions import Question, as_page, numbered, page_id, read_questions


def test_questions_are_read_and_bad_lines_named(tmp_path):
    path = tmp_path / "q.jsonl"
    row = {"question": "where?", "pages": [{"file": "in/a.pdf", "page": 3}]}
    path.write_text(json.dumps(row) + "\n\n")
    (read,) = read_questions(path)
    assert (read.pages, read.document) == ((("a.pdf", 3),), "a.pdf")
    for bad in ("{", "[]", '{"question": "x"}', '{"question": "x", "pages": []}'):
        path.write_text(json.dumps(row) + "\n" + bad)
        with pytest.raises(ContentError, match=r"q.jsonl:2: .*page"):
            read_questions(path)
    path.write_text("\n")
    with pytest.raises(ContentError, match="no question"):
        read_questions(path)


def test_a_line_ends_where_json_lines_end(tmp_path):
    """A line separator of Unicode may stand in a JSON text, a byte order mark before it."""
    path = tmp_path / "q.jsonl"
    row = {"question": "how\u2028deep\x85is it?", "pages": [{"file": "a.pdf", "page": 3}]}
    line = json.dumps(row, ensure_ascii=False) + "\r\n"
    path.write_bytes((line + "\r\n" + line).encode("utf-8-sig"))
    assert [read.text for read in read_questions(path)] == [row["question"]] * 2
    path.write_bytes(line.encode("utf-8") + '{"question": "\u00e9"}'.encode("latin-1"))
    with pytest.raises(ContentError, match=r"q.jsonl:2: this is not JSON .*utf-8"):
        read_questions(path)


def test_values_are_kept_whatever_their_characters(tmp_path):
    Kept(tmp_path / "kept.jsonl")["a"] = "one\u2028two\x85three"
    assert Kept(tmp_path / "kept.jsonl").get("a") == "one\u2028two\x85three"


def test_everything_that_a_row_may_say(tmp_path):
    path = tmp_path / "q.jsonl"
    rows = [
        {
            "question": "how deep?",
            "answer": "9 m",
            "kind": "text",
            "pages": [],
            "answerable": False,
        },
        {"image": "photo.jpg", "pages": [{"file": "b.pdf", "page": 1}], "id": "photo"},
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    first, second = read_questions(path)
    assert (first.answer, first.kind, first.answerable, first.id) == ("9 m", "text", False, "q1")
    assert (second.image, second.text, second.id) == (tmp_path / "photo.jpg", "", "photo")
    assert second.query(top_k=3).image == tmp_path / "photo.jpg"


def test_ids_are_unique():
    with pytest.raises(ContentError, match="two questions have the id 'q2'"):
        numbered([Question("a", id="q2"), Question("b")])


def test_a_page_is_one_word_whatever_its_file_is_called():
    page = ("50% of #1, über all.pdf", 12)
    assert len(page_id(page).split()) == 1
    assert as_page(page_id(page)) == page
    with pytest.raises(ContentError, match=r"file\.pdf#7"):
        as_page("nothing")
