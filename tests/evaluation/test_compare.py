"""Paired differences between two evaluations."""

import json
from dataclasses import replace

import numpy as np
import pytest

from mmrag.errors import ContentError
from mmrag.evaluation.answers import AnswerRecord
from mmrag.evaluation.compare import compare_evaluations, gains
from mmrag.evaluation.questions import Question
from mmrag.evaluation.results import Evaluation, System

TEXT = System("nano", "text")


def evaluation(ranks, system=TEXT, documents=10):
    """Questions whose right page has these ranks; None: not found."""
    questions = [
        Question(f"question {n}", ((f"d{n % documents}.pdf", 1),), id=f"q{n}")
        for n in range(len(ranks))
    ]
    found = {
        q.id: {} if rank is None else {q.pages[0]: rank}
        for q, rank in zip(questions, ranks, strict=True)
    }
    return Evaluation(questions, {system: found})


def of(found, metric, name="text"):
    (one,) = (each for each in found if (each.metric, each.name) == (metric, name))
    return one


def test_a_gain_on_every_document_is_real_and_one_on_few_is_not():
    before = [3] * 40
    better, hardly = [1] * 20 + [3] * 20, [1] * 1 + [3] * 39
    real = of(compare_evaluations(evaluation(before), evaluation(better)), "hit@1")
    assert (real.before, real.after, real.n) == (0.0, 0.5, 40)
    assert real.is_real
    assert real.low > 0
    noise = of(compare_evaluations(evaluation(before), evaluation(hardly)), "hit@1")
    assert noise.gain == pytest.approx(1 / 40)
    assert not noise.is_real
    lost = of(compare_evaluations(evaluation(better), evaluation(before)), "hit@1")
    assert lost.is_real
    assert lost.high < 0


def test_the_interval_is_that_of_a_paired_bootstrap_over_documents():
    chance = np.random.default_rng(5)
    before = chance.integers(1, 12, 60).tolist()
    after = [max(1, rank - int(chance.integers(0, 3))) for rank in before]
    found = of(compare_evaluations(evaluation(before), evaluation(after)), "mrr@10")
    gains = np.array(
        [
            (1 / new if new <= 10 else 0) - (1 / old if old <= 10 else 0)
            for old, new in zip(before, after, strict=True)
        ]
    )
    clusters = [gains[document::10] for document in range(10)]
    draws = [
        np.concatenate([clusters[i] for i in chance.integers(0, 10, 10)]).mean()
        for _ in range(4000)
    ]
    low, high = np.percentile(draws, [2.5, 97.5])
    assert found.gain == pytest.approx(gains.mean())
    assert found.low == pytest.approx(low, abs=0.006)
    assert found.high == pytest.approx(high, abs=0.006)


def test_only_questions_that_both_have_are_compared():
    before, after = evaluation([1] * 6), evaluation([1] * 4)
    after.questions[0] = replace(after.questions[0], text="another question")
    after.questions[1] = replace(after.questions[1], pages=(("other.pdf", 1),))
    assert of(compare_evaluations(before, after), "hit@1").n == 2
    with pytest.raises(ContentError, match="no question in common"):
        compare_evaluations(before, Evaluation([Question("x", id="x")]))


def test_the_only_model_of_each_is_the_same_one_changed():
    renamed = evaluation([1] * 6, replace(TEXT, model="nano-adapted"))
    assert of(compare_evaluations(evaluation([2] * 6), renamed), "hit@1").gain == 1.0
    several = evaluation([1] * 6, replace(TEXT, model="nano-adapted"))
    several.found[System("third", "text")] = several.found[replace(TEXT, model="nano-adapted")]
    with pytest.raises(ContentError, match="no system and no engine"):
        compare_evaluations(evaluation([2] * 6), several)


def test_answers_are_compared_where_both_can_be_measured():
    before, after = evaluation([1] * 4), evaluation([1] * 4)
    right = {q.id: AnswerRecord("x", cited=q.pages) for q in before.questions}
    silent = {q.id: AnswerRecord("", found=False) for q in before.questions[:3]}
    before.answers, after.answers = {"e": right}, {"e": silent}
    found = compare_evaluations(before, after)
    assert (of(found, "answered", "e").gain, of(found, "answered", "e").n) == (-1.0, 3)
    assert not [one for one in found if one.metric == "citation_precision"]


def test_differences_are_plain_json():
    one_document = compare_evaluations(
        evaluation([1, 2], documents=1), evaluation([1, 1], documents=1)
    )
    row = json.loads(json.dumps(of(one_document, "hit@1").to_json(), allow_nan=False))
    assert (row["low"], row["gain"], row["is_real"]) == (None, 0.5, False)


def test_the_fusion_is_compared_with_each_ranking_that_finds_anything():
    found = evaluation([2] * 20)
    fusion, nothing = replace(TEXT, ranking="fusion"), replace(TEXT, ranking="image")
    found.found[nothing] = {q.id: {} for q in found.questions}
    found.found[fusion] = {q.id: {q.pages[0]: 1} for q in found.questions}
    assert found.main_system == fusion
    ((system, one),) = gains(found)
    assert (system, one.metric) == (TEXT, "ndcg@10")
    assert one.gain == pytest.approx(1 - 1 / np.log2(3))
    assert one.is_real
