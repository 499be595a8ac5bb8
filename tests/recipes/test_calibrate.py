"""The cosine of support: right pages against the other pages of the same file."""

import json

import numpy as np
import pymupdf
import pytest
from fakes import FakeEmbedder

from mmrag.errors import ContentError
from mmrag.evaluation.questions import Question
from mmrag_recipes import calibrate
from mmrag_recipes.config import CalibrateConfig

PASSAGES = {
    ("a.pdf", 1): ["the turbine hall opens at nine in the morning", "tickets cost five euros"],
    ("a.pdf", 2): ["the turbine hall closes at ten in the evening"],
    ("a.pdf", 3): [],
    ("a.pdf", 4): ["something else altogether"],
    ("b.pdf", 1): ["the turbine hall opens at nine in the morning"],
}


def question(answer, *pages):
    return Question("When?", pages, answer=answer)


def test_claims_meet_their_pages_and_the_other_pages_of_the_file():
    embedder = FakeEmbedder()
    claim = "The turbine hall opens at nine."
    asked = [
        question(claim, ("a.pdf", 1)),
        question(claim, ("b.pdf", 1)),
        question("", ("a.pdf", 1)),
    ]
    right, wrong = calibrate.support(embedder, asked, PASSAGES)
    cosines = embedder.encode([claim]) @ embedder.encode(PASSAGES["a.pdf", 1]).T
    others = PASSAGES["a.pdf", 2] + PASSAGES["a.pdf", 4]
    # b.pdf has no other page that could be cited in error.
    np.testing.assert_allclose(right, [cosines.max()], rtol=1e-5)
    expected = embedder.encode([claim]) @ embedder.encode(others).T
    np.testing.assert_allclose(wrong, expected[0], atol=1e-6)


def test_answers_without_pages_are_refused():
    with pytest.raises(ContentError, match="no answer"):
        calibrate.support(FakeEmbedder(), [question("A claim.", ("a.pdf", 3))], PASSAGES)


@pytest.mark.parametrize(("share", "least"), [(0.5, 0.31), (0.25, 0.51), (0.01, 0.91)])
def test_the_least_cosine_that_lets_few_wrong_citations_pass(share, least):
    wrong = np.array([0.105, 0.305, 0.505, 0.905], dtype=np.float32)
    assert calibrate.least_cosine(wrong, share) == pytest.approx(least)


def test_the_command_prints_what_goes_into_the_checkpoint(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(calibrate, "load_embedder", lambda name: FakeEmbedder())
    (tmp_path / "pdfs").mkdir()
    pdf = pymupdf.open()
    for line in ("The hall opens at nine.", "The hall closes at five."):
        pdf.new_page().insert_text((72, 72), line)
    pdf.save(tmp_path / "pdfs" / "a.pdf")
    pages = [{"file": "a.pdf", "page": 1}]
    row = {"question": "When?", "answer": "The hall opens at nine.", "pages": pages}
    (tmp_path / "questions.jsonl").write_text(json.dumps(row))
    calibrate.run(CalibrateConfig(questions=tmp_path / "questions.jsonl", pdfs=tmp_path / "pdfs"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "1 claims, 1 wrong citations"
    assert 0 < json.loads(lines[-1])["support_cosine"] < 1
