"""The engine: planning, out-of-memory, errors that name the item, loading that is exact."""

import json
import logging
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from mmrag.content import Content
from mmrag.embedders import load_embedder
from mmrag.errors import ConfigError, ContentError, ModelError
from mmrag.modeling.batching import pad, plan_batches
from mmrag.modeling.loading import fingerprint


def test_batches_hold_every_item_once_and_keep_the_budget():
    costs = [5, 300, 7, 7, 90, 4000, 12, 1, 64, 300]
    batches = plan_batches(costs, 600)
    assert sorted(i for batch in batches for i in batch) == list(range(len(costs)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(costs[i] for i in batch) <= 600
    assert len(batches) < len(costs) / 2 + 1


def test_padding_sides():
    rows = [torch.tensor([1, 2, 3]), torch.tensor([4])]
    ids, mask = pad(rows, 0)
    assert ids.tolist() == [[1, 2, 3], [4, 0, 0]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    ids, mask = pad(rows, 9, side="left")
    assert ids.tolist() == [[1, 2, 3], [9, 9, 4]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_batches_keep_the_token_budget_visual_tokens_included(gme, monkeypatch):
    seen = []
    forward = gme.backbone.forward

    def spy(batch):
        seen.append((len(batch), max(item.n_tokens for item in batch)))
        return forward(batch)

    monkeypatch.setattr(gme.backbone, "forward", spy)
    contents = [Image.new("RGB", (28 * n, 28 * 6)) for n in range(1, 9)] + ["short"] * 9
    gme.encode(contents)
    assert all(n == 1 or n * longest <= gme.token_budget for n, longest in seen)
    assert sum(n for n, _ in seen) == len(contents)
    assert len(seen) < len(contents)


def test_out_of_memory_halves_the_batch_and_says_so_once(gme, monkeypatch, caplog):
    expected = gme.encode(["one", "two two", "three", "four four four", "five"])
    forward = gme.backbone.forward

    def small(batch):
        if len(batch) > 2:
            raise torch.OutOfMemoryError("no memory")
        return forward(batch)

    monkeypatch.setattr(gme.backbone, "forward", small)
    monkeypatch.setattr(gme, "token_budget", 1500)
    monkeypatch.setattr(gme, "_told_memory", False)
    with caplog.at_level(logging.WARNING, logger="mmrag"):
        vectors = gme.encode(["one", "two two", "three", "four four four", "five"])
        gme.encode(["one", "two two", "three"])
    np.testing.assert_allclose(vectors, expected, atol=1e-5)
    assert sum("out of memory" in record.message for record in caplog.records) == 1


def test_one_item_without_memory_is_an_error_that_says_what_to_do(gme, monkeypatch):
    def never(batch):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(gme.backbone, "forward", never)
    monkeypatch.setattr(gme, "token_budget", 1500)
    with pytest.raises(ModelError, match="max_image_tokens"):
        gme.encode(["one"])


def test_a_bad_item_is_named(gme, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\nnot an image")
    with pytest.raises(ContentError, match="item 2"):
        gme.encode(["a", "b", broken])
    with pytest.raises(ContentError, match="item 0"):
        gme.encode([3.5])


def test_instruction_of_the_call_and_of_the_item(gme):
    plain, told = gme.encode(["x"]), gme.encode(["x"], instruction="Find a page.")
    own = gme.encode([Content("x", None, "Find a page.")])
    assert not np.allclose(plain, told, atol=1e-3)
    np.testing.assert_allclose(told, own, atol=1e-6)


def test_modalities_of_the_marker_are_kept(qwen2_vl_folder, tmp_path):
    folder = shutil.copytree(qwen2_vl_folder, tmp_path / "text-only")
    marker = {"family": "gme", "modalities": ["text"], "max_length": 64}
    (folder / "mmrag.json").write_text(json.dumps(marker))
    embedder = load_embedder(folder, device="cpu")
    assert embedder.modalities == {"text"}
    assert embedder.backbone.recipe.max_length == 64
    with pytest.raises(ContentError, match="cannot embed image, only text"):
        embedder.encode([Image.new("RGB", (30, 30))])


def _changed(source, target, change):
    folder = shutil.copytree(source, target)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_missing_weight_is_an_error_with_its_name(qwen2_vl_folder, tmp_path):
    key = "model.layers.1.mlp.up_proj.weight"
    folder = _changed(qwen2_vl_folder, tmp_path / "a", lambda weights: weights.pop(key))
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        load_embedder(folder, family="gme")


def test_an_unknown_weight_is_an_error_with_its_name(qwen2_vl_folder, tmp_path):
    folder = _changed(
        qwen2_vl_folder, tmp_path / "a", lambda w: w.update({"model.extra": torch.zeros(2)})
    )
    with pytest.raises(ModelError, match="extra"):
        load_embedder(folder, family="gme")


def test_a_weight_of_another_shape_is_an_error(qwen2_vl_folder, tmp_path):
    folder = _changed(
        qwen2_vl_folder, tmp_path / "a", lambda w: w.update({"model.norm.weight": torch.ones(3)})
    )
    with pytest.raises(ModelError, match="norm"):
        load_embedder(folder, family="gme")


def test_the_fingerprint_follows_weights_and_settings(qwen2_vl_folder, tmp_path):
    first = load_embedder(qwen2_vl_folder, family="gme").fingerprint
    assert load_embedder(qwen2_vl_folder, family="gme").fingerprint == first
    assert load_embedder(qwen2_vl_folder, family="gme", max_length=99).fingerprint != first
    folder = _changed(qwen2_vl_folder, tmp_path / "a", lambda w: w["model.norm.weight"].add_(0.5))
    assert load_embedder(folder, family="gme").fingerprint != first


def test_one_changed_matrix_changes_the_fingerprint(tmp_path):
    """Fine-tuning one projection keeps names, shapes and nearly every byte of the file."""
    weights = {f"layer.{n}": torch.zeros(256, 256) for n in range(40)}
    save_file(weights, tmp_path / "model.safetensors")
    before = fingerprint([tmp_path], {})
    weights["layer.13"][0, 0] = 1
    save_file(weights, tmp_path / "model.safetensors")
    assert fingerprint([tmp_path], {}) != before


def test_names_that_lead_nowhere(tmp_path, qwen2_vl_folder):
    with pytest.raises(ModelError, match="no such folder"):
        load_embedder("not a name at all")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ModelError, match="family="):
        load_embedder(tmp_path)
    with pytest.raises(ConfigError, match="family='gmee'"):
        load_embedder(qwen2_vl_folder, family="gmee")
    with pytest.raises(ConfigError, match="max_len: unknown to family 'gme'"):
        load_embedder(qwen2_vl_folder, max_len=3)
    with pytest.raises(ConfigError, match="device="):
        load_embedder(qwen2_vl_folder, device="tpu9")
    with pytest.raises(ConfigError, match="dtype="):
        load_embedder(qwen2_vl_folder, dtype="float8")


def test_loading_is_quiet(qwen2_vl_folder, capfd):
    load_embedder(qwen2_vl_folder, family="gme")
    assert capfd.readouterr().err == ""
