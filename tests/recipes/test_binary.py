"""Binary-aware training: what it does for codes of one bit a dimension."""

import numpy as np
from training import config_of

from mmrag.embedders import load_backbone
from mmrag.embedders.local import LocalEmbedder
from mmrag.evaluation.metrics import average, metrics_of
from mmrag_recipes.export import load_trained
from mmrag_recipes.rows import read_rows, store_of
from mmrag_recipes.train import train


def rank_by_codes(backbone, path, dim):
    """Mean reciprocal rank of each row's document by the signs of both vectors alone."""
    embedder = LocalEmbedder(backbone, name="x", fingerprint="x")
    rows, store = read_rows(path), store_of(path)
    queries = embedder.encode([store.content(row.query) for row in rows], rows[0].instruction)
    documents = embedder.encode([store.content(row.positives[0]) for row in rows])
    codes = np.where(documents[:, :dim] > 0, 1, -1)
    scores = np.where(queries[:, :dim] > 0, 1, -1) @ codes.T
    found = []
    for row, each in enumerate(scores):
        # The right document after all that score the same: a tie is no find.
        order = sorted(range(len(each)), key=lambda place: (-each[place], place == row))
        found.append(metrics_of(order, {row: 1.0}))
    return average(found)["mrr@10"]


def test_codes_find_more_after_training_on_them_alone(tiny_model, text_rows, tmp_path):
    """Against training without them, 16 rows decide nothing: the documentation has that table."""
    options = {"steps": 25, "lr": 2e-3, "hard_negatives": 0, "matryoshka_dims": (16,)}
    train(config_of(tiny_model, tmp_path, text_rows, binary_weight=1.0, **options))
    before = rank_by_codes(load_backbone(tiny_model, family="gme", device="cpu"), text_rows, 16)
    assert rank_by_codes(load_trained(tmp_path)[0], text_rows, 16) > before + 0.2
