"""Whether cited sources support the sentences of an answer, counted as one would by hand."""

import json
import re

import pytest
from chat_server import ChatServer
from fakes import FakeEmbedder
from llama_index.core.base.llms.types import CompletionResponse, LLMMetadata
from llama_index.core.llms import CustomLLM, MockLLM
from PIL import Image
from pydantic import Field

from mmrag.evaluation.answers import AnswerRecord, Sentence, support_scores
from mmrag.evaluation.compare import compare_evaluations
from mmrag.evaluation.engines import answer_all
from mmrag.evaluation.kept import Kept
from mmrag.evaluation.questions import Question
from mmrag.evaluation.report import write_report
from mmrag.evaluation.results import Evaluation
from mmrag.evaluation.run import evaluate
from mmrag.index import UniversalIndex
from mmrag.llms.endpoint import open_llm

ANSWER = "The well is nine metres deep [1]. It was dug in 1904 [1]. It is warm [7]. All like it."
FULL, PARTIAL, NONE = "full_support", "partial_support", "no_support"


class StubJudge(CustomLLM):
    """Supports a sentence as ``said`` has it by one of its words; keeps the prompts."""

    said: dict[str, str]
    prompts: list[str] = Field(default_factory=list)
    window: int = 20_000

    @property
    def metadata(self):
        return LLMMetadata(model_name="stub", context_window=self.window)

    def complete(self, prompt, formatted=False, **_):
        self.prompts.append(prompt)
        sentence = re.search(r"<<<sentence \w+>>>\n(.*)\n<<<end of sentence", prompt)[1]
        given = next(label for word, label in self.said.items() if word in sentence)
        return CompletionResponse(text=json.dumps({"reason": "so", "support": given}))

    def stream_complete(self, prompt, formatted=False, **_):
        raise NotImplementedError


@pytest.fixture
def index(tmp_path):
    (tmp_path / "well.md").write_text("The well is nine metres deep. It was dug by hand.")
    with UniversalIndex(tmp_path / "library", FakeEmbedder()) as library:
        library.add(tmp_path / "well.md")
        yield library


@pytest.fixture
def server():
    chat = ChatServer(answer=ANSWER)
    yield chat
    chat.close()


WELL = Question("How deep is the well?", (("well.md", 1),), id="q1")


def test_scores_by_hand():
    sentences = [
        Sentence("a", (1,), FULL),
        Sentence("b", (1, 2), PARTIAL),
        Sentence("c", (3,), NONE),
        Sentence("d", (), NONE),
    ]
    assert support_scores(sentences) == {
        "support_precision": (1 + 0.5 + 0) / 3,
        "support_recall": (1 + 0.5 + 0) / 4,
    }
    assert support_scores([Sentence("d", (), NONE)]) == {
        "support_precision": 0.0,
        "support_recall": 0.0,
    }
    # Without a judge nothing is known, and part of an answer is not measured.
    assert support_scores([]) == {}
    assert support_scores([Sentence("a", (1,), FULL), Sentence("b", (1,))]) == {}


def test_each_cited_sentence_is_judged_beside_what_it_cites(index, server):
    judge = StubJudge(said={"nine": FULL, "1904": PARTIAL})
    engine = index.as_query_engine(open_llm("tiny", server.url, "x"))
    kept = Kept()
    (record,) = answer_all(engine, [WELL], judge=judge, kept=kept).values()
    assert record.sentences == (
        Sentence("The well is nine metres deep.", (1,), FULL),
        Sentence("It was dug in 1904.", (1,), PARTIAL),
        # There is no source 7, and nothing to ask.
        Sentence("It is warm.", (7,), NONE),
        Sentence("All like it.", (), NONE),
    )
    scores = record.scores(WELL)
    assert scores["support_precision"] == (1 + 0.5 + 0) / 3
    assert scores["support_recall"] == (1 + 0.5 + 0 + 0) / 4
    first, second = judge.prompts
    assert "It was dug by hand." in first
    assert "How deep is the well?" in first
    assert "1904" not in first
    assert "nine metres deep" in second
    assert AnswerRecord.from_json(json.loads(json.dumps(record.to_json()))) == record
    assert answer_all(engine, [WELL], judge=judge, kept=kept) == {"q1": record}
    assert len(judge.prompts) == 2


