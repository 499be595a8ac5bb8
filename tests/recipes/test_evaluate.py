"""Rows are ranked and scored, whatever the batches."""

import numpy as np
import pytest

from mmrag.embedders import load_embedder
from mmrag.errors import ConfigError
from mmrag_recipes import vectors
from mmrag_recipes.__main__ import main
from mmrag_recipes.evaluate import evaluate_rows, rank
from mmrag_recipes.rows import read_rows, store_of


def test_equal_scores_keep_their_order():
    documents = np.array([[1, 0], [1, 0], [0, 1]], dtype=np.float32)
    assert rank(np.array([[1, 0]], dtype=np.float32), documents, 3).tolist() == [[0, 1, 2]]


def test_a_ranking_in_blocks_is_that_of_all_at_once(tiny_model, mixed_rows, monkeypatch):
    embedder = load_embedder(tiny_model, family="gme", device="cpu")
    rows, store = read_rows(mixed_rows), store_of(mixed_rows)
    whole = evaluate_rows(embedder, rows, store)
    monkeypatch.setattr(vectors, "_SCORES_AT_ONCE", 100)
    assert evaluate_rows(embedder, rows, store) == whole


def test_rows_are_scored_per_pair_and_whatever_the_batches(tiny_model, mixed_rows):
    rows, store = read_rows(mixed_rows), store_of(mixed_rows)
    small = load_embedder(tiny_model, family="gme", device="cpu", token_budget=64)
    large = load_embedder(tiny_model, family="gme", device="cpu", token_budget=100_000)
    found = evaluate_rows(small, rows, store)
    assert set(found) == {"all", "text->text", "text->image", "text->fused", "fused->text"}
    assert found["all"]["n"] == 24
    assert evaluate_rows(large, rows, store) == found


def test_a_perfect_model_scores_one(tiny_model, text_rows):
    """Asking with the document itself finds it."""
    embedder = load_embedder(tiny_model, family="gme", device="cpu")
    rows = [
        row.model_copy(update={"query": row.positives[0], "instruction": None})
        for row in read_rows(text_rows)
    ]
    found = evaluate_rows(embedder, rows, store_of(text_rows))
    assert found["all"]["hit@1"] == found["all"]["ndcg@10"] == 1.0
    halved = evaluate_rows(embedder, rows, store_of(text_rows), dim=16)
    assert halved["all"]["mrr@10"] == 1.0


def test_dimensions_that_the_model_lacks_are_refused(tiny_model, text_rows):
    embedder = load_embedder(tiny_model, family="gme", device="cpu")
    with pytest.raises(ConfigError, match="dim=9999"):
        evaluate_rows(embedder, read_rows(text_rows), store_of(text_rows), 9999)


def test_a_missing_file_is_a_message(tiny_model, tmp_path):
    with pytest.raises(SystemExit, match="cannot be read"):
        main(
            [
                "evaluate",
                str(tmp_path / "none.jsonl"),
                "--model",
                str(tiny_model),
                "--family",
                "gme",
            ]
        )
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(SystemExit, match="there are no rows"):
        main(
            [
                "evaluate",
                str(tmp_path / "empty.jsonl"),
                "--model",
                str(tiny_model),
                "--family",
                "gme",
            ]
        )
