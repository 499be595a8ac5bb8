"""MoCa: literal prompts, and vectors equal to an independent computation."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import save_qwen2_5_vl
from transformers import AutoImageProcessor, AutoTokenizer, Qwen2_5_VLModel

from mmrag.content import Content
from mmrag.embedders import load_embedder
from mmrag.testing import check_embedder

NOISE = np.random.default_rng(0).integers(0, 255, (301, 444, 3), dtype=np.uint8)
PHOTO = Image.fromarray(NOISE)
THIN = PHOTO.crop((0, 0, 20, 300))
IMAGE_BLOCK = "<|vision_start|><|image_pad|><|vision_end|>"
TASK = "Represent the given image with the following question:"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_qwen2_5_vl(tmp_path_factory.mktemp("moca") / "whole")


@torch.no_grad()
def independent_vector(folder, prompt: str, image) -> np.ndarray:
    """The recipe written out for one item with transformers' own parts, unbatched, eager."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = Qwen2_5_VLModel.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    images = {}
    if image is not None:
        bounds = {"min_pixels": 256 * 784, "max_pixels": 1024 * 784}
        processor = AutoImageProcessor.from_pretrained(folder, backend="pil", **bounds)
        images = dict(processor(images=[image], return_tensors="pt"))
        tokens = int(images["image_grid_thw"].prod()) // 4
        prompt = prompt.replace("<|image_pad|>", "<|image_pad|>" * tokens)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    positions, _ = model.get_rope_index(
        ids,
        mm_token_type_ids=(ids == model.config.image_token_id).long(),
        image_grid_thw=images.get("image_grid_thw"),
    )
    nothing_hidden = torch.zeros(1, 1, ids.shape[1], ids.shape[1])
    output = model(input_ids=ids, attention_mask=nothing_hidden, position_ids=positions, **images)
    vector = output.last_hidden_state[0].mean(dim=0).numpy()
    return vector / np.linalg.norm(vector)


@pytest.mark.parametrize(
    ("content", "prompt", "seen"),
    [
        (Content("a cat"), "a cat", None),
        (Content("a cat", None, "Find a page:"), "Find a page: a cat\n", None),
        (Content(image=PHOTO), f"{IMAGE_BLOCK}Represent the given document image.\n", PHOTO),
        (Content("what is it", PHOTO, TASK), f"{IMAGE_BLOCK}{TASK} what is it\n", PHOTO),
        (
            Content("at night", PHOTO),
            f"{IMAGE_BLOCK}Represent the given image with related text information: at night\n",
            PHOTO,
        ),
        (
            Content(image=THIN),
            f"{IMAGE_BLOCK}Represent the given document image.\n",
            THIN.resize((28, 300), Image.Resampling.BICUBIC),
        ),
    ],
)
def test_vectors_equal_an_independent_computation(folder, content, prompt, seen):
    embedder = load_embedder(folder, family="moca", device="cpu", dtype="float32")
    assert str(embedder.backbone.recipe.render(content, content.instruction)) == prompt
    vector = embedder.encode([content, "another text, and a longer one than the first"])[0]
    assert vector @ independent_vector(folder, prompt, seen) >= 0.9999


def test_contract(folder):
    limits = {"max_length": 200, "min_image_tokens": 4, "max_image_tokens": 60}
    check_embedder(load_embedder(folder, family="moca", device="cpu", token_budget=600, **limits))
