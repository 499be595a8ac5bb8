"""GME: exact against the reference code's vectors and against an independent computation."""

import json
import math
import urllib.request

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import seen
from transformers import AutoImageProcessor, AutoTokenizer, Qwen2VLModel

from mmrag.content import Content
from mmrag.embedders import load_embedder
from mmrag.errors import ContentError
from mmrag.modeling.backbone import inputs_of
from mmrag.modeling.image_rule import ImageRule, smart_resize
from mmrag.modeling.qwen_images import to_patches
from mmrag.testing import check_embedder


@pytest.fixture(scope="module")
def reference(golden):
    folder = golden / "gme"
    cases = json.loads((folder / "expected.json").read_text())["cases"]
    contents = [
        Content(c["text"], folder / "images" / c["image"] if c["image"] else None, c["instruction"])
        for c in cases
    ]
    embedder = load_embedder(folder / "checkpoint", family="gme", dtype="float32", device="cpu")
    return embedder, cases, contents


def test_vectors_equal_those_of_the_reference_code(reference):
    embedder, cases, contents = reference
    expected = np.array([case["vector"] for case in cases])
    together = embedder.encode(contents)
    alone = np.concatenate([embedder.encode([content]) for content in contents])
    for vectors in (together, alone):
        assert ((vectors * expected).sum(axis=1) >= 0.9999).all()


def test_ids_and_grids_equal_those_of_the_reference_code(reference):
    embedder, cases, contents = reference
    for case, content in zip(cases, contents, strict=True):
        item = inputs_of(embedder.backbone, content, content.instruction)
        ids = item.ids.tolist()
        assert len(ids) == case["n_tokens"]
        assert ids[: len(case["head_ids"])] == case["head_ids"]
        assert ids[-len(case["tail_ids"]) :] == case["tail_ids"]
        assert embedder.backbone.plan(content, content.instruction).n_tokens == len(ids)
        if case["grid_thw"]:
            grids, patches = seen(item, embedder.backbone.rule)
            assert grids == [case["grid_thw"]]
            assert math.isclose(patches.mean().item(), case["pixel_mean"], abs_tol=1e-4)


