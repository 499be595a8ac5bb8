"""The report is one file that is right, safe and complete."""

import base64
import io
import re

import numpy as np
import pymupdf
import pytest
from fakes import FakeEmbedder
from PIL import Image

from mmrag.evaluation.evidence import show_page
from mmrag.evaluation.questions import Question
from mmrag.evaluation.report import write_report
from mmrag.evaluation.results import Evaluation, System
from mmrag.evaluation.run import evaluate
from mmrag.index import UniversalIndex


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    for name in ("boilers", "dentists"):
        pdf = pymupdf.open()
        for page in (1, 2, 3):
            text = f"All {name} of the town cost {page},577 euros.\n\nNothing else is said."
            pdf.new_page().insert_text((72, 72), text)
        pdf.save(folder / f"{name}.pdf")
    with UniversalIndex(folder / "library", FakeEmbedder()) as library:
        library.add([folder / "boilers.pdf", folder / "dentists.pdf"])
        yield library


ASKED = [
    Question("What do boilers cost in town? 2,577", (("boilers.pdf", 2),), kind="price"),
    Question("What do dentists cost in town? 3,577", (("dentists.pdf", 3),), kind="price"),
    Question("Nothing of the <b>kind</b>?", (("boilers.pdf", 1),), kind="none", answer="No <i>"),
]


@pytest.fixture(scope="module")
def html(index, tmp_path_factory):
    path = tmp_path_factory.mktemp("html") / "report.html"
    found = evaluate(index, ASKED, engines={"quotes": index.as_query_engine()})
    write_report(found, path, {"fake": index}, title="A & B")
    return path.read_text()


def test_it_loads_nothing_and_runs_nothing(html):
    assert "<script" not in html
    assert not re.search(r"(?:src|href)=\"(?!data:image/webp;base64,)", html)
    assert not re.search(r"url\(|@import", html)


def test_what_comes_from_documents_and_questions_is_text(html):
    assert "Nothing of the &lt;b&gt;kind&lt;/b&gt;?" in html
    assert "<b>kind" not in html
    assert "No &lt;i&gt;" in html
    assert "A &amp; B" in html


def test_numbers_are_those_of_the_evaluation(index, html):
    found = evaluate(index, ASKED)
    for system in found.found:
        assert f">{found.scores(system)['ndcg@10'].mean:.3f}</td>" in html
    assert "3 questions about 2 documents" in html
    assert "By kind of question" in html
    assert "By document" in html


def test_the_worst_questions_come_first_with_their_pages(index, tmp_path):
    questions = [
        Question(f"boilers cost {n},577", (("boilers.pdf", n),), id=f"q{n}") for n in (1, 2)
    ]
    found = evaluate(index, questions)
    main = found.main_system
    found.found[main]["q2"] = {}
    found.rankings[main]["q2"] = [(("dentists.pdf", 1), 1.0), (("boilers.pdf", 3), 0.5)]
    for system in found.systems():
        found.found[system]["q1"] = {("boilers.pdf", 1): 1}
    write_report(found, tmp_path / "r.html", {"fake": index})
    html = (tmp_path / "r.html").read_text()
    worst = html[html.index("The worst questions") :]
    assert worst.count("<article") == 1  # q1 is right
    assert "boilers cost 2,577" in worst
    assert worst.count("data:image/webp") == 3
    assert "another document</span>" in worst
    assert "another page of the document</span>" in worst
    assert "fusion not found" in worst


def test_evidence_is_marked_on_the_page(index):
    shown = show_page(index.collection, ("boilers.pdf", 2), "cost 2,577 euros")
    assert shown.marked
    assert "2,577" in shown.quote
    data = base64.b64decode(shown.src.partition(",")[2])
    red, green, blue = np.moveaxis(np.asarray(Image.open(io.BytesIO(data)).convert("RGB")), 2, 0)
    assert ((red > 200) & (green > 170) & (blue < 90)).sum() > 100
    plain = show_page(index.collection, ("boilers.pdf", 2), "zebra crossing")
    assert (plain.marked, plain.quote) == (False, "")
    assert show_page(index.collection, ("absent.pdf", 1), "x").src is None


def test_a_loaded_evaluation_has_a_report_without_images(index, tmp_path):
    found = evaluate(index, ASKED, cuts=(1,))
    found.save(tmp_path / "f.json")
    write_report(Evaluation.load(tmp_path / "f.json"), tmp_path / "r.html")
    html = (tmp_path / "r.html").read_text()
    assert "data:image" not in html
    assert "No image of this page is kept." in html or "<article" not in html


def test_answers_alone_and_nothing_at_all_have_a_report(index, tmp_path):
    asked = [Question("How tall is the lighthouse of Genoa?", answerable=False)]
    found = evaluate({}, asked, engines={"quotes": index.as_query_engine()})
    write_report(found, tmp_path / "r.html")
    assert "abstained, of those without an answer" in (tmp_path / "r.html").read_text()
    write_report(Evaluation([]), tmp_path / "r.html")
    assert Evaluation([], {System("m", "text"): {}}).main_system == System("m", "text")
