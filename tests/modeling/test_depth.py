"""Fewer layers of a decoder: vectors of an inner layer, and what is refused."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import save_qwen2_vl
from tiny_llava import save_llava, save_mm_embed, save_phi3v
from tiny_qwen3 import save_qwen3_vl, save_wemm
from transformers import AutoTokenizer, Qwen2VLModel

from mmrag import UniversalEmbedding
from mmrag.content import Content
from mmrag.embedders import load_backbone, load_embedder
from mmrag.errors import ConfigError
from mmrag.modeling.backbone import inputs_of
from mmrag.modeling.depth import keep_layers
from mmrag_recipes.depths import inner_vectors

PROMPT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    "find the page<|im_end|>\n<|im_start|>assistant\n<|endoftext|>"
)
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (84, 56, 3), dtype=np.uint8))
CONTENTS = [Content("find the page"), Content(image=PICTURE), Content("both", PICTURE)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = save_qwen2_vl(tmp_path_factory.mktemp("depth") / "tiny", seed=2)
    (folder / "mmrag.json").write_text(
        json.dumps({"family": "gme", "matryoshka_layers": [[1, 8], [1, 16]]})
    )
    return folder


def test_a_cut_model_gives_the_normed_state_of_its_last_layer(folder):
    model = Qwen2VLModel.from_pretrained(folder).eval()
    tokens = AutoTokenizer.from_pretrained(folder)(PROMPT, return_tensors="pt")
    with torch.no_grad():
        states = model(**tokens, output_hidden_states=True).hidden_states
        vector = model.language_model.norm(states[1])[0, -1]
    expected = torch.nn.functional.normalize(vector[:16], dim=0).numpy()
    cut = load_embedder(folder, device="cpu", layers=1)
    assert cut.dim == 16  # the widest that was trained
    np.testing.assert_allclose(cut.encode(["find the page"])[0], expected, atol=1e-5)
    short = cut.encode(["find the page"], dim=8)[0]
    np.testing.assert_allclose(short, expected[:8] / np.linalg.norm(expected[:8]), atol=1e-5)
    assert len(cut.backbone.model.language_model.layers) == 1  # what is left out does not run


def test_fewer_layers_are_another_model_to_a_collection(folder):
    whole = load_embedder(folder, device="cpu")
    assert load_embedder(folder, device="cpu", layers=2).fingerprint == whole.fingerprint
    assert load_embedder(folder, device="cpu", layers=1).fingerprint != whole.fingerprint


def test_pairs_that_were_not_trained_are_refused(folder, tmp_path, caplog):
    cut = load_embedder(folder, device="cpu", layers=1)
    with pytest.raises(ConfigError, match="trained for 8, 16 dimensions"):
        cut.encode(["x"], dim=12)
    for layers in (0, 3):
        with pytest.raises(ConfigError, match=f"layers={layers} is not possible: .* has 2 layers"):
            load_embedder(folder, device="cpu", layers=layers)
    other = shutil.copytree(folder, tmp_path / "other")
    (other / "mmrag.json").write_text(json.dumps({"family": "gme", "matryoshka_layers": [[2, 8]]}))
    with pytest.raises(ConfigError, match="layers=1: this model was trained for 2 layers"):
        load_embedder(other, device="cpu", layers=1)
    assert not caplog.records
    (other / "mmrag.json").write_text('{"family": "gme"}')
    assert load_embedder(other, device="cpu", layers=1).dim == 32
    assert "not known to be trained for fewer layers" in caplog.text


def test_the_embed_model_takes_layers(folder):
    model = UniversalEmbedding(str(folder), device="cpu", layers=1)
    expected = load_embedder(folder, device="cpu", layers=1).encode(["find the page"])[0]
    np.testing.assert_allclose(model.get_text_embedding("find the page"), expected, atol=1e-6)
    again = UniversalEmbedding.from_dict(model.to_dict())
    assert again.layers == 1
    assert model.to_payload()["layers"] == 1
    with pytest.raises(ConfigError, match="layers"):
        UniversalEmbedding("m", base_url="http://localhost/v1", layers=1)
    with pytest.raises(ConfigError, match="leave out model_name"):
        UniversalEmbedding(embedder=model.embedder, layers=1)


FAMILIES = {
    "gme": (save_qwen2_vl, 1),
    "qwen3_vl": (save_qwen3_vl, 1),  # whose decoder adds visual features between its layers
    "qwen3_vl, later": (save_qwen3_vl, 2),
    "wemm": (save_wemm, 1),
    "vlm2vec_llava_next": (save_llava, 1),
    "vlm2vec_phi3v": (save_phi3v, 1),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_training_sees_the_vectors_of_the_cut_model(tmp_path, name):
    save, layers = FAMILIES[name]
    folder, family = save(tmp_path / "tiny"), name.partition(",")[0]
    backbone = load_backbone(folder, family=family, device="cpu")
    able = [c for c in CONTENTS if c.modality in backbone.modalities]
    items = [inputs_of(backbone, content, "Find it.") for content in able]
    with torch.no_grad():
        whole = backbone.forward(items)
        with inner_vectors(backbone, [layers]):
            both = backbone.forward(items)
        assert torch.equal(backbone.forward(items), whole)  # nothing stays behind
        keep_layers(backbone, layers)
        cut = backbone.forward(items)
    assert not torch.allclose(cut, whole, atol=1e-2)
    torch.testing.assert_close(both, torch.cat([whole, cut], dim=1), atol=1e-5, rtol=1e-5)


def test_families_without_a_plain_decoder_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="family 'nano'"):
        load_embedder("mmrag-nano", device="cpu", layers=2)
    with pytest.raises(ConfigError, match="family 'mm_embed'"):
        load_embedder(save_mm_embed(tmp_path / "tiny"), family="mm_embed", device="cpu", layers=1)
