"""Tokens told by length: close where lengths tell, exact where they do not."""

import bisect
import statistics

import numpy as np
import pytest
from training import config_of

from mmrag.embedders import load_backbone
from mmrag_recipes import data as data_module
from mmrag_recipes.data import load_datasets
from mmrag_recipes.rows import Item, Row, write_rows
from mmrag_recipes.text_tokens import TextTokens

WORDS = ["a", "page", "that", "answers", "questions", "about", "district", "heating"]


class Counting:
    """Counts words, and how often it was asked."""

    def __init__(self):
        self.asked = 0

    def __call__(self, text, task):
        self.asked += 1
        return len(text.split()) + (5 if task else 0)


def prose(chance, count):
    return [" ".join(chance.choice(WORDS, int(n))) for n in chance.integers(20, 200, count)]


def test_lengths_tell_the_tokens_of_prose():
    texts, count = prose(np.random.default_rng(0), 3000), Counting()
    tokens = TextTokens(count)
    for task in (None, "Find a page."):  # a curve each: an instruction adds its own
        told = np.array([tokens(text, task) for text in texts])
        exact = np.array([Counting()(text, task) for text in texts])
        assert (told[:400] == exact[:400]).all()
        error = np.abs(told - exact) / exact
        assert error.mean() < 0.05
        assert np.quantile(error, 0.99) < 0.15
    assert count.asked < 1200  # of 6,000


def test_what_lengths_tell_is_between_the_means_of_groups():
    texts, count = prose(np.random.default_rng(5), 2000), Counting()
    tokens = TextTokens(count)
    told = [tokens(text, None) for text in texts]
    by_size = sorted(texts[:400], key=len)
    groups = [by_size[start : start + 20] for start in range(0, 400, 20)]
    sizes = [statistics.fmean(len(text) for text in group) for group in groups]
    counts = [statistics.fmean(len(text.split()) for text in group) for group in groups]
    for place, text in enumerate(texts[400:], 400):
        # Of the two groups between whose sizes it lies; those outside of all are counted.
        if sizes[0] <= len(text) <= sizes[-1]:
            upper = max(1, bisect.bisect_left(sizes, len(text)))
            share = (len(text) - sizes[upper - 1]) / (sizes[upper] - sizes[upper - 1])
            expected = counts[upper - 1] + share * (counts[upper] - counts[upper - 1])
            assert told[place] == pytest.approx(expected, abs=0.5 + 1e-9)
        else:
            assert told[place] == len(text.split())
    outside = sum(not sizes[0] <= len(text) <= sizes[-1] for text in texts[400:])
    assert 0 < outside == count.asked - 400


def test_texts_whose_length_does_not_tell_are_counted_each():
    chance = np.random.default_rng(1)
    texts = [
        text if n % 2 else text.replace(" ", "-") for n, text in enumerate(prose(chance, 1000))
    ]
    count = Counting()
    tokens = TextTokens(count)
    assert [tokens(text, None) for text in texts] == [len(text.split()) for text in texts]
    assert count.asked == 1000


def test_a_text_longer_than_all_before_is_counted():
    count = Counting()
    tokens = TextTokens(count)
    for text in prose(np.random.default_rng(2), 500):
        tokens(text, None)
    assert tokens("word " * 5000, None) == 5000
    assert tokens("word", None) == 1


def test_the_costs_of_a_file_are_about_those_of_counting(tiny_model, tmp_path, monkeypatch):
    chance = np.random.default_rng(3)
    texts = prose(chance, 1400)
    rows = [
        Row(id=str(n), query=Item(text=text[:60]), positives=[Item(text=text)])
        for n, text in enumerate(texts)
    ]
    write_rows(tmp_path / "rows.jsonl", rows)
    config = config_of(tiny_model, tmp_path / "out", tmp_path / "rows.jsonl")
    backbone = load_backbone(tiny_model, family="gme", device="cpu")
    told = np.asarray(load_datasets(config, backbone)[0].costs)
    (tmp_path / "rows.jsonl.index").rename(tmp_path / "old")
    monkeypatch.setattr(data_module, "TextTokens", lambda count: count)
    exact = np.asarray(load_datasets(config, backbone)[0].costs)
    assert not (told == exact).all()
    assert (told[:200] == exact[:200]).all()
    assert (np.abs(told - exact) / exact).mean() == pytest.approx(0, abs=0.05)
