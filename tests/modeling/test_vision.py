"""Vision towers run fast give what transformers' own code gives, and pixels are bit-equal."""

import pickle
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import save_qwen2_5_vl, save_qwen2_vl
from tiny_qwen3 import save_qwen3_vl
from transformers import Qwen2_5_VLModel, Qwen2VLModel, Qwen3VLModel
from transformers.models.qwen2_vl.modeling_qwen2_vl import VisionMlp, apply_rotary_pos_emb_vision

from mmrag.modeling import vision
from mmrag.modeling.clip_images import ClipRule, channels_first
from mmrag.modeling.image_rule import ImageRule
from mmrag.modeling.qwen_images import pixels_of, to_patches
from mmrag.modeling.vision import (
    add_features,
    attend_by_length,
    device_patches,
    quick_gelu_mlp,
    run_tower,
    speed_up,
    turned,
)

MODELS = {
    "qwen2_vl": (save_qwen2_vl, Qwen2VLModel, ImageRule(1, 10**6)),
    "qwen2_5_vl": (save_qwen2_5_vl, Qwen2_5_VLModel, ImageRule(1, 10**6)),
    "qwen3_vl": (save_qwen3_vl, Qwen3VLModel, ImageRule(1, 10**6, patch=16)),
}


def noise(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def numpy_patches(image, rule):
    """The published processors' arithmetic, in numpy and float32."""
    mean, std = np.array(rule.mean, np.float32), np.array(rule.std, np.float32)
    pixels = (np.asarray(image, dtype=np.float32) / np.float32(255) - mean) / std
    rows, columns = image.height // rule.patch, image.width // rule.patch
    m, p = rule.merge, rule.patch
    blocks = pixels.reshape(rows // m, m, p, columns // m, m, p, 3)
    blocks = blocks.transpose(0, 3, 1, 4, 6, 2, 5)
    frames = np.repeat(blocks[:, :, :, :, :, None], rule.temporal, axis=5)
    return frames.reshape(rows * columns, -1)


@pytest.mark.parametrize("rule", [rule for *_, rule in MODELS.values()])
def test_patches_are_bit_equal_to_the_published_arithmetic(rule):
    side = rule.factor
    images = [noise(3 * side, 2 * side, n) for n in (0, 1)] + [noise(side, 4 * side, 2)]
    images.insert(1, noise(5 * side, side, 3))
    expected = np.concatenate([numpy_patches(image, rule) for image in images])
    cut = device_patches([pixels_of(image) for image in images], rule, torch.device("cpu"))
    np.testing.assert_array_equal(cut.numpy(), expected)
    one, grid = to_patches(images[0], rule)
    np.testing.assert_array_equal(one.numpy(), numpy_patches(images[0], rule))
    assert grid == (1, 2 * side // rule.patch, 3 * side // rule.patch)


def test_clip_pixels_are_bit_equal_to_the_published_arithmetic():
    rule, image = ClipRule(28, 14), noise(40, 30)
    mean, std = np.array(rule.mean, np.float32), np.array(rule.std, np.float32)
    expected = (np.asarray(image, dtype=np.float32) / np.float32(255) - mean) / std
    got = rule.normalise(channels_first(image).unsqueeze(0))[0]
    np.testing.assert_array_equal(got.numpy(), expected.transpose(2, 0, 1))


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_towers_give_what_transformers_gives(name, tmp_path):
    save, model_class, rule = MODELS[name]
    folder = save(tmp_path / name)
    plain = model_class.from_pretrained(folder, dtype=torch.float32).eval().visual
    fast = model_class.from_pretrained(folder, dtype=torch.float32).eval().visual
    speed_up(fast)
    side = rule.factor
    sizes = [(4, 6), (2, 3), (4, 6), (7, 5), (2, 3), (1, 1)]  # in visual tokens
    images = [noise(w * side, h * side, n) for n, (w, h) in enumerate(sizes)]
    pixels = [pixels_of(image) for image in images]
    grids = torch.tensor([(1, i.shape[0] // rule.patch, i.shape[1] // rule.patch) for i in pixels])
    patches = torch.cat([to_patches(image, rule)[0] for image in images])
    expected, got = plain(patches, grid_thw=grids), run_tower(fast, pixels, rule)
    torch.testing.assert_close(got.pooler_output, expected.pooler_output, atol=1e-4, rtol=1e-4)
    layers = [getattr(output, "deepstack_features", []) for output in (got, expected)]
    for ours, theirs in zip(*layers, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    again = run_tower(pickle.loads(pickle.dumps(fast)), pixels, rule)
    torch.testing.assert_close(again.pooler_output, got.pooler_output)


@torch.no_grad()
def test_images_of_one_size_attend_in_one_call(tmp_path, monkeypatch):
    folder = save_qwen2_vl(tmp_path / "tiny")
    visual = Qwen2VLModel.from_pretrained(folder, dtype=torch.float32).eval().visual
    speed_up(visual)
    calls = []
    attend = vision._attend

    def spy(query, key, value, n, scale):
        calls.append(n)
        return attend(query, key, value, n, scale)

    monkeypatch.setattr(vision, "_attend", spy)
    rule = ImageRule(1, 10**6)
    images = [pixels_of(noise(56, 84, n)) for n in range(20)] + [pixels_of(noise(84, 84))]
    run_tower(visual, images, rule)
    assert sorted(calls) == [1] * len(visual.blocks) + [20] * len(visual.blocks)


def test_turning_and_quick_gelu_equal_the_published_arithmetic():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 2, 3, 8, generator=generator)
    angles = torch.randn(7, 4, generator=generator).repeat(1, 2)
    cos, sin = angles.cos(), angles.sin()
    expected = torch.stack(apply_rotary_pos_emb_vision(x[:, 0], x[:, 1], cos, sin), 1)
    torch.testing.assert_close(turned(x, cos, sin), expected, atol=1e-6, rtol=1e-6)
    half = turned(x.bfloat16(), cos, sin)
    torch.testing.assert_close(half, turned(x.bfloat16().float(), cos, sin).bfloat16())

    mlp = VisionMlp(8, 32, "quick_gelu")
    states = torch.randn(5, 8, generator=generator)
    torch.testing.assert_close(quick_gelu_mlp(mlp, states), mlp(states), atol=1e-6, rtol=1e-5)
    gradients = [
        torch.autograd.grad(f(states).sum(), mlp.fc1.weight)[0]
        for f in (mlp, partial(quick_gelu_mlp, mlp))
    ]
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-5)
    mlp.fc1 = torch.nn.Sequential(mlp.fc1)  # as an adapter takes its place
    torch.testing.assert_close(quick_gelu_mlp(mlp, states), mlp(states))


def test_segments_of_any_length_go_to_torch_in_one_call(monkeypatch):
    """The kernel runs on cards only: what it is given is checked against its description."""
    calls = []

    def by_segment(query, key, value, ends, key_ends, longest, longest_key):
        calls.append((ends.tolist(), longest))
        assert key_ends is ends and longest_key == longest and ends.dtype == torch.int32
        parts = [
            torch.nn.functional.scaled_dot_product_attention(
                *(t[a:b].transpose(0, 1) for t in (query, key, value))
            ).transpose(0, 1)
            for a, b in pairwise(ends.tolist())
        ]
        return torch.cat(parts)

    q, k, v = torch.randn(3, 12, 2, 8, generator=torch.Generator().manual_seed(0))
    expected = attend_by_length(q, k, v, [3, 5, 3, 1], 8**-0.5)
    monkeypatch.setattr(vision, "varlen_attn", by_segment)
    monkeypatch.setattr(vision, "has_varlen", lambda query, scale: True)
    torch.testing.assert_close(attend_by_length(q, k, v, [3, 5, 3, 1], 8**-0.5), expected)
    attend_by_length(q, k, v, [6, 6], 8**-0.5)  # of one length: no need for it
    attend_by_length(q, k, v, [12], 8**-0.5)
    assert calls == [([0, 3, 8, 11, 12], 5), ([0, 12], 12)]


def test_features_are_added_at_the_visual_tokens():
    hidden, places = torch.arange(12.0).view(2, 3, 2), torch.tensor([[0, 1, 0], [1, 1, 0]]).bool()
    expected = hidden.clone()
    features = torch.tensor([[1.0, 2], [3, 4], [5, 6]])
    expected[places] += features
    torch.testing.assert_close(add_features(hidden, places, features), expected)


def test_attention_stays_within_segments_and_can_be_differentiated():
    generator = torch.Generator().manual_seed(0)
    lengths = [3, 5, 3, 1]
    q, k, v = (torch.randn(12, 2, 4, generator=generator, requires_grad=True) for _ in range(3))
    got = attend_by_length(q, k, v, lengths, 0.5)
    start = 0
    for length in lengths:
        part = slice(start, start + length)
        weights = torch.einsum("qhd,khd->hqk", q[part], k[part]).mul(0.5).softmax(-1)
        expected = torch.einsum("hqk,khd->qhd", weights, v[part])
        torch.testing.assert_close(got[part], expected)
        start += length
    got.square().sum().backward()
    assert all(tensor.grad.abs().sum() > 0 for tensor in (q, k, v))
