"""The cosine of support: right pages against the other pages of the same file."""

import json
import shutil

import numpy as np
import pymupdf
import pytest
from fakes import FakeEmbedder

from mmrag import UniversalIndex
from mmrag.embedders import Calibration, load_embedder
from mmrag.errors import ConfigError, ContentError
from mmrag.evaluation.questions import Question
from mmrag.retrieval.fusion import DEFAULT_WEIGHTS
from mmrag_recipes import calibrate
from mmrag_recipes.config import CalibrateConfig
from mmrag_recipes.evaluate_pages import read_questions

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


WORDS = [
    "turbine",
    "harbour",
    "pension",
    "library",
    "kitchen",
    "orchard",
    "quartz",
    "violin",
    "saddle",
    "lantern",
]


@pytest.fixture
def sample(tmp_path):
    """Questions that words alone answer, about two files of five pages."""
    (tmp_path / "pdfs").mkdir()
    rows = []
    for file, words in (("a.pdf", WORDS[:5]), ("b.pdf", WORDS[5:])):
        pdf = pymupdf.open()
        for number, word in enumerate(words, 1):
            line = f"The {word} opens at {6 + number}."
            pdf.new_page().insert_text((72, 72), line)
            pages = [{"file": file, "page": number}]
            rows.append({"question": f"When does the {word} open?", "answer": line, "pages": pages})
        pdf.save(tmp_path / "pdfs" / file)
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return CalibrateConfig(questions=tmp_path / "questions.jsonl", pdfs=tmp_path / "pdfs")


def test_a_zero_is_the_mean_cosine_to_pages_of_other_files(sample):
    embedder = FakeEmbedder()
    questions = read_questions(sample.questions)
    zeros, _ = calibrate.fusion_settings(embedder, questions, sample.pdfs)
    lines = [question.answer for question in questions]
    asked = embedder.encode([question.text for question in questions], "page_for_question")
    cosines = asked @ embedder.encode(lines).T
    expected = np.concatenate([cosines[:5, 5:], cosines[5:, :5]]).mean()
    assert zeros["text"] == pytest.approx(expected, abs=0.006)
    assert set(zeros) == {"image", "text"}


def test_settings_of_a_checkpoint_are_measured_saved_and_used(
    sample, qwen2_vl_folder, tmp_path, capsys
):
    """The whole loop for a model of random weights, whose vectors say nothing."""
    folder = shutil.copytree(qwen2_vl_folder, tmp_path / "tiny")
    # Of a mistaken calibration there is something to gain.
    wrong = {"family": "gme", "calibration": {"fusion_weights": {"bm25": 0.1, "image": 3}}}
    (folder / "mmrag.json").write_text(json.dumps(wrong))
    before = load_embedder(folder, device="cpu")
    calibrate.run(sample.model_copy(update={"model": str(folder), "write": True}))
    lines = capsys.readouterr().out.splitlines()
    measured = json.loads(lines[-2])
    assert lines[-1] == f"written to {folder / 'mmrag.json'}"
    assert set(measured) == {"zero_cosine", "fusion_weights", "support_cosine"}
    embedder = load_embedder(folder, device="cpu")
    # No other model: a collection that was built before is still its own.
    assert embedder.fingerprint == before.fingerprint
    assert embedder.calibration == Calibration(**measured)
    with UniversalIndex(tmp_path / "library", embedder) as index:
        index.add(sample.pdfs)
        retriever = index.as_retriever()
        assert retriever.weights == {**DEFAULT_WEIGHTS, **measured["fusion_weights"]}
        assert retriever.zeros == {"bm25": 0, "reference": 0, **measured["zero_cosine"]}
        # Words answer these questions, and random vectors do not.
        assert retriever.weights["bm25"] > retriever.weights["image"]
        assert retriever.search("the violin")[0].node.metadata["page"] == 3


def test_only_a_folder_can_be_written_to(tmp_path):
    with pytest.raises(ConfigError, match="folder of a checkpoint"):
        calibrate.write("mmrag-nano", {})
