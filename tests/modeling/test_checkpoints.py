"""Loading checkpoints: what is missing, foreign or damaged is refused, and nothing is made up."""

import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import save_qwen2_5_vl
from tiny_qwen3 import save_qwen3_vl

from mmrag.content import Content
from mmrag.embedders import all_families, load_embedder
from mmrag.errors import ConfigError, ModelError
from mmrag.modeling import loading
from mmrag.modeling.checkpoints import check_weight_files, fingerprint
from mmrag.modeling.loading import is_out_of_memory, place

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"


@pytest.fixture
def copy(qwen2_vl_folder, tmp_path):
    """A checkpoint that a test may spoil."""
    return shutil.copytree(qwen2_vl_folder, tmp_path / "copy")


def load(folder, **options):
    return load_embedder(folder, family="gme", device="cpu", **options)


def edit(path, **fields):
    described = json.loads(path.read_text())
    path.write_text(json.dumps({**described, **fields}))


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("config.json", None, "config.json is missing"),
        ("config.json", b"{}", "config.json is missing or empty"),
        ("config.json", b"{", "not valid JSON"),
        ("config.json", POINTER, "git-lfs pointer"),
        ("tokenizer.json", None, "tokenizer.json is missing"),
        ("tokenizer.json", b"", "not valid JSON"),
        ("tokenizer.json", b"{}", "tokenizer files are broken"),
        ("tokenizer.json", POINTER, "git-lfs pointer"),
        ("preprocessor_config.json", None, "preprocessor_config.json is missing"),
        ("model.safetensors", None, "there are no weights"),
        ("model.safetensors", b"", "the file is empty"),
        ("model.safetensors", POINTER, "git-lfs pointer"),
        ("model.safetensors", b"\x10" + b"\0" * 7 + b"not a header at all", "header is broken"),
    ],
)
def test_a_file_that_is_missing_or_damaged_is_named(copy, name, content, match):
    path = copy / name
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    with pytest.raises(ModelError, match=match):
        load(copy)


def test_weights_cut_short_are_refused(copy):
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match="cut short"):
        load(copy)


def test_a_missing_shard_is_named(copy):
    (copy / "model.safetensors").rename(copy / "model-00001-of-00002.safetensors")
    table = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    with pytest.raises(ModelError, match=r"model-00002-of-00002\.safetensors"):
        check_weight_files(copy)


class Trap:
    def __reduce__(self):
        return (print, ("code of the checkpoint ran",))


