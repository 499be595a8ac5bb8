"""Adapters: merged as the papers say, and refused when a weight lacks its partner."""

import json
import shutil

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_adapters import ALPHA, MODULES, TARGETS, adapter_weights, merged, save_adapter
from transformers import Qwen2VLModel

from mmrag.embedders import load_backbone, load_embedder
from mmrag.errors import ConfigError, ModelError
from mmrag.modeling.checkpoints import find_base

Q_PROJ = "base_model.model.model.layers.1.self_attn.q_proj"


def load(folder, **options):
    return load_backbone(folder, family="vlm2vec_v2", device="cpu", **options)


def assert_weights(backbone, expected):
    """Every weight of the decoder equals ``expected``, which has the published names."""
    actual = backbone.model.language_model.state_dict()
    for name, tensor in expected.items():
        if name.startswith("model."):
            torch.testing.assert_close(
                actual[name.removeprefix("model.")], tensor, atol=1e-5, rtol=1e-5
            )


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_merged_weights_follow_the_papers(qwen2_vl_folder, tmp_path, dora):
    weights = adapter_weights(dora)
    backbone = load(save_adapter(tmp_path / "adapter", weights, qwen2_vl_folder))
    assert_weights(backbone, merged(qwen2_vl_folder, weights))
    assert all(parameter.requires_grad for parameter in backbone.model.parameters())
    assert not any("lora" in name for name, _ in backbone.model.named_modules())


def test_rank_stabilised_scale(qwen2_vl_folder, tmp_path):
    weights = adapter_weights()
    backbone = load(save_adapter(tmp_path / "a", weights, qwen2_vl_folder, use_rslora=True))
    assert_weights(backbone, merged(qwen2_vl_folder, weights, rs=True))


@pytest.mark.parametrize(
    "prefix", ["model.language_model.", "language_model.", "language_model.model."]
)
def test_other_names_of_the_decoder(qwen2_vl_folder, tmp_path, prefix):
    weights = adapter_weights(dora=True)
    renamed = {
        key.replace("base_model.model.model.", f"base_model.model.{prefix}"): value
        for key, value in weights.items()
    }
    backbone = load(save_adapter(tmp_path / "adapter", renamed, qwen2_vl_folder))
    assert_weights(backbone, merged(qwen2_vl_folder, weights))


def test_targets_by_a_pattern_written_for_the_old_names(qwen2_vl_folder, tmp_path):
    pattern = r"model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.down_proj)"
    weights = adapter_weights()
    folder = save_adapter(tmp_path / "a", weights, qwen2_vl_folder, target_modules=pattern)
    assert_weights(load(folder), merged(qwen2_vl_folder, weights))
    fewer = {key: value for key, value in weights.items() if not key.startswith(Q_PROJ)}
    folder = save_adapter(tmp_path / "b", fewer, qwen2_vl_folder, target_modules=pattern)
    with pytest.raises(ModelError, match=r"language_model\.layers\.1\.self_attn\.q_proj"):
        load(folder)


def test_ranks_and_alphas_of_single_modules(qwen2_vl_folder, tmp_path):
    weights = adapter_weights()
    one = {key: value for key, value in adapter_weights(rank=2).items() if key.startswith(Q_PROJ)}
    module = Q_PROJ.removeprefix("base_model.model.")
    folder = save_adapter(
        tmp_path / "adapter",
        weights | one,
        qwen2_vl_folder,
        rank_pattern={module: 2},
        alpha_pattern={module: 5, "v_proj": 3},
    )
    expected = merged(qwen2_vl_folder, weights)
    expected[f"{module}.weight"] = merged(qwen2_vl_folder, weights | one, 5)[f"{module}.weight"]
    scaled = merged(qwen2_vl_folder, weights, 3)
    expected |= {key: scaled[key] for key in expected if key.endswith("v_proj.weight")}
    assert_weights(load(folder), expected)


