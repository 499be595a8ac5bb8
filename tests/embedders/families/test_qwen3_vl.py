"""Qwen3-VL-Embedding against its reference code and an independent computation."""

import json
import urllib.request

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from tiny import seen
from tiny_qwen3 import reference_inputs, save_qwen3_vl
from transformers import Qwen3VLModel

from mmrag.content import Content
from mmrag.embedders import load_embedder
from mmrag.errors import ContentError
from mmrag.modeling.backbone import inputs_of
from mmrag.testing import check_embedder

HEAD = "<|im_start|>system\n{}<|im_end|>\n<|im_start|>user\n"
TAIL = "<|im_end|>\n<|im_start|>assistant\n"
DEFAULT = HEAD.format("Represent the user's input.")
IMAGE_BLOCK = "<|vision_start|><|image_pad|><|vision_end|>"


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return save_qwen3_vl(tmp_path_factory.mktemp("qwen3_vl") / "tiny")


@pytest.fixture(scope="session")
def embedder(folder):
    return load_embedder(folder, family="qwen3_vl", device="cpu")


@pytest.fixture(scope="module")
def reference(golden):
    root = golden / "qwen3_vl_embedding"
    cases = json.loads((root / "expected.json").read_text())["cases"]
    by_length = {}
    for case in cases:
        names = [case["image"]] if isinstance(case["image"], str) else case["image"] or []
        # A Content refuses to be empty: what the reference makes of it is spelt out.
        text = "NULL" if case["text"] is None and not names else case["text"]
        images = [root / "images" / name for name in names]
        content = Content(text, images or None, case["instruction"])
        by_length.setdefault(case["max_length"], []).append((case, content))
    embedders = {
        length: load_embedder(
            root / "checkpoint", family="qwen3_vl", dtype="float32", device="cpu", max_length=length
        )
        for length in by_length
    }
    return [(embedders[length], pairs) for length, pairs in by_length.items()]


def test_vectors_equal_those_of_the_reference_code(reference):
    for embedder, pairs in reference:
        expected = np.array([case["vector"] for case, _ in pairs])
        together = embedder.encode([content for _, content in pairs])
        alone = np.concatenate([embedder.encode([content]) for _, content in pairs])
        for vectors in (together, alone):
            assert ((vectors * expected).sum(axis=1) >= 0.9999).all()


def test_ids_and_grids_equal_those_of_the_reference_code(reference):
    for embedder, pairs in reference:
        for case, content in pairs:
            item = inputs_of(embedder.backbone, content, content.instruction)
            ids = item.ids.tolist()
            assert len(ids) == case["n_tokens"]
            assert ids[: len(case["head_ids"])] == case["head_ids"]
            assert ids[-len(case["tail_ids"]) :] == case["tail_ids"]
            assert embedder.backbone.plan(content, content.instruction).n_tokens == len(ids)
            if case["grid_thw"]:
                grids, patches = seen(item, embedder.backbone.rule)
                assert case["grid_thw"] in (grids, grids[0])
                assert abs(patches.mean().item() - case["pixel_mean"]) < 1e-4


def independent_vector(folder, prompt: str, images: list[Image.Image]) -> np.ndarray:
    """The recipe for one item, by transformers' own model, positions and DeepStack."""
    model = Qwen3VLModel.from_pretrained(folder, dtype=torch.float32).eval()
    inputs = reference_inputs(folder, prompt, images)
    output = model(**inputs)
    vector = output.last_hidden_state[0, -1].numpy()
    return vector / np.linalg.norm(vector)


@torch.no_grad()
def test_vectors_equal_an_independent_computation(embedder, folder):
    noise = np.random.default_rng(0).integers(0, 255, (131, 217, 3), dtype=np.uint8)
    wide = Image.fromarray(noise)
    small = Image.fromarray(noise[:64, :96])
    sized = wide.resize((224, 128), Image.Resampling.BICUBIC)  # 6.8 and 4.1 times 32, rounded
    cases = [
        (Content("find the page"), [], DEFAULT + "find the page" + TAIL),
        (Content(""), [], DEFAULT + TAIL),
        (Content(image=wide), [sized], DEFAULT + IMAGE_BLOCK + TAIL),
        (Content("a page", wide), [sized], DEFAULT + IMAGE_BLOCK + "a page" + TAIL),
        (
            Content("two", [small, wide]),
            [small, sized],
            DEFAULT + IMAGE_BLOCK + IMAGE_BLOCK + "two" + TAIL,
        ),
        (
            Content("x", None, " Find a page "),
            [],
            HEAD.format("Find a page.") + "x" + TAIL,
        ),
    ]
    together = embedder.encode([content for content, _, _ in cases])
    for vector, (content, images, prompt) in zip(together, cases, strict=True):
        expected = independent_vector(folder, prompt, images)
        assert vector @ expected >= 0.9999
        assert embedder.encode([content])[0] @ expected >= 0.9999


