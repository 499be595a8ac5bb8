"""VLM2Vec on Qwen2-VL: exact against the reference code and an independent computation."""

import json
import math
import urllib.request

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny import seen
from tiny_adapters import adapter_weights, merged, save_adapter
from transformers import AutoImageProcessor, AutoTokenizer, Qwen2VLModel

from mmrag.content import Content
from mmrag.embedders import load_embedder
from mmrag.errors import ConfigError
from mmrag.modeling.backbone import inputs_of
from mmrag.testing import check_embedder

SETS = {
    "v1": ("vlm2vec_qwen2vl", "adapter", ("vector", "vector_merged")),
    "v2": ("vlm2vec_v2", "adapter", ("vector", "vector_merged")),
    "v2-plain": ("vlm2vec_v2", "adapter_plain", ("vector_plain",)),
}


@pytest.fixture(scope="module", params=SETS)
def reference(request, golden):
    """The settings of the golden cases: an embedder each, its cases, contents, vectors."""
    family, adapter, keys = SETS[request.param]
    folder = golden / family
    by_settings = {}
    for case in json.loads((folder / "expected.json").read_text())["cases"]:
        settings = {"style": "mmeb" if case.get("style") == "eval" else "demo"}
        if "resize" in case:
            settings["squash"] = case["resize"][0]
        by_settings.setdefault(tuple(settings.items()), []).append(case)
    found = []
    for settings, cases in by_settings.items():
        embedder = load_embedder(
            folder / adapter,
            family=family,
            base=golden / "vlm2vec_qwen2vl" / "base",
            dtype="float32",
            device="cpu",
            **dict(settings),
        )
        images = [folder / "images" / c["image"] if c["image"] else None for c in cases]
        contents = [
            Content(case["text"], image, case["instruction"])
            for case, image in zip(cases, images, strict=True)
        ]
        vectors = [np.array([case[key] for case in cases]) for key in keys]
        found.append((embedder, cases, contents, vectors))
    return found


def test_vectors_equal_those_of_the_reference_code(reference):
    for embedder, _, contents, expected in reference:
        together = embedder.encode(contents)
        alone = np.concatenate([embedder.encode([content]) for content in contents])
        for vectors in expected:
            assert ((together * vectors).sum(axis=1) >= 0.9999).all()
            assert ((alone * vectors).sum(axis=1) >= 0.9999).all()


def test_prompts_ids_and_grids_equal_those_of_the_reference_code(reference):
    for embedder, cases, contents, _ in reference:
        backbone = embedder.backbone
        for case, content in zip(cases, contents, strict=True):
            assert str(backbone.recipe.render(content, content.instruction)) == case["prompt"]
            item = inputs_of(backbone, content, content.instruction)
            ids = item.ids.tolist()
            assert len(ids) == case["n_tokens"]
            assert ids[: len(case["head_ids"])] == case["head_ids"]
            assert ids[-len(case["tail_ids"]) :] == case["tail_ids"]
            assert backbone.plan(content, content.instruction).n_tokens == len(ids)
            if case["grid_thw"]:
                grids, patches = seen(item, backbone.rule)
                assert grids == [case["grid_thw"]]
                assert math.isclose(patches.mean().item(), case["pixel_mean"], abs_tol=1e-4)


@pytest.fixture(scope="module")
def folders(qwen2_vl_folder, tmp_path_factory):
    """An adapter on the tiny base, and the same model merged by hand, for transformers to load."""
    folder = tmp_path_factory.mktemp("vlm2vec")
    weights = adapter_weights(dora=True)
    adapter = save_adapter(folder / "adapter", weights, qwen2_vl_folder)
    whole = folder / "whole"
    whole.mkdir()
    for path in qwen2_vl_folder.glob("*.json"):
        (whole / path.name).write_bytes(path.read_bytes())
    save_file(merged(qwen2_vl_folder, weights), whole / "model.safetensors", {"format": "pt"})
    return adapter, whole