@torch.no_grad()
def test_what_peft_saves_is_what_is_loaded(qwen2_vl_folder, tmp_path):
    model = Qwen2VLModel.from_pretrained(qwen2_vl_folder, dtype=torch.float32)
    config = LoraConfig(r=3, target_modules=["q_proj", "qkv", "fc1"], use_dora=True)
    adapted = get_peft_model(model, config).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.add_(torch.randn_like(parameter) * 0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    backbone = load(tmp_path / "adapter", base=qwen2_vl_folder)
    ids = torch.arange(100, 140)[None]
    expected = adapted(input_ids=ids).last_hidden_state
    actual = backbone.model(input_ids=ids).last_hidden_state
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def without(weights, *endings):
    return {key: value for key, value in weights.items() if not key.endswith(endings)}


PLAIN, DORA = adapter_weights(), adapter_weights(dora=True)


@pytest.mark.parametrize(
    ("weights", "config", "message"),
    [
        (without(PLAIN, "1.self_attn.q_proj.lora_B.weight"), {}, r"1\.self_attn\.q_proj\.lora_B"),
        (
            without(PLAIN, "1.self_attn.q_proj.lora_A.weight", "1.self_attn.q_proj.lora_B.weight"),
            {},
            r"not in the file: language_model\.layers\.1\.self_attn\.q_proj\.lora_A",
        ),
        (PLAIN, {"target_modules": [*TARGETS, "up_proj"]}, r"layers\.0\.mlp\.up_proj\.lora_A"),
        (PLAIN, {"use_dora": True}, r"not in the file: .*lora_magnitude_vector"),
        (DORA, {"use_dora": False}, r"no place in the model: .*lora_magnitude_vector"),
        (PLAIN, {"r": 8}, r"another shape: .*lora_A\.weight \(4, \d+\), not \(8, "),
        (
            PLAIN | {"base_model.model.lm_head.lora_A.weight": torch.zeros(4, 32)},
            {},
            r"no place in the model: lm_head\.lora_A",
        ),
        (
            PLAIN | {"base_model.model.model.embed_tokens.weight": torch.zeros(420, 32)},
            {},
            r"no place in the model: .*embed_tokens",
        ),
        (
            {key.replace("q_proj", "query"): value for key, value in PLAIN.items()},
            {},
            r"layers\.0\.self_attn\.query",
        ),
        ({key.replace("layers", "h"): value for key, value in PLAIN.items()}, {}, r"20 weights"),
        (PLAIN, {"peft_type": "IA3"}, "only LoRA and DoRA"),
        (PLAIN, {"lora_alpha": float("nan")}, "not finite"),
    ],
)
def test_a_weight_without_its_partner_is_refused(
    qwen2_vl_folder, tmp_path, weights, config, message
):
    if config.get("peft_type") == "IA3":
        config = config | {"feedforward_modules": []}
    folder = save_adapter(tmp_path / "adapter", weights, qwen2_vl_folder, **config)
    with pytest.raises(ModelError, match=message):
        load(folder)


def test_incomplete_folders_are_refused(qwen2_vl_folder, tmp_path):
    folder = save_adapter(tmp_path / "adapter", PLAIN, qwen2_vl_folder)
    (folder / "adapter_model.safetensors").write_bytes(b"broken")
    with pytest.raises(ModelError, match="header is broken"):
        load(folder)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match="there are no weights"):
        load(folder)


@pytest.mark.parametrize("field", ["lora_alpha", "r"])
def test_an_adapter_without_its_scale_is_refused(qwen2_vl_folder, tmp_path, field):
    """peft would take a default, and every weight would be scaled wrongly."""
    folder = save_adapter(tmp_path / "adapter", PLAIN, qwen2_vl_folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    del config[field]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=f"has no {field}"):
        load(folder)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer"),
        (None, "cut short"),
    ],
)
def test_damaged_weights_of_an_adapter_are_named(qwen2_vl_folder, tmp_path, data, match):
    folder = save_adapter(tmp_path / "adapter", PLAIN, qwen2_vl_folder)
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-50] if data is None else data)
    with pytest.raises(ModelError, match=match):
        load(folder)


