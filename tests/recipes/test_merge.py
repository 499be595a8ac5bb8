"""Merging: each method against its formula in numpy, and the folder that comes out."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import save_qwen2_vl
from tiny_adapters import adapter_weights, merged, save_adapter
from tiny_nano import save_nano

from mmrag.embedders import load_backbone, load_embedder
from mmrag.errors import ConfigError, ModelError
from mmrag_recipes.__main__ import main
from mmrag_recipes.config_models import LearnConfig, MergeConfig
from mmrag_recipes.merge import merge, weights_of
from mmrag_recipes.merge_fit import Coefficients, learn
from mmrag_recipes.options import build
from mmrag_recipes.task_vectors import slerp_tensors, task_vector

TEXTS = ["find the page", "an answer"]


def tuned(base, out, seed):
    """The base with noise on the weights of its first layer, as fine-tuning leaves it."""
    save_nano(out)
    weights = load_file(base / "model.safetensors")
    chance = torch.Generator().manual_seed(seed)
    for name, value in weights.items():
        if name.startswith("encoder.layer.0"):
            value += 0.1 * torch.randn(value.shape, generator=chance)
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    return out


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    base = save_nano(folder / "base")
    return base, tuned(base, folder / "one", 1), tuned(base, folder / "two", 2)


@pytest.fixture
def in_one_process(monkeypatch):
    """Without the check in a fresh process, which takes seconds and has its own tests."""
    monkeypatch.setattr("mmrag_recipes.merge.check_in_fresh_process", lambda *_: None)


def arrays(folder):
    return {k: v.double().numpy() for k, v in load_file(folder / "model.safetensors").items()}


def linear(base, one, two):
    return (3 * one + two) / 4


def task(base, one, two):
    return base + 0.5 * (one - base) - 0.25 * (two - base)


def arc(base, one, two):
    a, b = one - base, two - base
    if not a.any():
        return base
    omega = np.arccos((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))
    return base + (np.sin(0.75 * omega) * a + np.sin(0.25 * omega) * b) / np.sin(omega)


def trimmed_mean(base, one, two):
    """TIES by the paper's three steps, a weight at a time."""
    kept = []
    for delta in (one - base, two - base):
        count = int(0.3 * delta.size)
        largest = np.argsort(-np.abs(delta).ravel(), kind="stable")[:count]
        flat = np.zeros(delta.size)
        flat[largest] = delta.ravel()[largest]
        kept.append(flat)
    result = np.zeros(base.size)
    for entry in range(base.size):
        values = [flat[entry] for flat in kept if flat[entry] != 0]
        sign = 1 if sum(values) >= 0 else -1
        agreeing = [value for value in values if value * sign > 0]
        result[entry] = 2 * sum(agreeing) / len(agreeing) if agreeing else 0
    return base + result.reshape(base.shape)


@pytest.mark.parametrize(
    ("options", "formula"),
    [
        ({"method": "linear", "weights": (3, 1)}, linear),
        ({"method": "task", "weights": (0.5, -0.25)}, task),
        ({"method": "slerp", "weights": (3, 1)}, arc),
        ({"method": "ties", "weights": (2, 2), "density": 0.3}, trimmed_mean),
    ],
)
def test_each_method_is_its_formula(models, tmp_path, options, formula, in_one_process):
    base, *names = models
    config = MergeConfig(
        models=tuple(map(str, names)),
        base=str(base),
        out=tmp_path / "m",
        dtype="float32",
        **options,
    )
    result, parts = arrays(merge(config)), [arrays(folder) for folder in models]
    for name, value in result.items():
        np.testing.assert_allclose(value, formula(*(p[name] for p in parts)), atol=2e-6)
    changed = [name for name in result if not np.array_equal(result[name], parts[0][name])]
    assert changed
    assert all(name.startswith("encoder.layer.0") for name in changed)


def test_the_folder_is_another_model_and_states_its_parents(models, tmp_path):
    base, one, two = models
    words = ["merge", str(one), str(two), "--base", str(base), "--out", str(tmp_path / "m")]
    main(words)
    found = load_embedder(tmp_path / "m", device="cpu")
    before = [load_embedder(folder, device="cpu") for folder in models]
    assert found.fingerprint not in {embedder.fingerprint for embedder in before}
    assert ((found.encode(TEXTS) * before[0].encode(TEXTS)).sum(1) < 0.9999).all()
    about = json.loads((tmp_path / "m" / "mmrag.json").read_text())["merged"]
    assert [parent["name"] for parent in about["parents"]] == [str(one), str(two)]
    assert about["weights"] == [0.5, 0.5]
    assert len({parent["fingerprint"] for parent in about["parents"]}) == 2
    assert str(one) in (tmp_path / "m" / "README.md").read_text()


def test_adapters_are_merged_on_their_base(tiny_model, tmp_path, in_one_process):
    parts = [adapter_weights(seed=seed) for seed in (1, 2)]
    names = [str(save_adapter(tmp_path / f"{n}", part, "nowhere")) for n, part in enumerate(parts)]
    config = MergeConfig(
        models=tuple(names), base=str(tiny_model), out=tmp_path / "m", family="gme", dtype="float32"
    )
    whole = merge(config)
    mean = {
        name: (value + other) / 2
        for (name, value), other in zip(
            merged(tiny_model, parts[0]).items(), merged(tiny_model, parts[1]).values(), strict=True
        )
    }
    expected = save_qwen2_vl(tmp_path / "expected", seed=3)
    save_file(mean, expected / "model.safetensors", metadata={"format": "pt"})
    ours = load_embedder(whole, device="cpu").encode(TEXTS)
    theirs = load_embedder(expected, family="gme", device="cpu").encode(TEXTS)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    plain = load_embedder(tiny_model, family="gme", device="cpu").encode(TEXTS)
    assert ((ours * plain).sum(1) < 0.999).all()


