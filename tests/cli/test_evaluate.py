"""``mmrag eval`` over real files in a folder."""

import json
import re

import pymupdf
import pytest
from chat_server import ChatServer
from fakes import FakeEmbedder
from typer.testing import CliRunner

import mmrag.embedders
from mmrag.cli.app import app
from mmrag.evaluation.answers import AnswerRecord
from mmrag.evaluation.questions import Question
from mmrag.evaluation.results import Evaluation, System

ANIMALS = ("tigers live in forests", "whales swim in oceans", "camels cross deserts")


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    for name in ("MMRAG_LLM", "OPENAI_BASE_URL", "OPENAI_API_BASE", "MMRAG_COLLECTION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(
        mmrag.embedders, "load_embedder", lambda name, **_: FakeEmbedder(name=str(name))
    )


@pytest.fixture
def pdfs(tmp_path):
    folder = tmp_path / "pdfs"
    folder.mkdir()
    for file in ("zoo", "farm"):
        pdf = pymupdf.open()
        for words in ANIMALS:
            pdf.new_page().insert_text((72, 72), f"{words} of the {file}")
        pdf.save(folder / f"{file}.pdf")
    return folder


@pytest.fixture
def questions(tmp_path):
    rows = [
        {
            "question": f"{words} {file}",
            "pages": [{"file": f"{file}.pdf", "page": page}],
            "kind": file,
        }
        for file in ("zoo", "farm")
        for page, words in enumerate(ANIMALS, 1)
    ]
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def run(*args):
    return CliRunner().invoke(app, ["eval", *map(str, args)])


def test_a_folder_with_two_models_is_one_table(pdfs, questions, tmp_path):
    file = tmp_path / "found.json"
    html = tmp_path / "report.html"
    shown = run(
        *(questions, pdfs, "-e", "one", "-e", "two", "-k", 1, "-k", 3),
        *("--json", file, "--html", html),
    )
    assert shown.exit_code == 0, shown.output
    assert "6 questions about 2 documents" in shown.stdout
    assert "Inside the document" in shown.stdout
    assert "ndcg@3 by kind of question" in shown.stdout
    assert "ndcg@3 of one, fusion less that of" in shown.stdout
    found = Evaluation.load(file)
    assert {system.model for system in found.found} == {"one", "two"}
    assert found.cuts == (1, 3)
    report = html.read_text()
    assert f"Evaluation: {tmp_path.name}/questions.jsonl" in report
    assert "two" in report
    # The second time, neither files nor questions are embedded again.
    again = run(questions, pdfs, "-e", "one", "-e", "two", "-k", 1, "-k", 3, "--json", file)
    assert again.stdout == shown.stdout


def test_a_collection_is_asked_and_printed_as_json(pdfs, questions, tmp_path):
    CliRunner().invoke(app, ["index", str(pdfs), "-c", str(tmp_path / "c")])
    shown = run(questions, "-c", tmp_path / "c", "--json", "-")
    assert shown.exit_code == 0, shown.output
    (row,) = (
        row
        for row in json.loads(shown.stdout)["systems"]
        if (row["ranking"], row["scope"]) == ("bm25", "corpus")
    )
    assert row["metrics"]["hit@1"][0] == 1.0


def test_runs_of_others_stand_beside_and_alone(pdfs, questions, tmp_path):
    runs = tmp_path / "runs"
    assert run(questions, pdfs, "--save-runs", runs).exit_code == 0
    assert (runs / "mmrag-nano-bm25.run").is_file()
    shown = run(questions, "--run", runs / "mmrag-nano-bm25.run", "--qrels", runs / "qrels.txt")
    assert shown.exit_code == 0, shown.output
    assert "mmrag-nano-bm25" in shown.stdout
    assert "1.000" in shown.stdout


def test_wrong_use_is_explained(pdfs, questions, tmp_path):
    both = run(questions, pdfs, "-c", tmp_path / "c")
    assert both.exit_code == 2
    assert "not both" in both.stderr
    several = run(questions, "-c", tmp_path / "c", "-e", "a", "-e", "b")
    assert several.exit_code == 2
    assert "need a folder" in several.stderr
    idle = run(questions, pdfs, "--llm", "m")
    assert idle.exit_code == 2
    assert "--llm needs --answers" in idle.stderr