@pytest.mark.parametrize("spoil", ["code", "text", "empty"])
def test_a_bin_file_is_loaded_safely_or_not_at_all(copy, spoil, capsys):
    weights = load_file(copy / "model.safetensors")
    torch.save(weights, copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    assert load(copy).dim == 32
    if spoil == "code":
        torch.save({**weights, "trap": Trap()}, copy / "pytorch_model.bin")
    else:
        data = b"" if spoil == "empty" else pickle.dumps("text")[:-3]
        (copy / "pytorch_model.bin").write_bytes(data)
    with pytest.raises(ModelError) as error:
        load(copy)
    assert "weights_only" not in str(error.value)
    assert "ran" not in capsys.readouterr().out


def test_another_architecture_is_refused(tmp_path):
    with pytest.raises(ModelError, match="this family needs 'qwen2_vl'"):
        load(save_qwen3_vl(tmp_path / "tiny"))
    with pytest.raises(ModelError, match="this family needs 'qwen2_vl'"):
        load(save_qwen2_5_vl(tmp_path / "other"))


def test_a_configuration_of_a_larger_model_allocates_nothing(copy, monkeypatch):
    """A missing field becomes its default: the sizes of a model of many gigabytes."""
    described = json.loads((copy / "config.json").read_text())
    for field in ("hidden_size", "intermediate_size", "num_hidden_layers"):
        del described[field]
    (copy / "config.json").write_text(json.dumps(described))
    allocated = []
    empty_like = torch.empty_like

    def spy(tensor, **options):
        allocated.append(empty_like(tensor, **options))
        return allocated[-1]

    monkeypatch.setattr(torch, "empty_like", spy)
    with pytest.raises(ModelError, match=r"not in the file|another shape"):
        load(copy)
    assert all(tensor.device.type == "meta" for tensor in allocated)


def test_a_quantised_checkpoint_is_refused(copy):
    edit(copy / "config.json", quantization_config={"quant_method": "bitsandbytes"})
    with pytest.raises(ModelError, match="stored quantised"):
        load(copy)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(copy, value):
    weights = load_file(copy / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"not finite: .*up_proj"):
        load(copy)


def test_the_tokenizer_of_another_model_is_refused(copy, tmp_path):
    """Other ids for the image's token: every image had the vector of its text."""
    described = json.loads((copy / "tokenizer.json").read_text())
    swap = {"<|image_pad|>": "<|video_pad|>", "<|video_pad|>": "<|image_pad|>"}
    for token in described["added_tokens"]:
        token["content"] = swap.get(token["content"], token["content"])
    vocabulary = described["model"]["vocab"]
    a, b = (vocabulary[token] for token in swap)
    vocabulary["<|image_pad|>"], vocabulary["<|video_pad|>"] = b, a
    (copy / "tokenizer.json").write_text(json.dumps(described))
    with pytest.raises(ModelError, match="tokenizer of another model"):
        load(copy)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(copy):
    described = json.loads((copy / "tokenizer.json").read_text())
    start = len(described["model"]["vocab"])
    described["model"]["vocab"] |= {f"zz{n}": start + n for n in range(500)}
    (copy / "tokenizer.json").write_text(json.dumps(described))
    with pytest.raises(ModelError, match="tokenizer of another model"):
        load(copy)


def test_a_tokenizer_without_vocabulary_is_refused(copy):
    """As transformers makes one up where the files are missing."""
    described = json.loads((copy / "tokenizer.json").read_text())
    keep = {token["content"] for token in described["added_tokens"]}
    vocabulary = described["model"]["vocab"]
    described["model"]["vocab"] = {k: v for k, v in vocabulary.items() if k in keep}
    described["model"]["merges"] = []
    (copy / "tokenizer.json").write_text(json.dumps(described))
    with pytest.raises(ModelError, match="no vocabulary"):
        load(copy)


def test_an_unknown_checkpoint_is_refused_with_the_families(qwen2_vl_folder):
    with pytest.raises(ModelError) as error:
        load_embedder(qwen2_vl_folder, device="cpu")
    assert "qwen2_vl" in str(error.value)
    assert all(family in str(error.value) for family in all_families())


@pytest.mark.parametrize("name", ["llamaindex/vdr-2b-multi-v1", "vdr-2b-v1", "mcdse-2b-v1"])
def test_the_kin_of_dse_are_known(qwen2_vl_folder, tmp_path, name):
    folder = shutil.copytree(qwen2_vl_folder, tmp_path / name.rpartition("/")[2])
    embedder = load_embedder(folder, device="cpu")
    assert embedder.family == ("mcdse" if "mcdse" in name else "vdr")
    end = "<|im_end|>\n<|endoftext|>"
    texts = embedder.backbone.tokenizer.decode(embedder.backbone.plan(Content("wind"), "").ids)
    assert texts.endswith(f"<|vision_end|>Query: wind{end}")
    assert "assistant" not in texts.rpartition("<|im_start|>")[2]
    most = {"vdr": 768, "mcdse": 960}[embedder.family]
    assert embedder.backbone.rule.max_pixels == most * 28 * 28


def test_the_fingerprint_follows_all_that_moves_vectors(copy):
    before = load(copy).fingerprint
    assert load(copy).fingerprint == before
    assert load(copy, dtype="bfloat16").fingerprint != before
    assert load(copy, max_length=99).fingerprint != before
    (copy / "README.md").write_text("changed")
    assert load(copy).fingerprint == before
    for name, field in (
        ("config.json", {"rms_norm_eps": 1e-5}),
        ("preprocessor_config.json", {"image_mean": [0.5, 0.5, 0.5]}),
        ("tokenizer_config.json", {"eos_token": "<|endoftext|>"}),
    ):
        original = (copy / name).read_bytes()
        edit(copy / name, **field)
        assert load(copy).fingerprint != before, name
        (copy / name).write_bytes(original)
    assert load(copy).fingerprint == before


@pytest.mark.parametrize("device", ["cuda:7", "cuda", "meta", "xla"])
def test_a_device_that_is_not_here_is_refused(device):
    if device.startswith("cuda") and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(ConfigError, match="device="):
        place(device)


def test_quantised_loading_and_several_devices_are_checked(qwen2_vl_folder, monkeypatch):
    from transformers.utils import import_utils

    with pytest.raises(ConfigError, match="8bit, 4bit, 4bit-double"):
        load(qwen2_vl_folder, quantize="2bit")
    with pytest.raises(ConfigError, match="leave out device"):
        load(qwen2_vl_folder, device_map="auto")
    with pytest.raises(ConfigError, match="device_map='cpu'"):
        load_embedder(qwen2_vl_folder, family="gme", device_map="cpu")
    monkeypatch.setattr(import_utils, "is_bitsandbytes_available", lambda **_: False)
    monkeypatch.setattr("transformers.utils.is_bitsandbytes_available", lambda **_: False)
    with pytest.raises(ConfigError, match=r"pip install 'mmrag\[quantized\]'"):
        load(qwen2_vl_folder, quantize="4bit")


def test_device_map_gives_the_same_vectors(qwen2_vl_folder, monkeypatch):
    contents = ["a text", Image.new("RGB", (60, 90), "red")]
    spread = load_embedder(qwen2_vl_folder, family="gme", dtype="float32", device_map="auto")
    np.testing.assert_allclose(
        spread.encode(contents), load(qwen2_vl_folder).encode(contents), atol=1e-5
    )


def test_quantised_loading_asks_transformers_for_it(monkeypatch):
    monkeypatch.setattr("transformers.utils.is_bitsandbytes_available", lambda **_: True)
    for way in ("8bit", "4bit", "4bit-double"):
        placement = place("cpu", "bfloat16", quantize=way)
        options = loading._distribution(placement)
        assert options["quantization_config"].load_in_8bit == (way == "8bit")
        assert options["quantization_config"].load_in_4bit == (way != "8bit")
        double = options["quantization_config"].bnb_4bit_use_double_quant
        assert double == (way == "4bit-double")
        assert options["device_map"] == {"": torch.device("cpu")}


def test_a_model_larger_than_the_memory_is_an_error_of_ours(copy, monkeypatch):
    def fails(*args, **options):
        if "output_loading_info" in options:
            return original(*args, **options)
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 289 GB")

    from transformers import Qwen2VLModel

    original = Qwen2VLModel.from_pretrained
    monkeypatch.setattr(Qwen2VLModel, "from_pretrained", fails)
    with pytest.raises(ModelError, match="does not fit in memory"):
        load(copy)
    assert not is_out_of_memory(ValueError("out of memory"))


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
