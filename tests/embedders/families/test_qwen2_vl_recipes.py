"""Ops-MM, DSE, LamRA and UNITE: literal prompts, vectors equal to an independent computation."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, Qwen2VLModel

from mmrag.content import Content
from mmrag.embedders import load_embedder
from mmrag.errors import ContentError
from mmrag.modeling.mrope import mrope_positions
from mmrag.testing import check_embedder

SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
IMAGE_BLOCK = "<|vision_start|><|image_pad|><|vision_end|>"
ANSWER = "<|im_end|>\n<|im_start|>assistant\n"
NOISE = np.random.default_rng(0).integers(0, 255, (301, 444, 3), dtype=np.uint8)
PHOTO = Image.fromarray(NOISE)
SMALL = PHOTO.crop((0, 0, 30, 32))
BLACK = Image.new("RGB", (56, 56))
TASK = "Find the page."

# family, content, literal prompt, image that the model sees
CASES = [
    ("ops_mm", Content("a cat"), f"{SYSTEM}a cat{ANSWER}<|endoftext|>", None),
    ("ops_mm", Content(image=PHOTO), f"{SYSTEM}{IMAGE_BLOCK}{ANSWER}<|endoftext|>", PHOTO),
    (
        "ops_mm",
        Content("a cat", PHOTO, TASK),
        f"<|im_start|>system\n{TASK}<|im_end|>\n<|im_start|>user\n"
        f"{IMAGE_BLOCK}a cat{ANSWER}<|endoftext|>",
        PHOTO,
    ),
    ("dse", Content("a cat"), f"{SYSTEM}{IMAGE_BLOCK}Document: a cat{ANSWER}<|endoftext|>", BLACK),
    (
        "dse",
        Content("a cat", None, TASK),
        f"{SYSTEM}{IMAGE_BLOCK}Query: a cat{ANSWER}<|endoftext|>",
        BLACK,
    ),
    (
        "dse",
        Content(image=PHOTO),
        f"{SYSTEM}{IMAGE_BLOCK}What is shown in this image?{ANSWER}<|endoftext|>",
        PHOTO,
    ),
    (
        "dse",
        Content(image=SMALL),
        f"{SYSTEM}{IMAGE_BLOCK}What is shown in this image?{ANSWER}<|endoftext|>",
        SMALL.resize((56, 84), Image.Resampling.BICUBIC),  # by fetch_image, not the processor
    ),
    (
        "lamra",
        Content("a cat"),
        f"{SYSTEM}a cat\nSummarize above sentence in one word: {ANSWER}<emb>",
        None,
    ),
    (
        "lamra",
        Content(image=PHOTO),
        f"{SYSTEM}{IMAGE_BLOCK}\nSummarize above image in one word: {ANSWER}<emb>",
        PHOTO,
    ),
    (
        "lamra",
        Content("a cat", PHOTO, TASK),
        f"{SYSTEM}{IMAGE_BLOCK}{TASK} a cat\nSummarize above image and sentence in one word: "
        f"{ANSWER}<emb>",
        PHOTO,
    ),
    (
        "lamra",
        Content(None, PHOTO, TASK),
        f"{SYSTEM}{IMAGE_BLOCK}{TASK}\nSummarize above image and sentence in one word: "
        f"{ANSWER}<emb>",
        PHOTO,
    ),
    (
        "unite",
        Content("a cat"),
        f"{SYSTEM}a cat\nSummary above sentence in one word:{ANSWER}<|endoftext|>",
        None,
    ),
    (
        "unite",
        Content(image=PHOTO),
        f"{SYSTEM}{IMAGE_BLOCK}\nSummary above image in one word:{ANSWER}<|endoftext|>",
        PHOTO,
    ),
    (
        "unite",
        Content("a cat", PHOTO),
        f"{SYSTEM}{IMAGE_BLOCK}a cat\nSummary above sentence and image in one word:{ANSWER}"
        "<|endoftext|>",
        PHOTO,
    ),
]
# visual tokens of an image, least and most (LamRA: of the checkpoint), and whether it has M-RoPE
SETTINGS = {
    "ops_mm": (256, 1280, True),
    "dse": (1, 2560, True),
    "lamra": (4, 64, False),
    "unite": (256, 1280, False),
}


@torch.no_grad()
def independent_vector(folder, family: str, prompt: str, image) -> np.ndarray:
    """The recipe written out for one item with transformers' own parts, unbatched.

    For LamRA the whole of the reference's prompt is run, and the state before ``<emb>`` taken.
    """
    least, most, mrope = SETTINGS[family]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = Qwen2VLModel.from_pretrained(folder, dtype=torch.float32).eval()
    images = {}
    if image is not None:
        bounds = {"min_pixels": least * 784, "max_pixels": most * 784}
        processor = AutoImageProcessor.from_pretrained(folder, backend="pil", **bounds)
        if family != "ops_mm":  # whose fetch_image has the bounds of its processor
            nearest = [28 * round(side / 28) for side in image.size]
            image = image.resize(nearest, Image.Resampling.BICUBIC)
        images = processor(images=[image], return_tensors="pt")
        tokens = int(images["image_grid_thw"].prod()) // 4
        prompt = prompt.replace("<|image_pad|>", "<|image_pad|>" * tokens)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    kinds = (ids == model.config.image_token_id).long()
    positions = None if mrope else torch.arange(ids.shape[1]).expand(3, 1, -1)
    output = model(input_ids=ids, mm_token_type_ids=kinds, position_ids=positions, **images)
    end = len(tokenizer("<emb>")["input_ids"]) if family == "lamra" else 0
    vector = output.last_hidden_state[0, -1 - end].numpy()
    return vector / np.linalg.norm(vector)


@pytest.fixture(scope="module")
def embedders(qwen2_vl_folder):
    return {
        family: load_embedder(qwen2_vl_folder, family=family, device="cpu", dtype="float32")
        for family in SETTINGS
    }


@pytest.mark.parametrize(("family", "content", "prompt", "image"), CASES)
def test_vectors_equal_an_independent_computation(
    embedders, qwen2_vl_folder, family, content, prompt, image
):
    recipe = embedders[family].backbone.recipe
    assert str(recipe.render(content, content.instruction)) == prompt.removesuffix("<emb>")
    vector = embedders[family].encode([content, "something else, and longer than that"])[0]
    assert vector @ independent_vector(qwen2_vl_folder, family, prompt, image) >= 0.9999


@pytest.mark.parametrize("family", ["dse", "unite"])
def test_contract(qwen2_vl_folder, family):
    limits = {"max_length": 200, "min_image_tokens": 4, "max_image_tokens": 60}
    check_embedder(
        load_embedder(qwen2_vl_folder, family=family, device="cpu", token_budget=600, **limits)
    )


def test_positions_equal_those_of_transformers(qwen2_vl_folder):
    model = Qwen2VLModel.from_pretrained(qwen2_vl_folder)
    image, text = model.config.image_token_id, 50
    ids = [text] * 3 + [image] * 6 + [text] * 2 + [image] * 20 + [text] + [image] * 4 + [text]
    grids = torch.tensor([[1, 4, 6], [1, 10, 8], [1, 4, 4]])
    row = torch.tensor([ids])
    kinds = (row == image).long()
    expected, _ = model.get_rope_index(row, image_grid_thw=grids, mm_token_type_ids=kinds)
    assert torch.equal(mrope_positions(ids, image, [(2, 3), (5, 4), (2, 2)]), expected[:, 0])


def test_dse_does_not_take_text_with_an_image(embedders):
    with pytest.raises(ContentError, match="cannot embed fused"):
        embedders["dse"].encode([Content("a cat", PHOTO)])


def test_a_model_type_of_its_own(qwen2_vl_folder, tmp_path):
    """UNITE's own class names itself so when it saves."""
    folder = shutil.copytree(qwen2_vl_folder, tmp_path / "unite")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "unite_qwen2_vl", "architectures": ["UniteQwen2VL"]}
    (folder / "config.json").write_text(json.dumps(config))
    vectors = [
        load_embedder(path, family="unite", device="cpu", dtype="float32").encode(["a cat"])
        for path in (qwen2_vl_folder, folder)
    ]
    np.testing.assert_allclose(*vectors, atol=1e-6)
