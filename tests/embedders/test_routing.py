"""Routing: queries go to the nearest expert, documents stay with the base."""

import json
import pickle

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_nano import save_nano

from mmrag import UniversalEmbedding
from mmrag.content import Content
from mmrag.embedders import load_backbone, load_embedder
from mmrag.embedders.base import Embedder
from mmrag.embedders.routing import Expert, RoutedEmbedder, load_routed, save_route
from mmrag.errors import ConfigError, ModelError
from mmrag_recipes.__main__ import main
from mmrag_recipes.rows import Item, Row, write_rows

TASK = "page_for_question"
LAW = ["court court", "the court of law", "law"]
HEALTH = ["zzz 999", "999 zz", "zz zz 99"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_nano(tmp_path_factory.mktemp("routing") / "base")


def save_expert(base, folder, seed):
    """A LoRA adapter on the base, in PEFT's layout, of random matrices."""
    torch.manual_seed(seed)
    model = load_backbone(base, device="cpu").model
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["query", "value"]))
    for name, weight in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def experts(base, tmp_path_factory):
    """A folder of two experts; the recipe writes their centroids."""
    folder = tmp_path_factory.mktemp("experts")
    for seed, (name, texts) in enumerate({"law": LAW, "health": HEALTH}.items()):
        save_expert(base, folder / name, seed)
        rows = [
            Row(id=text, query=Item(text=text), positives=[Item(text=f"{text}!")]) for text in texts
        ]
        write_rows(folder / f"{name}.jsonl", rows)
        words = ["--rows", str(folder / f"{name}.jsonl"), "--base", str(base)]
        main(["route", str(folder / name), *words])
    return folder


@pytest.fixture(scope="module")
def routed(base, experts):
    return load_routed(base, experts, device="cpu")


def test_a_centroid_is_the_mean_of_the_queries_by_the_base(base, experts):
    vectors = load_embedder(base, device="cpu").encode(LAW, "")
    mean = vectors.mean(0)
    kept = json.loads((experts / "law" / "route.json").read_text())
    np.testing.assert_allclose(kept["centroid"], mean / np.linalg.norm(mean), atol=1e-6)


def test_queries_go_to_the_nearest_expert_and_documents_to_the_base(base, experts, routed):
    assert isinstance(routed, Embedder)
    assert routed.route(LAW + HEALTH) == ["law"] * 3 + ["health"] * 3
    plain = load_embedder(base, device="cpu")
    alone = {
        name: load_embedder(experts / name, base=base, device="cpu") for name in ("law", "health")
    }
    np.testing.assert_allclose(routed.encode(LAW), plain.encode(LAW), atol=1e-6)
    for name, texts in (("law", LAW), ("health", HEALTH)):
        found = routed.encode(texts, TASK)
        np.testing.assert_allclose(found, alone[name].encode(texts, TASK), atol=1e-5)
        assert ((found * plain.encode(texts, TASK)).sum(1) < 0.999).all()


def test_a_mixed_batch_gives_the_vectors_of_one_by_one(routed):
    """Of queries of both experts and of documents, in any order, and cut."""
    mixed = [
        Content(LAW[0], instruction=TASK),
        Content(HEALTH[0]),
        Content(HEALTH[1], instruction=TASK),
        Content(LAW[1]),
        Content(LAW[2], instruction=""),
    ]
    together = routed.encode(mixed, dim=16)
    alone = np.concatenate([routed.encode([one], dim=16) for one in mixed])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    assert routed.encode([]).shape == (0, 32)


def test_weights_that_an_adapter_leaves_are_held_once(routed):
    ours = dict(routed.base.backbone.model.named_parameters())
    for expert in routed.experts.values():
        shared = {
            name
            for name, weight in expert.embedder.backbone.model.named_parameters()
            if weight.data_ptr() == ours[name].data_ptr()
        }
        own = ours.keys() - shared
        assert own
        assert all(".query." in name or ".value." in name for name in own)


