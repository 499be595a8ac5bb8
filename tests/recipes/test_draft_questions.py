"""Drafted questions: balanced, resumable, kept as a person corrected them, and not counted yet."""

import json
from collections import Counter

import pymupdf
import pytest
from chat_server import ChatServer

from mmrag.errors import ConfigError, ContentError, EndpointError
from mmrag.evaluation.questions import Nugget, read_questions
from mmrag_recipes.__main__ import main
from mmrag_recipes.config import QUESTION_KINDS, DraftQuestionsConfig
from mmrag_recipes.draft_questions import draft_questions, read_rows


@pytest.fixture(scope="module")
def papers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("papers")
    for name in ("boilers", "dentists"):
        pdf = pymupdf.open()
        for page in (1, 2, 3, 4):
            text = f"All {name} of the town cost {page},577 euros in year {page}."
            pdf.new_page().insert_text((72, 72), text)
        pdf.save(folder / f"{name}.pdf")
    return folder


class Scripted:
    """Answers by the kind that is asked for. failing: from this request on."""

    name = "scripted"

    def __init__(self, failing=10**9):
        self.asked, self.failing = [], failing

    def ask(self, prompt, images):
        self.asked.append(prompt)
        if len(self.asked) > self.failing:
            raise EndpointError("down")
        if prompt.startswith("What kind"):
            return json.dumps({"kind": "Manual" if "boilers" in prompt else "novel"}), 10, 1
        shown = prompt.rsplit("<<<", 1)[1]
        value = {"question": f"What of {shown[:12].strip()}?", "answer": "1,577 euros"}
        value["nuggets"] = [
            {"text": "It costs 1,577 euros."},
            {"text": "In year 1.", "vital": False},
        ]
        return f"Here: {json.dumps(value)}", 100, 10


def config(papers, out, **more):
    return DraftQuestionsConfig(paths=(papers,), out=out, concurrency=2, **more)


def test_kinds_and_files_come_up_equally_often(papers, tmp_path):
    counts = draft_questions(config(papers, tmp_path, rows=12), Scripted())
    assert counts == {"draft": 12}
    rows = read_rows(tmp_path / "questions.jsonl")
    assert Counter(row["kind"] for row in rows) == dict.fromkeys(QUESTION_KINDS, 2)
    assert Counter(row["document_kind"] for row in rows) == {"manual": 6, "other": 6}
    by_kind = {row["kind"]: row for row in rows}
    assert len(by_kind["comparison"]["pages"]) == 2
    assert len(by_kind["summary"]["pages"]) == 3
    assert "pages" not in by_kind["unanswerable"]
    assert by_kind["unanswerable"]["answerable"] is False


def test_a_draft_counts_once_it_is_accepted(papers, tmp_path):
    draft_questions(config(papers, tmp_path, rows=6), Scripted())
    path = tmp_path / "questions.jsonl"
    with pytest.raises(ContentError, match="accepted"):
        read_questions(path)
    rows = read_rows(path)
    rows[0] |= {"status": "accepted", "question": "Corrected?"}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (question,) = read_questions(path)
    assert (question.text, question.kind) == ("Corrected?", rows[0]["kind"])
    if question.answerable:
        facts = (Nugget("It costs 1,577 euros."), Nugget("In year 1.", vital=False))
        assert question.nuggets == facts
    # More rows are added; those that are there stay as they were corrected.
    counts = draft_questions(config(papers, tmp_path, rows=9), Scripted())
    assert counts == {"accepted": 1, "draft": 8}
    assert read_rows(path)[:6] == rows


def test_a_run_goes_on_where_the_server_failed(papers, tmp_path):
    with pytest.raises(EndpointError, match="go on"):
        draft_questions(config(papers, tmp_path, rows=24), Scripted(failing=6))
    written = read_rows(tmp_path / "questions.jsonl")
    assert 0 < len(written) < 6
    model = Scripted()
    draft_questions(config(papers, tmp_path, rows=24), model)
    rows = read_rows(tmp_path / "questions.jsonl")
    assert rows[: len(written)] == written
    assert len({row["id"] for row in rows}) == len(rows) == 24
    asked = [prompt for prompt in model.asked if not prompt.startswith("What kind")]
    assert len(asked) == 24 - len(written)


def test_the_review_shows_every_row(papers, tmp_path):
    draft_questions(config(papers, tmp_path, rows=6), Scripted())
    text = (tmp_path / "review.md").read_text()
    assert "6 draft." in text
    for row in read_rows(tmp_path / "questions.jsonl"):
        assert f"### {row['id']} (draft)\n\n**{row['question']}**" in text
    assert "- okay: In year 1." in text


def test_a_reply_without_facts_is_no_row(papers, tmp_path):
    model = Scripted()
    model.ask = lambda prompt, images: ('{"question": "What?", "nuggets": "none"}', 1, 1)
    counts = draft_questions(config(papers, tmp_path, rows=2, kinds=("extraction",)), model)
    assert counts == {"not written": 2}


def test_the_command_asks_a_server(papers, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "x")
    facts = [{"text": "It costs."}]
    reply = {"question": "What of it?", "answer": "9", "nuggets": facts, "kind": "report"}
    server = ChatServer(json.dumps(reply))
    try:
        main(
            [
                *("draft_questions", str(papers), "--out", str(tmp_path), "--rows", "2"),
                *("--llm", "tiny", "--base-url", server.url),
            ]
        )
    finally:
        server.close()
    assert "2 draft" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="Name a model"):
        main(["draft_questions", str(papers), "--out", str(tmp_path)])


def test_unknown_kinds_are_refused(papers, tmp_path):
    with pytest.raises(ConfigError, match="unknown"):
        draft_questions(config(papers, tmp_path, kinds=("poem",)), Scripted())
