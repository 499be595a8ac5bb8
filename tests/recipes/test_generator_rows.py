"""Rows for the model that answers: shares by count, what is shown, and the three layouts."""

import json
from collections import Counter

import numpy as np
import pymupdf
import pytest
from fakes import FakeEmbedder
from PIL import Image

from mmrag.answering.response import SENTINEL
from mmrag.errors import ConfigError, ContentError
from mmrag.evaluation.questions import Question
from mmrag_recipes import generator_rows as module
from mmrag_recipes.__main__ import main
from mmrag_recipes.config_generator import GeneratorRowsConfig
from mmrag_recipes.generator_rows import CLEAN, NOISY, REFUSED, chat_of, irrelevant, kinds_of
from mmrag_recipes.options import build
from mmrag_recipes.rows import Item


def options_of(**changes):
    return GeneratorRowsConfig(questions="q", pdfs="p", out="o", refusal="NO", **changes)


PAGES = {("a.pdf", n): Item(text=f"page {n} <image>", image=f"i{n}") for n in range(1, 7)}


def asked(n=1, **fields):
    return Question(f"what {n}?", (("a.pdf", n),), answer=f"answer {n}", id=f"q{n}", **fields)


def test_shares_are_counted_exactly_and_drawn_by_the_seed():
    questions = [asked(n) for n in range(20)] + [Question("?", answerable=False, id="x")]
    options = options_of(noise=0.5, refuse=0.25)
    kinds = kinds_of(questions, options)
    assert Counter(kinds[:20]) == {NOISY: 10, REFUSED: 5, CLEAN: 5}
    assert kinds[20] == REFUSED  # there is no page that could be right
    assert kinds == kinds_of(questions, options)
    assert kinds != kinds_of(questions, options.replace(seed=1))


def shown_pages(chat):
    return [int(name[1:]) for name in chat.images]


def test_what_each_kind_shows_and_answers():
    others = [("a.pdf", n) for n in (4, 5, 6, 3)]
    options = options_of(pages=3)
    clean = chat_of(asked(2), CLEAN, PAGES, others, options)
    assert shown_pages(clean) == [2]
    assert clean.answer == "answer 2 [1]"
    noisy = chat_of(asked(2), NOISY, PAGES, others, options)
    assert len(set(shown_pages(noisy))) == 3
    assert noisy.answer == f"answer 2 [{shown_pages(noisy).index(2) + 1}]"
    refused = chat_of(asked(2), REFUSED, PAGES, others, options)
    assert len(set(shown_pages(refused))) == 3
    assert 2 not in shown_pages(refused)
    assert refused.answer == "NO"
    for chat in (clean, noisy, refused):
        question = "what 2?\nAnswer from the pages above, or reply with NO."
        assert chat.shown[-1] == (question, False)
    assert chat_of(asked(2), NOISY, PAGES, others, options) == noisy
    assert "[" not in chat_of(asked(2), CLEAN, PAGES, others, options_of(cite=False)).answer


def test_the_right_page_is_at_every_place():
    others = [("a.pdf", n) for n in (2, 3, 4)]
    places = Counter()
    for n in range(60):
        question = Question("?", (("a.pdf", 1),), answer="x", id=f"q{n}")
        places[shown_pages(chat_of(question, NOISY, PAGES, others, options_of())).index(1)] += 1
    assert min(places[place] for place in range(4)) > 5


def test_only_the_most_tempting_pages_are_drawn():
    others = [("a.pdf", n) for n in (4, 5, 6, 3)]
    for seed in range(10):
        chat = chat_of(asked(1), REFUSED, PAGES, others, options_of(pages=2, depth=2, seed=seed))
        assert set(shown_pages(chat)) <= {4, 5}


def test_pages_that_say_the_answer_are_not_irrelevant():
    texts = ["the answer", "It took 2,319  HOURS in all", "12,319 hours", "2,319 hours later", "-"]
    pages = {("a.pdf", n): Item(text=text) for n, text in enumerate(texts, 1)}
    question = Question("?", (("a.pdf", 1),), answer="2,319 hours.")
    scores = np.array([0.9, 0.8, 0.1, 0.2, 0.3], dtype=np.float32)
    assert irrelevant(question, pages, scores) == [("a.pdf", 5), ("a.pdf", 3)]
    short = Question("?", (("a.pdf", 1),), answer="-")
    assert len(irrelevant(short, pages, scores)) == 4