def test_the_fingerprint_is_of_base_experts_and_centroids(base, experts, routed):
    again = load_routed(base, {"health": experts / "health", "law": experts / "law"}, device="cpu")
    assert again.fingerprint == routed.fingerprint
    fewer = load_routed(base, {"law": experts / "law"}, device="cpu")
    law, health = routed.experts["law"], routed.experts["health"]
    swapped = RoutedEmbedder(
        routed.base,
        {
            "law": Expert(law.embedder, health.centroid),
            "health": Expert(health.embedder, law.centroid),
        },
    )
    found = {one.fingerprint for one in (routed, fewer, swapped, routed.base)}
    assert len(found) == 4


def test_the_embed_model_of_llamaindex_routes(base, experts, routed):
    model = UniversalEmbedding(str(base), experts=experts, device="cpu")
    copy = pickle.loads(pickle.dumps(model))
    stored = UniversalEmbedding.from_dict(json.loads(json.dumps(model.to_dict())))
    for one in (model, copy, stored):
        assert one.to_dict()["fingerprint"] == routed.fingerprint
        np.testing.assert_allclose(
            one.get_query_embedding(LAW[0]), routed.encode(LAW[:1], TASK)[0], atol=1e-6
        )
        np.testing.assert_allclose(
            one.get_text_embedding(LAW[0]), routed.base.encode(LAW[:1])[0], atol=1e-6
        )
    named = UniversalEmbedding(str(base), experts={"law": str(experts / "law")}, device="cpu")
    assert list(named.embedder.experts) == ["law"]
    with pytest.raises(ConfigError, match="need a query_instruction"):
        UniversalEmbedding(str(base), experts=str(experts), query_instruction=None)
    with pytest.raises(ConfigError, match="leave out"):
        UniversalEmbedding(embedder=routed, experts=str(experts))


def test_what_cannot_route_is_told(base, experts, tmp_path):
    with pytest.raises(ConfigError, match=r"no folder in it has a route\.json"):
        load_routed(base, tmp_path, device="cpu")
    bare = save_expert(base, tmp_path / "bare", 3)
    with pytest.raises(ModelError, match=r"no route\.json"):
        load_routed(base, {"bare": bare}, device="cpu")
    (bare / "route.json").write_text('{"centroid": "x"}')
    with pytest.raises(ModelError, match="is damaged"):
        load_routed(base, {"bare": bare}, device="cpu")
    other = save_nano(tmp_path / "other", seed=4)
    with pytest.raises(ModelError, match="another base"):
        load_routed(other, experts, device="cpu")
    embedder = load_embedder(base, device="cpu")
    with pytest.raises(ConfigError, match="at least one"):
        RoutedEmbedder(embedder, {})
    with pytest.raises(ConfigError, match="384 dimensions"):
        nano = load_embedder("mmrag-nano", device="cpu")
        RoutedEmbedder(embedder, {"nano": Expert(nano, np.zeros(32, np.float32))})
    vector = embedder.encode(["a"])
    with pytest.raises(ModelError, match="no common direction"):
        save_route(bare, embedder, np.concatenate([vector, -vector]))
    with pytest.raises(ModelError, match="no such folder"):
        save_route(tmp_path / "absent", embedder, vector)


def test_an_expert_may_be_a_whole_checkpoint(base, tmp_path):
    folder = save_nano(tmp_path / "whole")
    weights = load_file(base / "model.safetensors")
    weights["encoder.layer.1.output.dense.weight"] *= 3
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    embedder = load_embedder(base, device="cpu")
    save_route(folder, embedder, embedder.encode(LAW))
    routed = load_routed(base, {"whole": folder}, device="cpu")
    expected = load_embedder(folder, device="cpu").encode(LAW, TASK)
    np.testing.assert_allclose(routed.encode(LAW, TASK), expected, atol=1e-6)
