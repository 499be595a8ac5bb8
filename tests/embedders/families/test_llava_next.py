"""VLM2Vec-LLaVaNext and E5-V: exact against reference vectors and against transformers' model."""

import math
import urllib.request

import numpy as np
import pytest
import torch
from golden_cases import assert_vectors, golden_cases, noise
from safetensors.torch import load_file, save_file
from tiny_llava import GRIDS, PATCH, PIECES, SIDE, save_llava
from transformers import (
    AutoImageProcessor,
    LlavaNextForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from mmrag.content import Content
from mmrag.embedders import load_embedder
from mmrag.errors import ContentError, ModelError
from mmrag.modeling.backbone import inputs_of
from mmrag.modeling.clip_images import ClipRule
from mmrag.testing import check_embedder

VLM2VEC = "vlm2vec_llava_next"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def embedder(folder):
    return load_embedder(folder, family=VLM2VEC, device="cpu")


@pytest.fixture(scope="module")
def e5_v(tmp_path_factory):
    folder = save_llava(tmp_path_factory.mktemp("e5_v"), decoder="llama")
    return load_embedder(folder, family="e5_v", device="cpu")


@pytest.fixture(scope="module")
def reference(golden):
    """Backbone, prepared item and expected values of each case."""

    def options(case):
        style = "mmeb" if "style" in case else "demo"
        return {"style": style, "squash": case.get("resize", [None])[0]}

    return golden_cases(golden / VLM2VEC, VLM2VEC, options)


def test_vectors_equal_those_of_the_reference_code(reference):
    assert_vectors(reference)


def test_ids_and_pixels_equal_those_of_the_reference_code(reference):
    for backbone, item, case in reference:
        ids = item.ids.tolist()
        assert len(ids) == case["n_tokens"]
        assert ids[: len(case["head_ids"])] == case["head_ids"]
        assert ids[-len(case["tail_ids"]) :] == case["tail_ids"]
        if case["image"]:
            pixels = backbone.rule.normalise(item.tiles)
            assert list(item.tiles.shape) == case["pixel_shape"]
            assert ids.count(32000) == case["n_image_tokens"]
            assert math.isclose(pixels.mean().item(), case["pixel_mean"], abs_tol=1e-4)
            assert math.isclose(pixels[0].mean().item(), case["pixel_mean_base"], abs_tol=1e-4)


@torch.no_grad()
def independent_vectors(folder, cases):
    """Last hidden state of transformers' own model and image processor, one item at a time."""
    model = LlavaNextForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    vectors = []
    for prompt, image in cases:
        seen = {}
        if image is not None:
            seen = dict(processor(images=[image], return_tensors="pt"))
            count = len(model.get_image_features(**seen).pooler_output[0])
            prompt = prompt.replace("<image>", "<image>" * count)
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        states = model(input_ids=ids, output_hidden_states=True, **seen).hidden_states[-1]
        vectors.append(states[0, -1] / states[0, -1].norm())
    return torch.stack(vectors).numpy()


CASES = [
    (Content("word"), None, "word"),
    (Content("word"), "Find the page:", "Find the page: word"),
    (Content(image=noise(100, 61)), None, "<image> Represent the given image."),
    (Content(image=noise(31, 190)), "Find the image.", "<image> Find the image."),
    (
        Content("the second line", noise(400, 130)),
        None,
        "<image> Represent the given image with related text information: the second line",
    ),
    (Content("", noise(9, 14)), None, "<image> Represent the given image."),
]


def test_vectors_equal_an_independent_computation(embedder, folder):
    contents = [Content(c.text, c.image, instruction) for c, instruction, _ in CASES]
    images = [c.images[0] if c.images else None for c in contents]
    prompts = [prompt for _, _, prompt in CASES]
    expected = independent_vectors(folder, list(zip(prompts, images, strict=True)))
    assert ((embedder.encode(contents) * expected).sum(axis=1) >= 0.9999).all()


E5_HEAD = "<|start_header_id|>user<|end_header_id|>\n\n"
E5_TAIL = " in one word: <|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n \n"
E5_CASES = [
    (Content("word"), None, f"{E5_HEAD}word\nSummary above sentence{E5_TAIL}"),
    (Content("word"), "Find this:", f"{E5_HEAD}Find this: word\nSummary above sentence{E5_TAIL}"),
    (Content(image=noise(90, 61)), None, f"{E5_HEAD}<image>\nSummary above image{E5_TAIL}"),
    (
        Content("word", noise(90, 61)),
        None,
        f"{E5_HEAD}<image>\nword\nSummary above image and text{E5_TAIL}",
    ),
]


def test_e5_v_vectors_equal_an_independent_computation(e5_v):
    contents = [Content(c.text, c.image, instruction) for c, instruction, _ in E5_CASES]
    cases = [(prompt, c.images[0] if c.images else None) for c, _, prompt in E5_CASES]
    expected = independent_vectors(e5_v.name, cases)
    assert ((e5_v.encode(contents) * expected).sum(axis=1) >= 0.9999).all()


@pytest.mark.parametrize(("content", "instruction", "prompt"), E5_CASES)
def test_prompts_of_e5_v(e5_v, content, instruction, prompt):
    assert str(e5_v.backbone.recipe.render(content, instruction)) == prompt


@pytest.mark.parametrize(
    ("content", "instruction", "prompt"),
    [
        *[(c, i, p.replace("<image> ", "<image>\n") + "\n" * ("<" in p)) for c, i, p in CASES[2:]],
        (Content("word"), "Find the page:", "Find the page: word\n"),
        (Content("word"), None, "word"),
    ],
)
def test_prompts_of_the_evaluation(folder, content, instruction, prompt):
    backbone = load_embedder(folder, family=VLM2VEC, device="cpu", style="mmeb").backbone
    assert str(backbone.recipe.render(content, instruction)) == prompt


def test_token_ids(embedder):
    backbone = embedder.backbone
    item = inputs_of(backbone, Content(image=noise(112, 56)), None)
    tokens = backbone.tokenizer.convert_ids_to_tokens(item.ids.tolist())
    # One whole view of 4x4 features, then 4 rows of 8 with a newline each.
    images = ["<image>"] * (16 + 4 * 9)
    assert tokens[: 1 + len(images)] == ["<s>", *images]
    assert "".join(tokens[1 + len(images) :]) == "▁▁Represent▁the▁given▁image<0x2E>"
    assert item.tiles.shape == (3, 3, SIDE, SIDE)


def test_tiles_equal_those_of_transformers(folder):
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    rule = ClipRule(SIDE, PATCH, tuple(map(tuple, GRIDS)))
    for size in [(100, 61), (61, 100), (30, 30), (500, 40), (33, 400), (1, 3), (168, 56)]:
        expected = processor(images=[noise(*size)], return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(
            rule.normalise(rule.anyres(noise(*size))), expected, atol=1e-5, rtol=0
        )


def test_squashing_comes_before_the_tiles(folder):
    squashed = load_embedder(folder, family=VLM2VEC, device="cpu", squash=112)
    plain = load_embedder(folder, family=VLM2VEC, device="cpu")
    wide = noise(300, 40)
    (a,), (b,) = squashed.encode([wide]), plain.encode([wide.resize((112, 112))])
    assert a @ b >= 0.99999
    assert squashed.fingerprint != plain.fingerprint


def test_contract(folder):
    check_embedder(load_embedder(folder, family=VLM2VEC, device="cpu", max_length=150))


def test_long_text_keeps_the_end_of_the_prompt(folder, e5_v):
    backbone = load_embedder(folder, family=VLM2VEC, device="cpu", style="mmeb", max_length=150)
    item = inputs_of(backbone.backbone, Content("word " * 900, noise(112, 56)), "Find the image.")
    assert item.n_tokens == 150
    assert (item.ids == PIECES).sum() == 52
    tokens = backbone.backbone.tokenizer.convert_ids_to_tokens(item.ids.tolist())
    assert tokens[-3:] == ["▁word", "▁word", "<0x0A>"]
    long = inputs_of(e5_v.backbone, Content("word " * 9000), None)
    assert long.n_tokens == 8192
    assert e5_v.backbone.tokenizer.decode(long.ids).endswith(f"Summary above sentence{E5_TAIL}")


def test_an_image_that_leaves_no_room_is_refused(folder):
    embedder = load_embedder(folder, family=VLM2VEC, device="cpu", max_length=30)
    with pytest.raises(ContentError, match=r"item 1: .*max_length"):
        embedder.encode(["word", noise(200, 200)])


def test_placeholders_in_the_text_are_not_images(embedder):
    item = inputs_of(embedder.backbone, Content("the <image> token", noise(112, 56)), None)
    assert (item.ids == PIECES).sum() == 52
    assert np.isfinite(embedder.encode(["<image>"])).all()


def test_several_images_are_refused(embedder):
    with pytest.raises(ContentError, match="takes 1 image"):
        embedder.encode([Content(image=[noise(20, 20), noise(30, 30)])])


def test_a_missing_weight_is_named(folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    for shard in tmp_path.glob("*.safetensors"):
        weights = load_file(shard)
        weights.pop("image_newline", None)
        save_file(weights, shard, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="not in the file: image_newline"):
        load_embedder(tmp_path, family=VLM2VEC, device="cpu")


def test_gradients_reach_every_part(embedder):
    backbone = embedder.backbone
    items = [inputs_of(backbone, Content("word", noise(60, 50)), None)]
    backbone.forward([*items, inputs_of(backbone, Content("word"), None)]).square().sum().backward()
    model = backbone.model
    for part in (model.vision_tower, model.multi_modal_projector, model.language_model):
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters())
    assert model.image_newline.grad.abs().sum() > 0
    model.zero_grad()


@pytest.mark.hub
def test_published_similarities():
    """The repository's own example: a cat and a dog."""
    address = "https://raw.githubusercontent.com/TIGER-AI-Lab/VLM2Vec/main/assets/example.jpg"
    with urllib.request.urlopen(address, timeout=60) as response:
        example = response.read()
    embedder = load_embedder("TIGER-Lab/VLM2Vec-LLaVaNext")
    asked = "Represent the given image with the following question:"
    query = embedder.encode([Content("What is in the image", example, asked)])
    answers = embedder.encode(["A cat and a dog", "A cat and a tiger"])
    np.testing.assert_allclose((query @ answers.T)[0], [0.4414, 0.3555], atol=0.02)