@pytest.mark.parametrize(
    ("instruction", "sentence"),
    [
        ("Find it", "Find it."),
        ("Is it?", "Is it?"),
        ("查找。", "查找。"),
        ("Price in $", "Price in $."),
        ("  ", "Represent the user's input."),
    ],
)
def test_an_instruction_ends_as_a_sentence(embedder, instruction, sentence):
    prompt = embedder.backbone.recipe.render(Content("x"), instruction)
    assert str(prompt) == HEAD.format(sentence) + "x" + TAIL


def test_contract(folder):
    check_embedder(
        load_embedder(folder, family="qwen3_vl", device="cpu", max_length=300, max_image_tokens=60)
    )


def test_published_names_of_weights(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert "model.language_model.layers.0.self_attn.q_norm.weight" in names
    assert "model.visual.deepstack_merger_list.1.linear_fc2.weight" in names
    assert not any(name.startswith("lm_head") for name in names)


def test_long_text_is_cut_as_in_the_reference_or_keeps_the_end(folder):
    long = Content("word " * 500)
    plain = inputs_of(
        load_embedder(folder, family="qwen3_vl", device="cpu", max_length=64).backbone, long, None
    )
    kept = load_embedder(
        folder, family="qwen3_vl", device="cpu", max_length=64, keep_end=True
    ).backbone
    tail = kept.tokenizer(TAIL)["input_ids"]
    whole = kept.tokenizer(DEFAULT + long.text + TAIL)["input_ids"]
    assert plain.ids.tolist() == whole[:64]
    assert inputs_of(kept, long, None).ids.tolist() == whole[: 64 - len(tail)] + tail


def test_fingerprint_tells_how_long_text_is_cut(embedder, folder):
    kept = load_embedder(folder, family="qwen3_vl", device="cpu", keep_end=True)
    assert kept.fingerprint != embedder.fingerprint


def test_an_image_is_never_cut(folder):
    embedder = load_embedder(folder, family="qwen3_vl", device="cpu", max_length=60)
    with pytest.raises(ContentError, match=r"item 0: .*over max_length"):
        embedder.encode([Image.new("RGB", (320, 320))])


def test_vectors_can_be_differentiated(embedder):
    backbone = embedder.backbone
    image = Image.new("RGB", (64, 64), "red")
    items = [
        inputs_of(backbone, Content(image=image), None),
        inputs_of(backbone, Content("a"), None),
    ]
    backbone.forward(items).square().sum().backward()
    weight = backbone.model.visual.deepstack_merger_list[0].linear_fc1.weight
    assert weight.grad is not None
    assert weight.grad.abs().sum() > 0
    backbone.model.zero_grad(set_to_none=True)


@pytest.mark.hub
def test_published_similarities_of_the_2b():
    """The four inputs of the repository's README; its numbers are from bfloat16."""
    address = "https://qianwen-res.oss-cn-beijing.aliyuncs.com/Qwen-VL/assets/demo.jpeg"
    with urllib.request.urlopen(address, timeout=60) as response:
        image = response.read()
    text = (
        "A woman shares a joyful moment with her golden retriever on a sun-drenched beach at "
        "sunset, as the dog offers its paw in a heartwarming display of companionship and trust."
    )
    query = "A woman playing with her dog on a beach at sunset."
    instruction = "Retrieve images or text relevant to the user's query."
    contents = [
        Content(query, instruction=instruction),
        Content(text),
        Content(image=image),
        Content(text, image),
    ]
    vectors = load_embedder("Qwen/Qwen3-VL-Embedding-2B").encode(contents)
    expected = [0.7896, 0.7156, 0.7236, 0.7650, 0.8473, 0.8239]
    similarities = (vectors @ vectors.T)[np.triu_indices(4, k=1)]
    np.testing.assert_allclose(similarities, expected, atol=0.02)
