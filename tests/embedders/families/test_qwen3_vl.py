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
from transformers import AutoTokenizer, Qwen3VLModel
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

from mmrag.content import Clip, Content
from mmrag.embedders import load_embedder
from mmrag.errors import ContentError
from mmrag.modeling.backbone import inputs_of
from mmrag.modeling.qwen_clips import resize_frame
from mmrag.modeling.qwen_images import pixels_of
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


def moving(n: int, size: tuple[int, int]) -> list[Image.Image]:
    """Frames of blocks of colour, each frame another."""
    width, height = size
    blocks = np.random.default_rng(n).integers(0, 255, (n, height // 8 + 1, width // 8 + 1, 3))
    pixels = blocks.astype(np.uint8).repeat(8, axis=1).repeat(8, axis=2)[:, :height, :width]
    return [Image.fromarray(each) for each in pixels]


def reference_clip_inputs(folder, frames, fps, text, images=()):
    """What the reference code gives to the model for frames of a file that has ``fps``.

    By transformers' own times, patches and image processor; the sizes are set by hand.
    """
    width, height = {(144, 80): (512, 288), (64, 64): (384, 384)}[frames[0].size]
    video = torch.stack([resize_frame(pixels_of(each), (width, height)) for each in frames])
    video = (video.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5
    patches, *grid = Qwen3VLVideoProcessor.patchify(None, video.unsqueeze(0), 16, 2, 2)
    times = Qwen3VLProcessor._calculate_timestamps(None, list(range(len(frames))), fps)
    one = "<|vision_start|>" + "<|video_pad|>" * (grid[1] * grid[2] // 4) + "<|vision_end|>"
    video_part = "".join(f"<{time:.1f} seconds>{one}" for time in times)
    prompt = f"{DEFAULT}{video_part}{IMAGE_BLOCK * len(images)}{text}{TAIL}"
    inputs = reference_inputs(folder, prompt, list(images))
    video_id = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("<|video_pad|>")
    inputs["mm_token_type_ids"] += 2 * (inputs["input_ids"] == video_id).int()
    return inputs | {"pixel_values_videos": patches[0], "video_grid_thw": torch.tensor([grid])}


@torch.no_grad()
def test_vectors_of_clips_equal_an_independent_computation(embedder, folder):
    picture = Image.fromarray(np.asarray(moving(1, (64, 96))[0]))
    six, three = moving(6, (144, 80)), moving(3, (64, 64))
    cases = [
        (Content(clip=Clip(six, [i / 2 for i in range(6)])), (six, 2, "")),
        (Content("a cat", clip=Clip(three, [0, 1, 2])), (three, 1, "a cat")),
        (Content("both", picture, None, Clip(three, [0, 4, 8])), (three, 0.25, "both", [picture])),
    ]
    model = Qwen3VLModel.from_pretrained(folder, dtype=torch.float32).eval()
    others = [Content("a text"), Content("page", picture)]
    together = embedder.encode([others[0], *(content for content, _ in cases), others[1]])
    assert np.allclose(together[[0, -1]], embedder.encode(others), atol=1e-5)
    for vector, (content, case) in zip(together[1:-1], cases, strict=True):
        inputs = reference_clip_inputs(folder, *case)
        item = inputs_of(embedder.backbone, content, None)
        assert item.ids.tolist() == inputs["input_ids"][0].tolist()
        assert embedder.backbone.plan(content, None).n_tokens == len(item.ids)
        expected = model(**inputs).last_hidden_state[0, -1].numpy()
        expected /= np.linalg.norm(expected)
        assert vector @ expected >= 0.99999
        assert embedder.encode([content])[0] @ expected >= 0.99999


def test_the_order_of_frames_and_their_times_move_the_vector(embedder):
    frames = moving(4, (64, 64))
    clip, still = Clip(frames, [0, 1, 2, 3]), Clip(frames[:1] * 4, [0, 1, 2, 3])
    others = [still, Clip(frames[::-1], clip.seconds), Clip(frames, [0, 1, 2, 9])]
    swapped = Clip([frames[i] for i in (1, 0, 2, 3)], clip.seconds)  # within a pair
    first, *rest = embedder.encode([clip, *others, swapped])
    assert all(first @ other < 0.9999 for other in rest)


def test_a_clip_is_never_cut(folder):
    embedder = load_embedder(folder, family="qwen3_vl", device="cpu", max_length=200)
    with pytest.raises(ContentError, match=r"item 0: .*fewer frames of a clip"):
        embedder.encode([Content(clip=Clip(moving(4, (64, 64)), range(4)))])


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
