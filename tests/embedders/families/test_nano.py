"""The nano family: exact against its parts as transformers runs them, on a tiny checkpoint."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_nano import save_nano
from transformers import AutoTokenizer, BertModel
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

from mmrag.content import Content
from mmrag.embedders import load_backbone, load_embedder
from mmrag.embedders.saving import save_checkpoint
from mmrag.errors import ContentError, ModelError
from mmrag.modeling.backbone import inputs_of
from mmrag.modeling.image_rule import read_image_rule
from mmrag.modeling.qwen_images import resize, to_patches
from mmrag.testing import check_embedder

TEXTS = ["a cat", "Which plan pays for glasses?", "", "words " * 300]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_nano(tmp_path_factory.mktemp("nano") / "tiny")


@pytest.fixture(scope="module")
def embedder(folder):
    return load_embedder(folder, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def page():
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 255, (90, 130, 3), dtype=np.uint8))


def unit(vector):
    return vector / np.linalg.norm(vector)


def independent_text(folder, text):
    """Mean of BERT's last states, one text at a time; plain transformers reads the folder."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = BertModel.from_pretrained(folder, add_pooling_layer=False, dtype=torch.float32).eval()
    inputs = tokenizer(text, return_tensors="pt", truncation=True, max_length=512)
    states = model(**inputs).last_hidden_state[0]
    return unit(states.mean(0).detach().numpy())


def independent_image(folder, image):
    """The readout of the tower's tokens, written out with the numbers of the file."""
    weights = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    tower = Qwen2VisionTransformerPretrainedModel(Qwen2VLVisionConfig(**config["vision_config"]))
    prefix = "visual."
    own = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    tower.load_state_dict(own)
    rule = read_image_rule(folder)
    patches, grid = to_patches(resize(image, rule.size(*image.size)), rule)
    tokens = tower.eval()(patches, grid_thw=torch.tensor([grid])).pooler_output.detach().numpy()

    def linear(name, x):
        weight, bias = (weights[f"readout.{name}.{part}"].numpy() for part in ("weight", "bias"))
        return x @ weight.T + bias

    gate = linear("gate_proj", tokens)
    units = gate / (1 + np.exp(-gate)) * linear("up_proj", tokens)
    return unit(linear("down_proj", units).sum(0))


def test_text_is_the_mean_of_berts_states(embedder, folder):
    together = embedder.encode(TEXTS)
    for text, vector in zip(TEXTS, together, strict=True):
        assert vector @ independent_text(folder, text) > 0.99999


def test_image_is_the_sum_of_what_its_tokens_add(embedder, folder, page):
    other = page.crop((0, 0, 60, 90))
    vectors = embedder.encode([Content(image=page), Content(image=other)])
    for image, vector in zip((page, other), vectors, strict=True):
        assert vector @ independent_image(folder, image) > 0.99999


def test_text_and_image_together_are_the_sum_of_both(embedder, folder, page):
    (vector,) = embedder.encode([Content("a cat", page)])
    both = independent_text(folder, "a cat") + independent_image(folder, page)
    assert vector @ unit(both) > 0.99999


def test_instructions_change_nothing(embedder):
    plain, asked = embedder.encode(TEXTS), embedder.encode(TEXTS, "page_for_question")
    assert np.array_equal(plain, asked)


def test_embedder_keeps_the_contract(embedder):
    check_embedder(embedder)


def test_cost_is_what_is_prepared(embedder, page):
    backbone = embedder.backbone
    for content in (Content("a cat"), Content(image=page), Content("a cat", page)):
        item = inputs_of(backbone, content, None)
        assert backbone.plan(content, None).n_tokens == item.n_tokens
    assert inputs_of(backbone, Content("words " * 300), None).n_tokens == 512


def test_more_than_one_image_is_refused(embedder, page):
    with pytest.raises(ContentError, match="1 image"):
        embedder.encode([Content(image=[page, page])])


def test_folder_says_what_it_prefers(embedder):
    assert embedder.prefers_text
    assert embedder.prefers_passages


def test_limits_move_the_fingerprint(embedder, folder):
    short = load_embedder(folder, device="cpu", dtype="float32", max_length=64)
    assert short.fingerprint != embedder.fingerprint
    assert inputs_of(short.backbone, Content("words " * 300), None).n_tokens == 64


def test_missing_and_unknown_weights_are_named(folder, tmp_path):
    broken = save_nano(tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["readout.other"] = weights.pop("readout.up_proj.bias")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"readout\.up_proj\.bias.*readout\.other"):
        load_embedder(broken, device="cpu")


def test_saved_folder_gives_the_same_vectors(folder, tmp_path, embedder, page):
    backbone = load_backbone(folder, device="cpu", dtype="float32")
    save_checkpoint(backbone, folder, tmp_path / "saved")
    contents = [*map(Content, TEXTS), Content(image=page)]
    saved = load_embedder(tmp_path / "saved", device="cpu", dtype="float32")
    np.testing.assert_allclose(saved.encode(contents), embedder.encode(contents), atol=1e-6)
    assert saved.prefers_passages


def test_gradients_reach_text_and_image(folder, page):
    backbone = load_backbone(folder, device="cpu", dtype="float32")
    batch = [inputs_of(backbone, c, None) for c in (Content("a cat"), Content(image=page))]
    # Not of the vectors themselves: they have length 1, whatever the weights.
    (backbone.forward(batch) * torch.arange(32)).sum().backward()
    for name in ("embeddings.word_embeddings", "visual.blocks.0.attn.qkv", "readout.down_proj"):
        grad = backbone.model.get_parameter(f"{name}.weight").grad
        assert grad is not None
        assert grad.abs().sum() > 0