@torch.no_grad()
def independent_vector(folder, prompt: str, image: Image.Image | None) -> np.ndarray:
    """The recipe written out for one item with transformers' own parts, unbatched."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = Qwen2VLModel.from_pretrained(folder, dtype=torch.float32).eval()
    features = None
    if image is not None:
        bounds = {"min_pixels": 3136, "max_pixels": 1003520}
        processor = AutoImageProcessor.from_pretrained(folder, backend="pil", **bounds)
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
    vector = output.last_hidden_state[0, -1].numpy()
    return vector / np.linalg.norm(vector)


def image_of(width: int, height: int, seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


PHOTO = image_of(270, 310)  # over the bounds of the tiny checkpoint's own file
TEXT_QUERY = Content("net revenue", None, "Find a document image that matches the given query:")
IMAGE_QUERY = Content("what is it", PHOTO, "Represent the given image with the question:")
V1, V2 = "vlm2vec_qwen2vl", "vlm2vec_v2"
SENTENCE = "Represent the given image"


@pytest.mark.parametrize(
    ("family", "options", "content", "prompt"),
    [
        (V1, {}, Content("a cat"), "a cat"),
        (V1, {}, Content(""), "\n"),
        (V1, {}, Content(image=PHOTO), f"<|image_pad|> {SENTENCE}."),
        (V2, {}, Content(image=PHOTO), "<|image_pad|> Understand the content of the provided "
         "document image."),
        (V1, {}, Content("at night", PHOTO), f"<|image_pad|> {SENTENCE} with related text "
         "information: at night"),
        (V2, {}, TEXT_QUERY, "Find a document image that matches the given query: net revenue"),
        (V1, {}, IMAGE_QUERY, f"<|image_pad|> {SENTENCE} with the question: what is it"),
        (V1, {"style": "mmeb"}, IMAGE_QUERY, f"<|image_pad|>\n{SENTENCE} with the question: what "
         "is it\n"),
        (V1, {"style": "mmeb"}, Content(image=PHOTO), f"<|image_pad|>\n{SENTENCE}.\n"),
    ],
)  # fmt: skip
def test_vectors_equal_an_independent_computation(folders, family, options, content, prompt):
    adapter, whole = folders
    embedder = load_embedder(adapter, family=family, device="cpu", dtype="float32", **options)
    assert str(embedder.backbone.recipe.render(content, content.instruction)) == prompt
    image = content.images[0] if content.images else None
    vector = embedder.encode([content, "another"])[0]
    assert vector @ independent_vector(whole, prompt, image) >= 0.9999


@pytest.mark.parametrize(
    ("options", "size", "seen"),
    [
        ({}, (27, 300), (56, 56)),
        ({}, (300, 27), (56, 56)),
        ({"squash": 224}, (300, 90), (224, 224)),
        ({"squash": 224}, (20, 20), (224, 224)),
    ],
)
def test_thin_and_squashed_images(folders, options, size, seen):
    adapter, whole = folders
    embedder = load_embedder(adapter, family=V1, device="cpu", dtype="float32", **options)
    image = image_of(*size)
    expected = image.resize(seen, Image.Resampling.BICUBIC)
    prompt = "<|image_pad|> Represent the given image."
    vector = embedder.encode([image])[0]
    assert vector @ independent_vector(whole, prompt, expected) >= 0.9999


def test_ids_of_the_tokens(folders):
    embedder = load_embedder(folders[0], family=V2, device="cpu")
    tokenizer = embedder.backbone.tokenizer
    pad = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    ids = inputs_of(embedder.backbone, Content(image=image_of(56, 84)), None).ids.tolist()
    words = tokenizer(" Understand the content of the provided document image.")["input_ids"]
    assert ids == [pad] * 6 + words


def test_contract(folders):
    adapter, _ = folders
    check_embedder(
        load_embedder(
            adapter, family=V2, device="cpu", max_length=200, max_image_tokens=60, token_budget=600
        )
    )


def test_an_unknown_style_is_refused(folders):
    embedder = load_embedder(folders[0], family=V1, device="cpu")
    assert embedder.dim == 32
    with pytest.raises(ConfigError, match="style"):
        load_embedder(folders[0], family=V1, device="cpu", style="chat")


@pytest.mark.hub
@pytest.mark.parametrize(
    ("name", "scores"),
    [
        ("TIGER-Lab/VLM2Vec-Qwen2VL-7B", (0.3316, 0.2900)),
        ("VLM2Vec/VLM2Vec-V2.0", (0.2974, 0.2390)),
    ],
)
def test_published_similarities(name, scores):
    """The demo's own numbers, in bfloat16, over the image of the reference repository."""
    address = "https://raw.githubusercontent.com/TIGER-AI-Lab/VLM2Vec/main/assets/example.jpg"
    with urllib.request.urlopen(address, timeout=60) as response:
        image = response.read()
    task = "Represent the given image with the following question:"
    embedder = load_embedder(name, dtype="bfloat16")
    query = embedder.encode([Content("What is in the image", image, task)])
    texts = embedder.encode(["A cat and a dog", "A cat and a tiger"])
    np.testing.assert_allclose((texts @ query.T)[:, 0], scores, atol=0.02)