def test_what_is_no_fine_tuning_of_the_base_is_refused(models, tiny_model, tmp_path):
    base, one, _ = models

    def merging(*names, **options):
        values = {"models": [str(n) for n in names], "base": str(base), "out": str(tmp_path / "m")}
        return merge(build(MergeConfig, values | options, "test"))

    with pytest.raises(ModelError, match=r"family is gme, that of the base nano|model_type"):
        merging(one, tiny_model)
    wider = save_nano(tmp_path / "wider")
    config = json.loads((wider / "config.json").read_text())
    (wider / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    weights = load_file(wider / "model.safetensors")
    fewer = {n: v for n, v in weights.items() if not n.startswith("encoder.layer.1")}
    save_file(fewer, wider / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"weights are not in the file: encoder\.layer\.1"):
        merging(one, wider)
    broken = save_nano(tmp_path / "broken")
    weights["encoder.layer.0.attention.self.query.weight"][0, 0] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="not finite"):
        merging(one, broken)
    adapter = save_adapter(tmp_path / "adapter", adapter_weights(), tiny_model)
    with pytest.raises(ConfigError, match="is an adapter"):
        merging(one, one, base=str(adapter))
    with pytest.raises(ConfigError, match="is one of the models"):
        merging(one, one, out=str(one))
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weights": [1.0]}, "1 weights for 2 models"),
        ({"weights": [1.0, -1.0]}, "shares"),
        ({"method": "slerp", "models": ["a", "b", "c"]}, "two models"),
        ({"method": "learned"}, "go together"),
        ({"learn": {"rows": "r"}}, "go together"),
    ],
)
def test_options_that_contradict_each_other_are_told(options, words):
    values = {"models": ["a", "b"], "base": "c", "out": "d"} | options
    with pytest.raises(ConfigError, match=words):
        build(MergeConfig, values, "test")


def test_an_arc_between_parallel_vectors_is_the_line():
    one = torch.tensor([3.0, 4.0])
    for other in (2 * one, -one, torch.zeros(2)):
        assert torch.allclose(slerp_tensors(one, other, 0.25), 0.75 * one + 0.25 * other)
    quarter = slerp_tensors(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), 0.5)
    assert torch.allclose(quarter, torch.full((2,), 0.5**0.5))


def test_the_gradient_of_the_coefficients_is_that_of_differences(models):
    """Against central differences of a function of the merged weights."""
    base, *names = models
    loaded = [load_backbone(folder, device="cpu") for folder in (base, *names)]
    weights = weights_of(loaded[0])
    vectors = [task_vector(weights, weights_of(one)) for one in loaded[1:]]
    groups = ("encoder.layer.0.attention",)

    def value(coefficients):
        added = Coefficients(coefficients, groups).apply(vectors)
        return sum((weights[n].double() + v.double()).pow(3).sum() for n, v in added.items())

    at = torch.tensor([[0.2, 0.5], [0.7, -0.1]])
    found = Coefficients(at, groups)
    slopes = {n: 3 * (weights[n] + v).pow(2) for n, v in found.apply(vectors).items()}
    gradient = found.gradient(vectors, slopes)
    for row, column in ((0, 0), (0, 1), (1, 0), (1, 1)):
        shift = torch.zeros(2, 2)
        shift[row, column] = 1e-3
        slope = (value(at + shift) - value(at - shift)) / 2e-3
        assert float(gradient[row, column]) == pytest.approx(float(slope), rel=1e-2)


def test_coefficients_are_learned_towards_the_model_that_serves_the_rows(
    models, text_rows, tmp_path, in_one_process
):
    """One parent is the base itself: nothing to add. The other was spoilt and is turned down."""
    base, _, _ = models
    spoilt = tuned(base, tmp_path / "spoilt", 5)
    learning = LearnConfig(rows=str(text_rows), steps=6, batch_size=8, lr=0.1, temperature=0.1)
    options = MergeConfig(
        models=(str(spoilt), str(base)),
        base=str(base),
        out=tmp_path / "m",
        method="learned",
        learn=learning,
        dtype="float32",
        device="cpu",
    )
    backbone = load_backbone(base, device="cpu")
    weights = weights_of(backbone)
    vectors = [task_vector(weights, weights_of(load_backbone(spoilt, device="cpu"))), {}]
    values = learn(backbone, vectors, options, learning).values
    assert values[0] != 0.5
    # What adds nothing has no gradient.
    assert values[1] == 0.5
    merge(options)
    about = json.loads((tmp_path / "m" / "mmrag.json").read_text())["merged"]
    assert about["coefficients"]["all"] == pytest.approx(values[:, 0].tolist(), abs=1e-4)
    grouped = learning.replace(groups=("nothing",))
    with pytest.raises(ConfigError, match="no merged weight begins with 'nothing'"):
        learn(backbone, vectors, options, grouped)
