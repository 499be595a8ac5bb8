"""Measures of answers, by hand; engines and judges asked, and resumed."""

import json
from pathlib import Path

import numpy as np
import pymupdf
import pytest
from chat_server import ChatServer
from fakes import FakeEmbedder
from llama_index.core.llms import MockLLM

from mmrag.errors import ConfigError, EndpointError
from mmrag.evaluation.answers import AnswerRecord, Verdict, has_numbers, normalised
from mmrag.evaluation.judge import JUDGE_PROMPT, NUGGET_PROMPT, SUPPORT_PROMPT
from mmrag.evaluation.questions import Question
from mmrag.evaluation.results import Evaluation
from mmrag.evaluation.run import evaluate
from mmrag.index import UniversalIndex
from mmrag.llms.endpoint import open_llm

TWO = (("a.pdf", 1), ("a.pdf", 2))


def test_pages_that_are_cited():
    asked = Question("?", TWO)
    answer = AnswerRecord("x [1][2]", cited=(("a.pdf", 2), ("a.pdf", 9), ("b.pdf", 1)))
    found = answer.scores(asked)
    assert found["citation_precision"] == pytest.approx(1 / 3)
    assert found["citation_recall"] == 0.5
    assert found["right_page"] == found["answered"] == found["certain"] == 1.0
    assert "exact" not in found


def test_an_answer_that_was_not_given_is_right_nowhere():
    found = AnswerRecord("Not found.", found=False, cited=TWO).scores(
        Question("?", TWO, answer="not found")
    )
    assert found["answered"] == found["right_page"] == found["citation_recall"] == 0
    assert found["exact"] == found["contains"] == 0
    assert "citation_precision" not in found


def test_abstention_is_right_where_there_is_no_answer():
    asked = Question("?", answerable=False)
    assert AnswerRecord("", found=False).scores(asked) == {
        "abstained": 1.0,
        "abstained_or_unsure": 1.0,
    }
    assert AnswerRecord("x", certain=False).scores(asked)["abstained_or_unsure"] == 1.0
    assert AnswerRecord("x", certain=False).scores(asked)["abstained"] == 0.0


@pytest.mark.parametrize(
    ("text", "gold", "exact", "contains"),
    [
        ("The Gold plan. [1]", "gold plan", 1, 1),
        ("It is the gold plan, of course [1].", "Gold plan", 0, 1),
        ("It is the marigold plan [1].", "gold plan", 0, 0),
        ("December, 2023", "December 2023", 1, 1),
    ],
)
def test_short_answers_are_compared_as_they_stand(text, gold, exact, contains):
    found = AnswerRecord(text).scores(Question("?", TWO, answer=gold))
    assert (found["exact"], found["contains"]) == (exact, contains)


def test_long_answers_are_not_compared_by_words():
    gold = "one two three four five six seven eight nine ten eleven twelve thirteen"
    assert "contains" not in AnswerRecord(gold).scores(Question("?", TWO, answer=gold))


def test_what_is_normalised():
    assert normalised("  The U.S. dollar, an  Asset! ") == "us dollar asset"


@pytest.mark.parametrize(
    ("answer", "gold", "right"),
    [
        ("about 93.857 days", "93.86", True),
        ("94 days", "93.86", False),
        ("it grew by 36.2 %", "36%", True),
        ("it fell by -2.8%", "2.8%", False),
        ("$32,502,000,000", "$32,502 million", True),
        ("1.577 Euro und der Rest", "1,577", True),
        ("2020, roughly 20%", "20% in 2020", True),
        ("20%", "20% in 2020", False),
        ("version 2.10.1", "2.10", False),
    ],
)
def test_numbers_are_compared_by_value_at_the_precision_of_the_right_one(answer, gold, right):
    assert has_numbers(answer, gold) is right


def test_marks_of_citations_are_no_numbers():
    found = AnswerRecord("It costs 4 euros [9].").scores(Question("?", TWO, answer="9"))
    assert found["numeric"] == 0.0


@pytest.fixture
def index(tmp_path):
    pdf = pymupdf.open()
    for words in (
        "The tigers of the northern forests hunt deer at night.",
        "Blue whales swim through all oceans and eat krill.",
    ):
        pdf.new_page().insert_text((72, 72), words)
    pdf.save(tmp_path / "animals.pdf")
    with UniversalIndex(tmp_path / "library", FakeEmbedder()) as library:
        library.add(tmp_path / "animals.pdf")
        yield library


ASKED = [
    Question("What do blue whales eat?", (("animals.pdf", 2),), answer="krill", kind="own"),
    Question("How tall is the lighthouse of Genoa?", answerable=False, kind="foreign"),
]


