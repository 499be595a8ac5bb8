"""Features of a frozen tower kept on disk: the same gradients, bounds, corruption, refusals."""

import pytest
import torch
from one_step import Prepared
from tiny import save_qwen2_vl
from tiny_llava import save_llava
from tiny_nano import save_nano
from tiny_qwen3 import save_qwen3_vl
from training import config_of, log_of, same, weights_of

from mmrag.errors import ConfigError
from mmrag_recipes import features as features_module
from mmrag_recipes.config import FeaturesConfig, LoraConfig
from mmrag_recipes.features import keep_features
from mmrag_recipes.train import train

FAMILIES = {"gme": save_qwen2_vl, "qwen3_vl": save_qwen3_vl, "nano": save_nano}


@pytest.fixture
def computed(monkeypatch) -> list[int]:
    """Images that went through a tower, per call."""
    counts = []
    original = features_module.tower_output

    def counting(visual, images, rule):
        counts.append(len(images))
        return original(visual, images, rule)

    monkeypatch.setattr(features_module, "tower_output", counting)
    return counts


def files_of(folder) -> list:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def nano(tmp_path_factory, mixed_rows):
    folder = tmp_path_factory.mktemp("nano")
    model = save_nano(folder / "model")
    options = {"family": "nano", "freeze": ("visual",)}
    return config_of(model, folder / "out", mixed_rows, **options)


@pytest.fixture(scope="module")
def prepared(nano) -> Prepared:
    return Prepared(nano, 8)


@pytest.mark.parametrize(("family", "chunk"), [("gme", 3), ("qwen3_vl", 3), ("nano", 0)])
def test_gradients_are_those_of_computing_the_features(
    family, chunk, tmp_path, mixed_rows, computed
):
    model = FAMILIES[family](tmp_path / "model")
    config = config_of(model, tmp_path / "out", mixed_rows, family=family, freeze=("visual",))
    prepared = Prepared(config.replace(chunk=chunk), 8)
    store = FeaturesConfig(folder=str(tmp_path / "kept"))
    plain, first = prepared.gradients(), prepared.gradients(store=store)
    n_images = len(files_of(tmp_path / "kept"))
    assert sum(computed) == n_images > 4  # once for both passes
    again = prepared.gradients(store=store)
    assert sum(computed) == n_images  # none at all
    for kept in (first, again):
        assert kept.keys() == plain.keys()
        for name, gradient in plain.items():
            torch.testing.assert_close(
                kept[name], gradient, rtol=0, atol=1e-5 * float(gradient.abs().max())
            )


def test_a_corrupted_file_is_computed_again_and_said(prepared, tmp_path, computed, caplog):
    store = FeaturesConfig(folder=str(tmp_path / "kept"))
    expected = prepared.gradients(store=store)
    cut, flipped, *others = files_of(tmp_path / "kept")
    cut.write_bytes(cut.read_bytes()[:50])
    content = flipped.read_bytes()
    flipped.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    computed.clear()
    found = prepared.gradients(store=store)
    assert sum(computed) == 2
    assert {str(cut), str(flipped)} == {
        str(r.args[0]) for r in caplog.records if "corrupted" in r.msg
    }
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)
    assert files_of(tmp_path / "kept") == sorted([cut, flipped, *others])
    prepared.gradients(store=store)
    assert sum(computed) == 2  # they are whole again


def test_files_take_no_more_than_they_may(prepared, tmp_path, computed, caplog):
    most = 6000
    store = FeaturesConfig(folder=str(tmp_path / "kept"), gib=most / 2**30)
    first = prepared.gradients(store=store)
    kept = files_of(tmp_path / "kept")
    sizes = [path.stat().st_size for path in kept]
    assert 0 < sum(sizes) <= most
    assert "is full" in caplog.text
    n_images = sum(computed)
    computed.clear()
    again = prepared.gradients(store=store)  # those that are there count
    assert sum(computed) == n_images - len(kept) > 0
    assert files_of(tmp_path / "kept") == kept
    for name, gradient in first.items():
        torch.testing.assert_close(again[name], gradient)


def test_a_second_run_computes_nothing_and_learns_the_same(nano, tmp_path, computed):
    config = nano.replace(out=str(tmp_path / "plain"), steps=12)
    train(config)
    kept = FeaturesConfig(folder=str(tmp_path / "kept"))
    for out in ("first", "second"):
        computed.clear()
        train(config.replace(out=str(tmp_path / out), features=kept))
        # Twelve steps are two passes.
        assert sum(computed) == (len(files_of(tmp_path / "kept")) if out == "first" else 0)
    losses = [[record["loss"] for record in log_of(tmp_path / out)] for out in ("plain", "first")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert same(weights_of(tmp_path / "first"), weights_of(tmp_path / "second"))


def test_other_pixels_weights_or_types_have_files_of_their_own(nano, prepared, tmp_path, computed):
    store = FeaturesConfig(folder=str(tmp_path / "kept"))
    prepared.gradients(store=store)
    n_images = sum(computed)
    changed = [
        nano.replace(limits={"max_image_tokens": 5}),
        nano.replace(model=str(save_nano(tmp_path / "other", seed=1))),
        nano.replace(lora=LoraConfig(r=2, targets=r".*self\.query"), dtype="bfloat16"),
    ]
    for other in changed:
        computed.clear()
        Prepared(other, 8).gradients(store=store)
        assert sum(computed) == n_images


def test_a_quantised_tower_has_files_of_its_own(prepared, tmp_path):
    store, model = FeaturesConfig(folder=str(tmp_path / "kept")), prepared.backbone.model
    bases = set()
    for quantize in (None, "4bit", "8bit"):
        lora = LoraConfig(quantize=quantize)
        keep_features(model, prepared.config.replace(lora=lora, freeze=()), store)
        bases.add(model.visual.kept_features.base)
    assert len(bases) == 3


def test_what_cannot_be_kept_is_refused(tmp_path, mixed_rows, tiny_model):
    kept = FeaturesConfig(folder=str(tmp_path / "kept"))
    config = config_of(tiny_model, tmp_path / "out", mixed_rows, features=kept)
    with pytest.raises(ConfigError, match=r'freeze = \["visual"\]'):
        train(config)
    lora = LoraConfig(r=2, targets=r"visual.*attn\.proj")
    with pytest.raises(ConfigError, match="the vision tower trains"):
        train(config.replace(lora=lora))
    llava = save_llava(tmp_path / "llava")
    with pytest.raises(ConfigError, match="no vision tower whose features"):
        train(config.replace(model=str(llava), family="vlm2vec_llava_next"))