def independent_vector(folder, prompt: str, image: Image.Image | None) -> np.ndarray:
    """GME's recipe written out for one item with transformers' own parts, unbatched."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = Qwen2VLModel.from_pretrained(folder, dtype=torch.float32).eval()
    features = None
    if image is not None:
        processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
        pixels = processor(images=[image], return_tensors="pt")
        grid = pixels["image_grid_thw"]
        features = model.visual(pixels["pixel_values"], grid_thw=grid).pooler_output
        prompt = prompt.replace("<|image_pad|>", "<|image_pad|>" * len(features))
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    embeds = model.language_model.embed_tokens(ids)
    if features is not None:
        embeds[ids == model.config.image_token_id] = features
    positions = torch.arange(ids.shape[1]).expand(3, 1, -1)
    output = model.language_model(inputs_embeds=embeds, position_ids=positions)
    vector = output.last_hidden_state[0, -1].detach().numpy()
    return vector / np.linalg.norm(vector)


HEAD = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
TAIL = "<|im_end|>\n<|im_start|>assistant\n<|endoftext|>"
IMAGE_BLOCK = "<|vision_start|><|image_pad|><|vision_end|>"


@torch.no_grad()
def test_vectors_equal_an_independent_computation(gme, qwen2_vl_folder):
    noise = np.random.default_rng(0).integers(0, 255, (140, 196, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)  # both sides are multiples of 28 already
    cases = [
        (Content("find the page"), None, HEAD + "find the page" + TAIL),
        (Content(image=picture), picture, HEAD + IMAGE_BLOCK + TAIL),
        (Content("a page", picture), picture, HEAD + IMAGE_BLOCK + "a page" + TAIL),
        (
            Content("x", None, "Find a page."),
            None,
            "<|im_start|>system\nFind a page.<|im_end|>\n<|im_start|>user\nx" + TAIL,
        ),
    ]
    vectors = gme.encode([content for content, _, _ in cases])
    for vector, (_, image, prompt) in zip(vectors, cases, strict=True):
        assert vector @ independent_vector(qwen2_vl_folder, prompt, image) >= 0.9999


def test_contract(gme):
    check_embedder(gme)


def test_patches_equal_those_of_transformers(qwen2_vl_folder):
    processor = AutoImageProcessor.from_pretrained(qwen2_vl_folder, backend="pil")
    rule = ImageRule(4 * 784, 64 * 784)
    noise = np.random.default_rng(1).integers(0, 255, (131, 217, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    expected = processor(images=[image], return_tensors="pt")
    sized = image.resize(rule.size(*image.size), Image.Resampling.BICUBIC)
    patches, grid = to_patches(sized, rule)
    assert [list(grid)] == expected["image_grid_thw"].tolist()
    torch.testing.assert_close(patches, expected["pixel_values"], atol=1e-5, rtol=0)


def test_matrix_product_equals_the_convolution(gme):
    patch_embed = gme.backbone.model.visual.patch_embed
    patches = torch.randn(12, 3 * 2 * 14 * 14)
    convolution = type(patch_embed).forward(patch_embed, patches)
    torch.testing.assert_close(patch_embed(patches), convolution, atol=1e-5, rtol=1e-5)


def test_long_text_keeps_the_end_of_the_prompt(gme):
    backbone = gme.backbone
    item = inputs_of(backbone, Content("word " * 5000, Image.new("RGB", (56, 56))), None)
    assert item.n_tokens == backbone.recipe.max_length
    tail = backbone.tokenizer(TAIL)["input_ids"]
    assert item.ids[-len(tail) :].tolist() == tail
    assert (item.ids == backbone.model.config.image_token_id).sum() == 4


def test_an_image_that_leaves_no_room_is_refused(qwen2_vl_folder):
    embedder = load_embedder(qwen2_vl_folder, family="gme", device="cpu", max_length=30)
    with pytest.raises(ContentError, match="over max_length"):
        embedder.encode([Image.new("RGB", (280, 280))])


def test_placeholders_in_the_text_are_not_images(gme):
    vectors = gme.encode(["the token <|image_pad|> marks an image", "<|vision_start|>"])
    assert np.isfinite(vectors).all()


@pytest.mark.parametrize(
    ("width", "height", "least", "most"),
    [(100, 100, 3136, 10**6), (5000, 4000, 3136, 10**6), (10, 9, 200704, 10**6), (28, 2800, 1, 1)],
)
def test_sizes_are_multiples_within_the_bounds(width, height, least, most):
    w, h = smart_resize(width, height, 28, least, most)
    assert w % 28 == 0
    assert h % 28 == 0
    if most > 1:
        assert least <= w * h <= most
        assert abs(math.log((w / h) / (width / height))) < 0.35


def test_a_thread_of_an_image_is_refused(gme):
    with pytest.raises(ContentError, match=r"item 1: .*too long and thin"):
        gme.encode(["fine", Image.new("RGB", (4100, 20))])


@pytest.mark.hub
def test_published_similarities_of_gme_2b():
    """The model card's own numbers, over its two images from Wikimedia Commons."""
    files = ["Tesla_Cybertruck_damaged_window.jpg", "TaobaoCity_Alibaba_Xixi_Park.jpg"]
    pictures = []
    for name in files:
        address = f"https://commons.wikimedia.org/wiki/Special:FilePath/{name}"
        request = urllib.request.Request(address, headers={"User-Agent": "mmrag-tests"})
        with urllib.request.urlopen(request, timeout=60) as response:
            pictures.append(response.read())
    texts = [
        "The Tesla Cybertruck is a battery electric pickup truck built by Tesla, Inc. since 2023.",
        "Alibaba office.",
    ]
    embedder = load_embedder("Alibaba-NLP/gme-Qwen2-VL-2B-Instruct")
    plain, images = embedder.encode(texts), embedder.encode(pictures)
    asked = embedder.encode(texts, instruction="Find an image that matches the given text.")
    fused = embedder.encode([Content(t, p) for t, p in zip(texts, pictures, strict=True)])
    np.testing.assert_allclose((plain * images).sum(axis=1), [0.2281, 0.6001], atol=0.02)
    np.testing.assert_allclose((asked * images).sum(axis=1), [0.2433, 0.7051], atol=0.02)
    assert abs(float(fused[0] @ fused[1]) - 0.6108) < 0.02