def test_the_model_that_answers_can_rerank(pdfs, questions):
    server = ChatServer('{"grade": 8}', models=[{"id": "vl"}])
    try:
        model = ("--llm", "vl", "--base-url", server.url, "--no-images")
        shown = run(questions, pdfs, "-k", 1, "--rerank", "llm", *model)
    finally:
        server.close()
    assert shown.exit_code == 0, shown.output
    assert "fusion, reranked by llm" in shown.stdout


def test_answers_are_measured_and_judged(pdfs, questions, tmp_path):
    rows = [json.loads(line) for line in questions.read_text().splitlines()]
    rows = [{**row, "answer": row["question"].split()[-2]} for row in rows]
    rows.append({"question": "How tall is the lighthouse of Genoa?", "answerable": False})
    questions.write_text("\n".join(json.dumps(row) for row in rows))
    # One reply for both questions that the judge is asked.
    reply = '{"grade": "correct", "reason": "yes", "support": "partial_support"}'
    server = ChatServer(reply, models=[{"id": "judge"}])
    try:
        judge = f"judge@{server.url}"
        shown = run(questions, pdfs, "--answers", "--judge", judge, "--json", tmp_path / "f.json")
    finally:
        server.close()
    assert shown.exit_code == 0, shown.output
    assert re.search(r"abstained, of those without an answer +1\.000 of 1", shown.stdout)
    assert re.search(
        r"support recall, of all sentences +0\.500 \[0\.500, 0\.500\] of 6", shown.stdout
    )
    assert "judged by judge" in shown.stdout
    found = Evaluation.load(tmp_path / "f.json")
    assert found.answer_scores("mmrag-nano, quotes")["judged"].n == 6
    refused = run(questions, pdfs, "--judge", "judge")
    assert refused.exit_code == 2
    assert "needs --answers" in refused.stderr


def test_two_results_are_compared(pdfs, questions, tmp_path):
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    assert run(questions, pdfs, "--json", one).exit_code == 0
    found = Evaluation.load(one)
    for system, ranks in found.found.items():
        found.found[system] = {id_: dict.fromkeys(pages, 7) for id_, pages in ranks.items()}
    found.save(two)
    shown = run("--compare", one, two)
    assert shown.exit_code == 0, shown.output
    assert re.search(r"bm25 +-1\.000\* +-1\.000\* +\+0\.000 ", shown.stdout)
    assert "All documents, 6 questions: after - before" in shown.stdout
    rows = json.loads(run("--compare", one, two, "--json", "-").stdout)
    (row,) = (
        row
        for row in rows
        if (row["name"], row["scope"], row["metric"]) == ("bm25", "corpus", "hit@1")
    )
    assert (row["before"], row["after"], row["is_real"]) == (1.0, 0.0, True)
    assert run("--compare", one, tmp_path / "none.json").exit_code == 2
    other = run("--compare", one, questions)
    assert "give a file that mmrag eval --json wrote" in other.stderr
    assert "file of questions" in run().stderr


def test_several_models_and_engines_are_compared_each_on_its_own(tmp_path):
    asked = [Question("?", ((f"{n}.pdf", 1),), id=f"q{n}") for n in range(4)]

    def saved(name, ranks, found):
        systems = {
            System(model, "text"): {q.id: {q.pages[0]: rank} for q in asked}
            for model, rank in zip(("first", "second"), ranks, strict=True)
        }
        answers = {
            engine: {q.id: AnswerRecord("x", found=each, cited=q.pages) for q in asked}
            for engine, each in zip(("one", "two"), found, strict=True)
        }
        Evaluation(asked, systems, answers).save(tmp_path / name)
        return tmp_path / name

    before = saved("a.json", (1, 2), (True, False))
    shown = run("--compare", before, saved("b.json", (2, 1), (True, True)))
    assert shown.exit_code == 0, shown.output
    assert re.search(r"first +text +-1\.000\*", shown.stdout)
    assert re.search(r"second +text +\+1\.000\*", shown.stdout)
    first, second = shown.stdout.split("Answers of ")[1:]
    assert re.match(r"one: after - before\n.*\nanswered\S* .* \+0\.000 ", first)
    assert re.match(r"two: after - before\n.*\nanswered\S* .* \+1\.000\*", second)