def test_layouts():
    others = [("a.pdf", 4)]
    chat = chat_of(asked(1), CLEAN, PAGES, others, options_of(items="fused"))
    ask = "what 1?\nAnswer from the pages above, or reply with NO."
    # A page's own words must not pass for the mark of an image.
    text = f"[1]\n<image>\npage 1 < image >\n{ask}"
    assert module.swift(chat) == {
        "messages": [
            {"role": "user", "content": text},
            {"role": "assistant", "content": "answer 1 [1]"},
        ],
        "images": ["images/i1"],
    }
    assert module.llava(chat) == {
        "id": "q1",
        "image": ["images/i1"],
        "conversations": [
            {"from": "human", "value": text},
            {"from": "gpt", "value": "answer 1 [1]"},
        ],
    }
    user, assistant = module.transformers(chat)["messages"]
    assert [part["type"] for part in user["content"]] == ["text", "image", "text", "text"]
    assert user["content"][1]["path"] == "images/i1"
    assert assistant["content"] == [{"type": "text", "text": "answer 1 [1]"}]
    bare = chat_of(asked(1), CLEAN, PAGES, others, options_of(items="text"))
    assert module.swift(bare)["images"] == []
    assert "image" not in module.llava(bare)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "pdfs").mkdir()
    pdf = pymupdf.open()
    for n in range(1, 6):
        pdf.new_page(width=200, height=200).insert_text((20, 50), f"Plan {n} covers tooth {n}.")
    pdf.save(tmp_path / "pdfs" / "a.pdf")
    lines = [
        {"question": f"What does plan {n} cover?", "answer": f"Tooth {n}.", "id": f"q{n}"}
        | {"pages": [{"file": "a.pdf", "page": n}]}
        for n in range(1, 6)
    ]
    lines += [{"question": "Who?", "pages": [{"file": "a.pdf", "page": 1}]}]
    lines += [{"question": "Lost?", "answer": "x", "pages": [{"file": "b.pdf", "page": 1}]}]
    lines += [{"question": "Which moon?", "answerable": False}]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_the_command_writes_rows_that_a_trainer_finds(folder, monkeypatch, capsys, caplog):
    monkeypatch.setattr(module, "load_embedder", lambda name: FakeEmbedder())
    words = ["generator_rows", str(folder / "q.jsonl"), "--pdfs", str(folder / "pdfs")]
    words += ["--out", str(folder / "out"), "--noise", "0.5", "--refuse", "0.2", "--pages", "3"]
    main(words)
    rows = [json.loads(line) for line in (folder / "out" / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == 6
    for row in rows:
        content = row["messages"][0]["content"]
        assert content.count("<image>") == len(row["images"]) >= 1
        for name in row["images"]:
            assert Image.open(folder / "out" / name).size[0] > 100
    refused = [row for row in rows if row["messages"][1]["content"] == SENTINEL]
    assert "Which moon?" in refused[-1]["messages"][0]["content"]
    shown = capsys.readouterr().out
    assert f"{len(refused):>6}  irrelevant pages alone" in shown
    assert "it has an image, or no answer" in caplog.text
    assert "not readable: b.pdf page 1" in caplog.text
    before = (folder / "out" / "rows.jsonl").read_bytes()
    main(words)
    assert (folder / "out" / "rows.jsonl").read_bytes() == before


def test_bad_settings_and_questions_are_said(folder, monkeypatch):
    values = {"questions": "q", "pdfs": "p", "out": "o"}
    with pytest.raises(ConfigError, match="at most 1 in all"):
        build(GeneratorRowsConfig, {**values, "noise": 0.7, "refuse": 0.6}, "x")
    with pytest.raises(ConfigError, match=r"must hold \{question\}"):
        build(GeneratorRowsConfig, {**values, "template": "Answer."}, "x")
    with pytest.raises(ContentError, match="no page beside the right ones"):
        chat_of(asked(1), REFUSED, PAGES, [], options_of())
    line = {"question": "Who?", "pages": [{"file": "a.pdf", "page": 1}]}
    (folder / "q.jsonl").write_text(json.dumps(line))
    given = {"questions": folder / "q.jsonl", "pdfs": folder / "pdfs", "out": folder / "out"}
    with pytest.raises(ContentError, match="no question gives a row"):
        module.generator_rows(GeneratorRowsConfig(**given), FakeEmbedder())
