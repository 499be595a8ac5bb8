"""Metrics against independent implementations and against values worked out by hand."""

import math

import numpy as np
import pytest
from sklearn.metrics import ndcg_score

from mmrag.errors import ContentError
from mmrag.evaluation.bootstrap import interval
from mmrag.evaluation.metrics import average, metrics_of


def test_metrics_by_hand():
    found = metrics_of(["x", "a", "y", "b", "z"], {"a": 1.0, "b": 1.0, "c": 1.0})
    assert found["p@1"] == found["hit@1"] == 0
    assert found["hit@5"] == 1
    assert found["recall@5"] == pytest.approx(2 / 3)
    assert found["mrr@10"] == 0.5
    dcg = 1 / math.log2(3) + 1 / math.log2(5)
    best = 1 + 1 / math.log2(3) + 1 / math.log2(4)
    assert found["ndcg@10"] == pytest.approx(dcg / best)
    assert found["ndcg_linear@10"] == found["ndcg@10"]


def test_both_gains_equal_those_of_scikit_learn():
    chance = np.random.default_rng(0)
    for _ in range(20):
        gains = chance.integers(0, 4, 12).astype(float)
        gains[0] = max(gains[0], 1)
        scores = chance.normal(size=12)
        ranked = np.argsort(-scores).tolist()
        relevant = {i: g for i, g in enumerate(gains.tolist()) if g > 0}
        found = metrics_of(ranked, relevant)
        for cut in (5, 10):
            linear = ndcg_score([gains], [scores], k=cut)
            exponential = ndcg_score([2**gains - 1], [scores], k=cut)
            assert found[f"ndcg_linear@{cut}"] == pytest.approx(linear)
            assert found[f"ndcg@{cut}"] == pytest.approx(exponential)


def test_a_query_without_an_answer_is_an_error():
    with pytest.raises(ContentError):
        metrics_of(["a"], {})


def test_averages():
    assert average([{"hit@1": 1.0}, {"hit@1": 0.0}]) == {"hit@1": 0.5, "n": 2.0}


@pytest.mark.parametrize("graded", [False, True])
def test_every_metric_is_that_of_trec_eval(graded):
    pytrec_eval = pytest.importorskip("pytrec_eval")
    chance = np.random.default_rng(3)
    names = {
        "success_1": "hit@1",
        "success_5": "hit@5",
        "success_10": "hit@10",
        "recall_1": "recall@1",
        "recall_5": "recall@5",
        "recall_10": "recall@10",
        "P_1": "p@1",
        "ndcg_cut_5": "ndcg_linear@5",
        "ndcg_cut_10": "ndcg_linear@10",
        "recip_rank": "mrr@10",
    }
    for _ in range(50):
        documents = [f"d{n}" for n in range(30)]
        right = chance.choice(documents, size=int(chance.integers(1, 8)), replace=False)
        qrel = {d: int(chance.integers(1, 4)) if graded else 1 for d in right.tolist()}
        ranked = chance.permutation(documents).tolist()[:10]
        run = {"q": {document: float(-rank) for rank, document in enumerate(ranked)}}
        measures = {"success.1,5,10", "recall.1,5,10", "P.1", "ndcg_cut.5,10", "recip_rank"}
        (theirs,) = pytrec_eval.RelevanceEvaluator({"q": qrel}, measures).evaluate(run).values()
        ours = metrics_of(ranked, {document: float(g) for document, g in qrel.items()})
        for theirs_name, name in names.items():
            assert ours[name] == pytest.approx(theirs[theirs_name], abs=1e-6), name


def test_intervals_are_of_documents_and_not_of_questions():
    """Twenty questions of one document, all alike, count as one observation."""
    values = np.concatenate([np.ones(20), np.zeros(5), np.ones(5)])[:, None]
    documents = ["a"] * 20 + ["b"] * 5 + ["c"] * 5
    low, high = interval(values, documents)
    assert (low[0], high[0]) == (0.0, 1.0)  # b may be drawn three times, and so may a and c
    low, high = interval(values, [f"d{n}" for n in range(30)])
    assert low[0] > 0.6
    # A normal approximation of independent observations, for the width.
    width = 2 * 1.96 * math.sqrt(25 * 5 / 30**2 / 30)
    assert high[0] - low[0] == pytest.approx(width, rel=0.1)


@pytest.mark.parametrize("documents", [[], ["a"], ["a", "a", "a"]])
def test_one_document_has_no_interval(documents):
    low, high = interval(np.zeros((len(documents), 2)), documents)
    assert np.isnan([low, high]).all()
