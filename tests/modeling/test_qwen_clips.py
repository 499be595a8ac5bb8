"""Clips: which frames Qwen3-VL is shown, at which size, and under which times."""

import numpy as np
import pytest
import torch
from PIL import Image

from mmrag.content import Clip, Content
from mmrag.embedders.families.qwen3_vl import CLIPS
from mmrag.errors import ContentError
from mmrag.modeling.image_rule import ImageRule
from mmrag.modeling.qwen_clips import resize_frame, seen_clip, with_even_frames
from mmrag.modeling.qwen_images import cut_patches, pixels_of

RULE = ImageRule(min_pixels=0, max_pixels=0, patch=16, mean=(0.5, 0.4, 0.3), std=(0.5, 0.6, 0.7))


def clip_of(n: int, size: tuple[int, int] = (64, 64)) -> Clip:
    return Clip([Image.new("RGB", size, (i, 0, 0)) for i in range(n)], [float(i) for i in range(n)])


# Computed by fetch_video of qwen-vl-utils 0.0.14, total_pixels=7864320 above 20 frames.
@pytest.mark.parametrize(
    ("n", "size", "expected"),
    [
        (4, (150, 90), (480, 288)),
        (20, (640, 360), (640, 352)),
        (20, (1920, 1080), (1152, 640)),
        (64, (1280, 720), (640, 352)),
        (10, (1200, 97), (1280, 128)),
        (30, (270, 480), (288, 512)),
    ],
)
def test_frames_have_the_size_of_the_reference_code(n, size, expected):
    assert seen_clip(Content(clip=clip_of(n, size)), CLIPS, RULE)[1] == (expected,) * (n // 2)


def test_frames_are_resized_as_pillow_does_but_for_rounding():
    # Of little contrast: Pillow clips what overshoots between the two directions, too.
    noise = np.random.default_rng(0).integers(90, 160, (45, 75, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    for size in ((480, 288), (32, 32)):
        ours = resize_frame(pixels_of(image), size).int()
        theirs = pixels_of(image.resize(size, Image.Resampling.BICUBIC)).int()
        assert (ours - theirs).abs().max() <= 2
    assert torch.equal(resize_frame(pixels_of(image), image.size), pixels_of(image))


def test_long_clips_are_thinned_out_and_odd_ones_filled_up():
    long = with_even_frames(clip_of(100), 64)
    assert list(long.seconds) == np.linspace(0, 99, 64, dtype=int).tolist()
    assert [frame.getpixel((0, 0))[0] for frame in long.frames] == list(long.seconds)
    odd = with_even_frames(clip_of(3), 64)
    assert list(odd.seconds) == [0, 1, 2, 2]
    assert odd.frames[2] is odd.frames[3]
    assert with_even_frames(odd, 64) == odd


def test_a_pair_of_equal_frames_is_an_image():
    pixels = torch.randint(0, 255, (1, 32, 64, 3), dtype=torch.uint8)
    pair = torch.stack([pixels, pixels], dim=1)
    assert torch.equal(cut_patches(pair, RULE), cut_patches(pixels, RULE))


def test_frames_of_different_sizes_are_refused():
    frames = [Image.new("RGB", (8, 8)), Image.new("RGB", (9, 8))]
    with pytest.raises(ContentError, match="one size"):
        seen_clip(Content(clip=Clip(frames, [0, 1])), CLIPS, RULE)
