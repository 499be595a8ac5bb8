"""Answers and abstentions are counted right."""

import json

import pymupdf
import pytest
from fakes import FakeEmbedder

from mmrag.errors import ContentError
from mmrag.evaluation.questions import Question
from mmrag.index import UniversalIndex
from mmrag_recipes.evaluate_answers import evaluate_answers, read_foreign


def test_answers_and_abstentions_are_counted(tmp_path):
    pdf = pymupdf.open()
    for words in (
        "The tigers of the northern forests hunt deer at night.",
        "Blue whales swim through all oceans and eat krill.",
    ):
        pdf.new_page().insert_text((72, 72), words)
    folder = tmp_path / "pdfs"
    folder.mkdir()
    pdf.save(folder / "animals.pdf")
    own = [
        Question("What do blue whales eat?", (("animals.pdf", 2),)),
        Question("When do tigers hunt deer?", (("animals.pdf", 2),)),
        Question("Who painted the ceiling?", (("animals.pdf", 1),)),
    ]
    foreign = ["How tall is the lighthouse of Genoa?", "What do whales eat in oceans?"]
    with UniversalIndex(tmp_path / "library", FakeEmbedder()) as index:
        index.add(folder)
        near = ["Do tigers of the northern forests hunt wild boar?"]
        counts = evaluate_answers(index.as_query_engine(), own, foreign, near)
    assert counts == {
        **{"own": 3, "answered": 2, "certain": 2, "right_page": 1},
        **{"foreign": 2, "foreign_answered": 1, "foreign_certain": 1},
        **{"near": 1, "near_answered": 1, "near_certain": 0},
    }


def test_foreign_questions_are_drawn_by_seed(tmp_path):
    path = tmp_path / "other.jsonl"
    lines = [{"question": f"q{n}"} for n in range(9)] + [{"questions": ["a", {"question": "b"}]}]
    path.write_text("\n".join(json.dumps(line) for line in lines))
    drawn = read_foreign(path, 5, seed=1)
    assert drawn == read_foreign(path, 5, seed=1)
    assert drawn != read_foreign(path, 5, seed=2)
    assert len(read_foreign(path, 100, seed=0)) == 11
    path.write_text('{"text": "no question"}')
    with pytest.raises(ContentError, match=r"other\.jsonl:1"):
        read_foreign(path, 1, seed=0)
