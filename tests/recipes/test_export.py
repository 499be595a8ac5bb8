"""T8: what is exported loads elsewhere with the vectors of the run, or fails loudly."""

import numpy as np
import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_adapters import adapter_weights, save_adapter
from tiny_llava import save_mm_embed, save_phi3v
from transformers import AutoTokenizer, Qwen2VLModel

from mmrag.content import Content
from mmrag.embedders import load_backbone, load_embedder
from mmrag.embedders.saving import save_checkpoint
from mmrag.errors import ConfigError, ModelError
from mmrag_recipes.config import DataConfig, LoraConfig, TrainConfig
from mmrag_recipes.export import (
    check_in_fresh_process,
    export,
    load_trained,
    probe_vectors,
    write_adapter,
)
from mmrag_recipes.train import train


@pytest.fixture(scope="module")
def run(tiny_model, mixed_rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    config = TrainConfig(
        model=str(tiny_model),
        family="gme",
        out=str(folder),
        data=(DataConfig(rows=str(mixed_rows)),),
        steps=4,
        batch_size=4,
        lr=0.02,
        lora=LoraConfig(r=4),
        device="cpu",
    )
    train(config)
    return folder


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    return export(run, tmp_path_factory.mktemp("out") / "adapted", dtype="float32")


IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (56, 84, 3), dtype=np.uint8))
CONTENTS = [Content("find the page"), Content(image=IMAGE), Content("both", IMAGE)]


def test_training_changed_the_vectors_and_export_kept_the_change(run, exported, tiny_model):
    before = load_embedder(tiny_model, family="gme", device="cpu").encode(CONTENTS)
    after = load_embedder(exported, device="cpu").encode(CONTENTS)
    assert ((before * after).sum(axis=1) < 0.999).all()
    backbone, _ = load_trained(run)
    expected = probe_vectors(exported, backbone)
    assert ((probe_vectors(exported) * expected).sum(axis=1) > 0.9999).all()


def test_plain_transformers_loads_it(exported):
    model, info = Qwen2VLModel.from_pretrained(exported, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    tokenizer = AutoTokenizer.from_pretrained(exported)
    prompt = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "find the page<|im_end|>\n<|im_start|>assistant\n<|endoftext|>"
    )
    with torch.no_grad():
        states = model(**tokenizer(prompt, return_tensors="pt")).last_hidden_state
    vector = states[0, -1].numpy()
    ours = load_embedder(exported, device="cpu").encode(["find the page"])[0]
    assert vector @ ours / np.linalg.norm(vector) > 0.9999


def test_sentence_transformers_loads_it(exported):
    module = pytest.importorskip("sentence_transformers")
    model = module.SentenceTransformer(str(exported), device="cpu", trust_remote_code=True)
    inputs = ["find the page", IMAGE, {"text": "both", "image": IMAGE}]
    theirs = np.stack([model.encode(value) for value in inputs])
    ours = load_embedder(exported, device="cpu").encode(CONTENTS)
    assert ((theirs * ours).sum(axis=1) > 0.9999).all()
    asked = model.encode("find the page", prompt="Find a page.")
    told = load_embedder(exported, device="cpu").encode(["find the page"], "Find a page.")[0]
    assert asked @ told > 0.9999


def test_the_card_names_data_and_licenses(exported):
    card = (exported / "README.md").read_text()
    assert "| rows | 24 | not stated | not stated |" in card
    assert "LoRA of rank 4" in card


def test_a_missing_trained_weight_is_an_error_with_its_name(run, tmp_path):
    final = tmp_path / "final"
    final.mkdir()
    weights = load_file(run / "final/trained.safetensors")
    name = next(iter(weights))
    del weights[name]
    save_file(weights, final / "trained.safetensors")
    (final / "config.json").write_text((run / "final/config.json").read_text())
    with pytest.raises(ModelError, match=name.replace(".", r"\.")[:60]):
        load_trained(tmp_path)


def test_other_vectors_after_reloading_are_an_error(exported):
    wrong = np.roll(probe_vectors(exported), 1, axis=0)
    with pytest.raises(ModelError, match="reloaded vectors differ"):
        check_in_fresh_process(exported, wrong)


def test_an_unfinished_run_is_an_error(tmp_path):
    with pytest.raises(ModelError, match="let the training finish"):
        load_trained(tmp_path)


@pytest.mark.parametrize(
    ("family", "save"), [("mm_embed", save_mm_embed), ("vlm2vec_phi3v", save_phi3v)]
)
def test_models_that_transformers_does_not_have_load_again(tmp_path, family, save):
    source = save(tmp_path / "source")
    backbone = load_backbone(source, family=family, device="cpu")
    for parameter in backbone.model.parameters():
        parameter.data.mul_(1.05)
    save_checkpoint(backbone, source, tmp_path / "out", dtype=torch.float16)
    expected = probe_vectors(source, backbone)
    assert ((probe_vectors(tmp_path / "out") * expected).sum(axis=1) > 0.9999).all()


def test_a_run_that_began_at_an_adapter_is_exported_whole(tiny_model, text_rows, tmp_path):
    adapter = save_adapter(tmp_path / "adapter", adapter_weights(), tiny_model)
    config = TrainConfig(
        model=str(adapter),
        family="gme",
        out=str(tmp_path / "run"),
        data=(DataConfig(rows=str(text_rows)),),
        steps=1,
        batch_size=4,
        device="cpu",
    )
    train(config)
    out = export(tmp_path / "run", tmp_path / "out", dtype="float32")
    assert not (out / "adapter_config.json").exists()
    assert (out / "tokenizer.json").is_file()


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_in_pefts_layout_gives_the_same_vectors(tiny_model, text_rows, tmp_path, dora):
    config = TrainConfig(
        model=str(tiny_model),
        family="gme",
        out=str(tmp_path / "run"),
        data=(DataConfig(rows=str(text_rows)),),
        steps=2,
        batch_size=4,
        lr=0.02,
        lora=LoraConfig(r=4, dora=dora),
        device="cpu",
        report=(),
    )
    train(config)
    adapter = write_adapter(tmp_path / "run", tmp_path / "adapter")
    merged, _ = load_trained(tmp_path / "run")
    expected = probe_vectors("merged", merged)
    ours = load_backbone(adapter, family="gme", base=tiny_model, device="cpu", dtype="float32")
    assert ((probe_vectors("adapter", ours) * expected).sum(axis=1) > 0.9999).all()
    plain = load_backbone(tiny_model, family="gme", device="cpu", dtype="float32")
    assert ((probe_vectors("base", plain) * expected).sum(axis=1) < 0.999).all()
    plain.model = PeftModel.from_pretrained(plain.model, str(adapter)).merge_and_unload()
    assert ((probe_vectors("peft", plain) * expected).sum(axis=1) > 0.9999).all()


def test_a_run_without_an_adapter_has_none_to_write(tiny_model, text_rows, tmp_path):
    data = (DataConfig(rows=str(text_rows)),)
    options = {"family": "gme", "data": data, "steps": 1, "batch_size": 4, "device": "cpu"}
    train(TrainConfig(model=str(tiny_model), out=str(tmp_path / "run"), **options))
    with pytest.raises(ConfigError, match="trained all weights"):
        write_adapter(tmp_path / "run", tmp_path / "adapter")