def test_sentences_that_are_removed_are_not_counted(index, server):
    judge = StubJudge(said={"nine": FULL})
    llm = open_llm("tiny", server.url, "x")
    engine = index.as_query_engine(llm, unsupported="remove", dangling="remove")
    (record,) = answer_all(engine, [WELL], judge=judge).values()
    assert record.text == "The well is nine metres deep [1]."
    assert record.sentences == (Sentence("The well is nine metres deep.", (1,), FULL),)


def test_answers_that_are_withheld_have_no_support_and_others_always(index, server):
    judge = StubJudge(said={"nine": FULL, "1904": NONE})
    engine = index.as_query_engine(open_llm("tiny", server.url, "x"))
    none = Question("How tall is it?", answerable=False)
    found = evaluate({}, [WELL, none], engines={"e": engine}, judge=judge)
    # Support is no matter of the right answer: both answers are measured.
    assert (found.answer_scores("e")["support_recall"].n, len(judge.prompts)) == (2, 4)
    server.answer = "NOT_FOUND_IN_SOURCES"
    found = evaluate({}, [WELL], engines={"e": engine}, judge=judge)
    assert found.answers["e"]["q1"].sentences == ()
    assert "support_recall" not in found.answer_scores("e")


def test_the_judge_sees_the_image_that_the_model_saw(tmp_path, server):
    Image.new("RGB", (64, 48), "red").save(tmp_path / "red.png")
    server.answer = "It is red [1]."
    with UniversalIndex(tmp_path / "library", FakeEmbedder()) as library:
        library.add(tmp_path / "red.png")
        llm = open_llm("tiny", server.url, "x")
        asked = [Question("What colour is it?", (("red.png", 1),))]
        for images in (True, False):
            judge = ChatServer(answer=json.dumps({"support": FULL}))
            engine = library.as_query_engine(llm, images=images)
            (record,) = answer_all(engine, asked, judge=open_llm("j", judge.url, "x")).values()
            judge.close()
            assert record.sentences == (Sentence("It is red.", (1,), FULL),)
            assert ("image_url" in json.dumps(judge.requests[0])) == images


def test_long_sources_are_cut_to_what_the_judge_takes(tmp_path, server, caplog):
    filler = " ".join(f"Line {n} speaks of stone and moss." for n in range(900))
    (tmp_path / "well.md").write_text(f"{filler} The well is nine metres deep. {filler}")
    server.answer = "It is nine metres deep [1]."
    judge = StubJudge(said={"nine": FULL}, window=700)
    with UniversalIndex(tmp_path / "library", FakeEmbedder()) as library:
        library.add(tmp_path / "well.md")
        engine = library.as_query_engine(open_llm("tiny", server.url, "x"))
        answer_all(engine, [WELL], judge=judge)
    assert "The well is nine metres deep." in judge.prompts[0]
    assert len(judge.prompts[0]) < 3 * 700
    assert "was cut to the sentences that match" in caplog.text


def test_means_have_intervals_over_documents_and_are_compared(tmp_path):
    questions = [Question("?", ((f"{n}.pdf", 1),), id=f"q{n}") for n in range(6)]

    def found(*labels):
        records = {
            f"q{n}": AnswerRecord(
                "x", sentences=(Sentence("x", (1,), labels[n % 2]), Sentence("y", (), NONE))
            )
            for n in range(6)
        }
        return Evaluation(questions, {}, {"e": records}, info={"judge": {"model": "j"}})

    evaluation = found(FULL, PARTIAL)
    score = evaluation.answer_scores("e")["support_recall"]
    assert (score.mean, score.n) == ((0.5 + 0.25) / 2, 6)
    assert 0.25 <= score.low < score.mean < score.high <= 0.5
    gained = {one.metric: one for one in compare_evaluations(evaluation, found(FULL, FULL))}
    assert gained["support_precision"].gain == 0.25
    evaluation.save(tmp_path / "r.json")
    assert Evaluation.load(tmp_path / "r.json").answers == evaluation.answers
    write_report(evaluation, tmp_path / "r.html")
    assert "support recall, of all sentences" in (tmp_path / "r.html").read_text()


def test_a_judge_is_not_needed(index):
    (record,) = answer_all(index.as_query_engine(MockLLM()), [WELL]).values()
    assert all(sentence.support is None for sentence in record.sentences)
    assert "support_recall" not in record.scores(WELL)
