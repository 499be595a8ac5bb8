"""nomic-embed-multimodal: literal prompts, and vectors equal to an independent computation."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import save_qwen2_5_vl
from tiny_adapters import adapter_weights, merged, save_adapter
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    Qwen2_5_VLModel,
)

from mmrag.content import Content
from mmrag.embedders import load_embedder
from mmrag.testing import check_embedder

# As published: "model" is in the name of the decoder's modules alone.
TARGETS = r"(.*(model).*(down_proj|k_proj|q_proj|v_proj|o_proj).*$)"
NOISE = np.random.default_rng(0).integers(0, 255, (301, 444, 3), dtype=np.uint8)
PHOTO = Image.fromarray(NOISE)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """An adapter, and the same model merged by hand."""
    folder = tmp_path_factory.mktemp("nomic")
    base = save_qwen2_5_vl(folder / "base")
    weights = adapter_weights()
    adapter = save_adapter(folder / "adapter", weights, base, target_modules=TARGETS)
    whole = save_qwen2_5_vl(folder / "whole")
    save_file(merged(base, weights), whole / "model.safetensors", metadata={"format": "pt"})
    assert (
        load_file(whole / "model.safetensors").keys()
        == load_file(base / "model.safetensors").keys()
    )
    return adapter, whole


@pytest.fixture(scope="module")
def embedder(folders):
    return load_embedder(folders[0], family="nomic_multimodal", device="cpu", dtype="float32")


@torch.no_grad()
def independent_vector(folder, prompt: str, image) -> np.ndarray:
    """The recipe written out for one item with transformers' own parts, unbatched."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = Qwen2_5_VLModel.from_pretrained(folder, dtype=torch.float32).eval()
    images = {}
    if image is not None:
        bounds = {"min_pixels": 3136, "max_pixels": 768 * 784}
        processor = AutoImageProcessor.from_pretrained(folder, backend="pil", **bounds)
        images = processor(images=[image], return_tensors="pt")
        tokens = int(images["image_grid_thw"].prod()) // 4
        prompt = prompt.replace("<|image_pad|>", "<|image_pad|>" * tokens)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    kinds = (ids == model.config.image_token_id).long()
    output = model(input_ids=ids, mm_token_type_ids=kinds, **images)
    vector = output.last_hidden_state[0, -1].numpy()
    return vector / np.linalg.norm(vector)


PAGE = (
    "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Describe the image."
    "<|im_end|><|endoftext|>"
)


@pytest.mark.parametrize(
    ("content", "prompt"),
    [
        (Content(image=PHOTO), PAGE),
        (Content(image=PHOTO.resize((1400, 900))), PAGE),
        (Content("who pays", None, "Find a page."), "Query: who pays<|endoftext|>"),
        (Content("who pays"), "who pays<|endoftext|>"),
    ],
)
def test_vectors_equal_an_independent_computation(embedder, folders, content, prompt):
    assert str(embedder.backbone.recipe.render(content, content.instruction)) == prompt
    image = content.images[0] if content.images else None
    vector = embedder.encode([content, "another", PHOTO.resize((90, 250))])[0]
    assert vector @ independent_vector(folders[1], prompt, image) >= 0.9999


def test_contract(folders):
    options = {"max_length": 200, "max_image_tokens": 60, "token_budget": 600}
    check_embedder(load_embedder(folders[0], family="nomic_multimodal", device="cpu", **options))