def test_the_base_is_what_the_adapter_states_unless_another_is_given(qwen2_vl_folder, tmp_path):
    stated = save_adapter(tmp_path / "stated", PLAIN, qwen2_vl_folder)
    lost = save_adapter(tmp_path / "lost", PLAIN, tmp_path / "no such base")
    expected = merged(qwen2_vl_folder, PLAIN)
    assert_weights(load(stated), expected)
    assert_weights(load(lost, base=qwen2_vl_folder), expected)
    with pytest.raises(ModelError, match="no such base"):
        load(lost)
    assert find_base(lost, known=str(qwen2_vl_folder)) == qwen2_vl_folder
    assert find_base(stated, known="no such base either") == qwen2_vl_folder
    nameless = save_adapter(tmp_path / "x", PLAIN, "", base_model_name_or_path=None)
    with pytest.raises(ModelError, match="pass base="):
        load(nameless)


def test_options_that_do_not_fit_are_refused(qwen2_vl_folder, tmp_path):
    folder = save_adapter(tmp_path / "adapter", PLAIN, qwen2_vl_folder)
    with pytest.raises(ConfigError, match="base="):
        load(qwen2_vl_folder, base=folder)
    with pytest.raises(ModelError, match="Pass family="):
        load_backbone(folder, device="cpu")


def test_the_marker_of_an_adapter_tells_its_family(qwen2_vl_folder, tmp_path):
    folder = save_adapter(tmp_path / "adapter", PLAIN, qwen2_vl_folder)
    (folder / "mmrag.json").write_text(json.dumps({"family": "gme", "max_length": 77}))
    backbone = load_backbone(folder, device="cpu")
    assert backbone.family == "gme"
    assert backbone.recipe.max_length == 77


def test_the_fingerprint_covers_base_weights_and_adapter(qwen2_vl_folder, tmp_path):
    other_base = shutil.copytree(qwen2_vl_folder, tmp_path / "base")
    weights = load_file(other_base / "model.safetensors")
    weights["model.norm.weight"] += 0.5
    save_file(weights, other_base / "model.safetensors", metadata={"format": "pt"})
    folders = [
        (save_adapter(tmp_path / "one", PLAIN, qwen2_vl_folder), None),
        (tmp_path / "one", other_base),
        (save_adapter(tmp_path / "two", adapter_weights(seed=2), qwen2_vl_folder), None),
        (save_adapter(tmp_path / "three", PLAIN, qwen2_vl_folder, lora_alpha=ALPHA + 1), None),
        (qwen2_vl_folder, None),
    ]
    prints = [
        load_embedder(folder, family="vlm2vec_v2", device="cpu", base=base).fingerprint
        for folder, base in folders
    ]
    again = load_embedder(tmp_path / "one", family="vlm2vec_v2", device="cpu").fingerprint
    assert len(set(prints)) == len(prints)
    assert again == prints[0]


def test_a_sharded_base_and_a_pickled_adapter(qwen2_vl_folder, tmp_path):
    base = shutil.copytree(qwen2_vl_folder, tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {}}
    for number, rest in enumerate((0, 1)):
        name = f"model-0000{number + 1}-of-00002.safetensors"
        part = {key: weights[key] for key in sorted(weights)[rest::2]}
        save_file(part, base / name, metadata={"format": "pt"})
        index["weight_map"] |= dict.fromkeys(part, name)
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    folder = save_adapter(tmp_path / "adapter", PLAIN, base)
    (folder / "adapter_model.safetensors").unlink()
    torch.save(PLAIN, folder / "adapter_model.bin")
    assert_weights(load(folder), merged(qwen2_vl_folder, PLAIN))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(qwen2_vl_folder, tmp_path, dtype):
    folder = save_adapter(tmp_path / "adapter", DORA, qwen2_vl_folder)
    texts = [f"sentence number {number} about a page" for number in range(5)]
    vectors = [
        load_embedder(folder, family="vlm2vec_v2", device="cpu", dtype=name).encode(texts)
        for name in ("float32", dtype)
    ]
    assert (np.multiply(*vectors).sum(axis=1) > 0.99).all()


def test_modules_of_the_tiny_adapter_are_those_of_the_model(qwen2_vl_folder):
    assert {f"{module}.weight" for module in MODULES} <= set(
        load_file(qwen2_vl_folder / "model.safetensors")
    )