def test_an_engine_is_measured_and_read_back(index, tmp_path):
    found = evaluate({}, ASKED, engines={"quotes": index.as_query_engine()})
    scores = found.answer_scores("quotes")
    assert scores["answered"].mean == scores["right_page"].mean == scores["contains"].mean == 1.0
    assert (scores["abstained"].mean, scores["abstained"].n) == (1.0, 1)
    assert np.isnan(scores["answered"].low)
    assert set(found.answer_scores("quotes", "foreign")) == {"abstained", "abstained_or_unsure"}
    found.save(tmp_path / "found.json")
    assert Evaluation.load(tmp_path / "found.json").answers == found.answers


@pytest.fixture
def chat():
    server = ChatServer(models=[{"id": "judge", "max_model_len": 20_000}])
    yield server
    server.close()


def graded(server, answer, index, **options):
    server.answer = answer
    judge = open_llm("judge", server.url)
    engines = {"quotes": index.as_query_engine()}
    return evaluate({}, ASKED, engines=engines, judge=judge, **options)


def test_a_judge_grades_what_has_a_right_answer(index, chat):
    reply = '{"reason": "It names krill.", "grade": "incomplete", "support": "full_support"}'
    found = graded(chat, f"Let me see. ```json\n{reply}\n```", index)
    first, second = found.answers["quotes"].values()
    assert first.verdict == Verdict("incomplete", "It names krill.")
    assert second.verdict is None
    assert found.answer_scores("quotes")["judged"].mean == 0.5
    prompt, support = (request["messages"][0]["content"] for request in chat.requests)
    assert "What do blue whales eat?" in prompt
    assert "Reference answer: krill" in prompt
    # LlamaIndex's templates take single braces: doubled ones would be sent as they are.
    assert '{"reason": "one short sentence", "grade"' in prompt
    assert "{{" not in prompt + support
    assert found.info["judge"]["model"] == "judge"
    assert "Grade by content alone" in found.info["judge"]["prompt"]
    assert "Blue whales swim through all oceans and eat krill." in support
    assert "whether sources support a sentence" in found.info["judge"]["support_prompt"]


def test_a_judge_without_a_grade_is_noted_and_asked_again(index, chat, tmp_path):
    keep = tmp_path / "kept.jsonl"
    found = graded(chat, "I like it.", index, keep=keep)
    (note,) = found.notes
    assert note.startswith(
        "the answer to question q1 was not judged in full: judge: the judge's reply has"
    )
    assert found.answers["quotes"]["q1"].verdict is None
    # A grade that came is not lost with the support that did not.
    found = graded(chat, '{"grade": "correct"}', index, keep=keep)
    assert found.answer_scores("quotes")["judged"].mean == 1.0
    assert "support_recall" not in found.answer_scores("quotes")
    assert "no grade of support" in found.notes[0]
    found = graded(chat, '{"support": "Partial_Support"}', index, keep=keep)
    assert found.answer_scores("quotes")["judged"].mean == 1.0
    assert found.answer_scores("quotes")["support_recall"].mean == 0.5
    assert not found.notes
    graded(chat, "not asked any more", index, keep=keep)
    assert len(chat.requests) == 4


def test_a_run_of_answers_goes_on(index, tmp_path, monkeypatch):
    keep, asked = tmp_path / "kept.jsonl", []
    engine = index.as_query_engine()
    query = engine.query

    def counted(question):
        asked.append(question.query_str)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return query(question)

    monkeypatch.setattr(engine, "query", counted)
    with pytest.raises(KeyboardInterrupt):
        evaluate({}, ASKED, engines={"quotes": engine}, keep=keep)
    evaluate({}, ASKED, engines={"quotes": engine}, keep=keep)
    assert asked == [ASKED[0].text, ASKED[1].text, ASKED[1].text]
    engine.max_sources = 2  # which moves answers
    evaluate({}, ASKED, engines={"quotes": engine}, keep=keep)
    assert len(asked) == 5


def test_a_server_that_is_down_ends_the_run(index):
    llm = open_llm("m", "http://127.0.0.1:9/v1", context_window=8000)
    asked = [Question(f"What do {n} blue whales eat?", (("animals.pdf", 2),)) for n in range(5)]
    with pytest.raises(EndpointError):
        evaluate({}, asked, engines={"m": index.as_query_engine(llm)})


def test_engines_that_stream_are_refused(index):
    engine = index.as_query_engine(MockLLM(), streaming=True)
    with pytest.raises(ConfigError, match="does not stream"):
        evaluate({}, ASKED, engines={"stream": engine})


def test_records_are_plain_json():
    record = AnswerRecord("x", cited=TWO, verdict=Verdict("correct", "yes"))
    assert AnswerRecord.from_json(json.loads(json.dumps(record.to_json()))) == record


@pytest.mark.parametrize("prompt", [JUDGE_PROMPT, NUGGET_PROMPT, SUPPORT_PROMPT])
def test_the_docs_show_the_prompts_of_the_judge(prompt):
    docs = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()
    assert " ".join(prompt.template.split()) in " ".join(docs.split())
