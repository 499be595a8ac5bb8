"""Clips for VLM2Vec-V2.0 and UNITE: exact against an independent computation of their recipes."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoTokenizer, Qwen2VLModel

from mmrag.content import Clip, Content
from mmrag.embedders import load_embedder
from mmrag.errors import ContentError
from mmrag.modeling.backbone import inputs_of
from mmrag.modeling.image_rule import CLIP_MEAN, CLIP_STD
from mmrag.modeling.qwen_images import cut_patches

V2_TASK = "Understand the content of the provided video."
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
VIDEO_BLOCK = "<|vision_start|><|video_pad|><|vision_end|>"
END = " in one word:<|im_end|>\n<|im_start|>assistant\n<|endoftext|>"


def moving(n, size=(150, 90)):
    """Frames of blocks of colour, each frame another."""
    width, height = size
    blocks = np.random.default_rng(n).integers(0, 255, (n, height // 8 + 1, width // 8 + 1, 3))
    pixels = blocks.astype(np.uint8).repeat(8, axis=1).repeat(8, axis=2)[:, :height, :width]
    return [Image.fromarray(each) for each in pixels]


def clip_of(frames):
    return Clip(frames, [float(second) for second in range(len(frames))])


SIX, THREE, TWELVE = moving(6), moving(3, (640, 480)), moving(12)
PLACES = [0, 1, 3, 4, 6, 7, 9, 11]  # of 8 frames among 12

# Family and options, content, literal prompt, frames seen, and their width and height after
# fetch_video and after the processor: the formula of qwen-vl-utils 0.0.8 with the bounds of each.
CASES = [
    ("vlm2vec_v2", {}, Content(clip=clip_of(SIX)), f"<|video_pad|> {V2_TASK}", SIX,
     (420, 252), (420, 252)),
    ("vlm2vec_v2", {}, Content("a cat", None, "Find the clip:", clip_of(THREE)),
     "<|video_pad|> Find the clip: a cat", [*THREE, THREE[-1]], (448, 336), (448, 336)),
    ("vlm2vec_v2", {"style": "mmeb"}, Content("a cat", clip=clip_of(TWELVE)),
     f"<|video_pad|> {V2_TASK} a cat", [TWELVE[place] for place in PLACES], (150, 90), (140, 84)),
    ("unite", {}, Content(clip=clip_of(SIX)),
     f"{SYSTEM}{VIDEO_BLOCK}\nSummary above video{END}", SIX, (420, 252), (588, 364)),
    ("unite", {}, Content("a cat", None, "Find it.", clip_of(THREE)),
     f"{SYSTEM}{VIDEO_BLOCK}Find it. a cat\nSummary above sentence and video{END}",
     [*THREE, THREE[-1]], (448, 336), (532, 392)),
]  # fmt: skip


def resized(image, size, again):
    """As torchvision resizes bytes, then as Pillow does."""
    pixels = torch.from_numpy(np.array(image))
    if size != image.size:
        planes = pixels.permute(2, 0, 1)[None].to(torch.float32)
        larger = F.interpolate(planes, size[::-1], mode="bicubic", antialias=True)
        pixels = larger[0].clamp(0, 255).round().to(torch.uint8).permute(1, 2, 0)
    return np.array(Image.fromarray(pixels.numpy()).resize(again, Image.Resampling.BICUBIC))


def patches_of(frames):
    """As the published image processors cut a video into patches; and its grid."""
    pixels = (np.stack(frames) / 255 - np.array(CLIP_MEAN)) / np.array(CLIP_STD)
    n, height, width, _ = pixels.shape
    grid = (n // 2, height // 14, width // 14)
    pixels = pixels.transpose(0, 3, 1, 2)
    cut = pixels.reshape(grid[0], 2, 3, grid[1] // 2, 2, 14, grid[2] // 2, 2, 14)
    cut = cut.transpose(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(np.prod(grid), -1)
    return torch.from_numpy(cut).float(), torch.tensor([grid])


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "options", "content", "prompt", "frames", "first", "size"), CASES
)
def test_clips_equal_an_independent_computation(
    qwen2_vl_folder, family, options, content, prompt, frames, first, size
):
    embedder = load_embedder(
        qwen2_vl_folder, family=family, device="cpu", dtype="float32", **options
    )
    backbone = embedder.backbone
    assert str(backbone.recipe.render(content, content.instruction)) == prompt
    patches, grid = patches_of([resized(frame, first, size) for frame in frames])

    tokenizer = AutoTokenizer.from_pretrained(qwen2_vl_folder)
    model = Qwen2VLModel.from_pretrained(qwen2_vl_folder, dtype=torch.float32).eval()
    n_tokens = int(grid.prod()) // 4
    widened = prompt.replace("<|video_pad|>", "<|video_pad|>" * n_tokens)
    ids = tokenizer(widened, return_tensors="pt")["input_ids"]
    # The published models compute no three-axis positions, of videos no more than of images.
    positions = torch.arange(ids.shape[1]).expand(3, 1, -1)
    output = model(
        input_ids=ids,
        position_ids=positions,
        pixel_values_videos=patches,
        video_grid_thw=grid,
        mm_token_type_ids=2 * (ids == model.config.video_token_id).int(),
    )
    expected = output.last_hidden_state[0, -1].numpy()
    expected /= np.linalg.norm(expected)

    item = inputs_of(backbone, content, content.instruction)
    assert item.ids.tolist() == ids[0].tolist()
    assert backbone.plan(content, content.instruction).n_tokens == len(item.ids)
    seen = torch.cat([cut_patches(pair[None], backbone.rule) for pair in item.images])
    torch.testing.assert_close(seen, patches, atol=1e-5, rtol=0)
    together = embedder.encode([content, Content("a text"), Content(image=SIX[0])])
    assert together[0] @ expected >= 0.99999
    assert embedder.encode([content])[0] @ expected >= 0.99999


@pytest.mark.parametrize(
    ("family", "options", "n_pairs"),
    [("vlm2vec_v2", {}, 21), ("vlm2vec_v2", {"style": "mmeb"}, 4), ("unite", {}, 16)],
)
def test_how_many_frames_are_seen(qwen2_vl_folder, family, options, n_pairs):
    backbone = load_embedder(qwen2_vl_folder, family=family, device="cpu", **options).backbone
    frames = moving(41, (56, 56))
    plan = backbone.plan(Content(clip=clip_of(frames)), None)
    assert len(plan.sizes) == n_pairs
    of_one = (plan.sizes[0][0] // 28) * (plan.sizes[0][1] // 28)
    assert plan.ids.count(backbone.model.config.video_token_id) == n_pairs * of_one
    assert plan.content.clip.frames[0] is frames[0]
    assert plan.content.clip.frames[-1] is frames[-1]


@pytest.mark.parametrize("family", ["vlm2vec_v2", "unite"])
def test_an_image_beside_a_clip_and_a_clip_that_is_too_long_are_refused(qwen2_vl_folder, family):
    embedder = load_embedder(qwen2_vl_folder, family=family, device="cpu", max_length=400)
    both = Content(image=SIX[0], clip=clip_of(SIX[:2]))
    with pytest.raises(ContentError, match="takes 1 image per item, got 2, the clip included"):
        embedder.encode([both])
    embedder.encode([both.clip])
    with pytest.raises(ContentError, match="fewer frames of a clip"):
        embedder.encode([clip_of(SIX)])


@pytest.mark.parametrize("family", ["gme", "vlm2vec_qwen2vl", "lamra", "ops_mm"])
def test_other_families_take_no_clips(qwen2_vl_folder, family):
    embedder = load_embedder(qwen2_vl_folder, family=family, device="cpu")
    with pytest.raises(ContentError, match="cannot embed clip"):
        embedder.encode([clip_of(SIX)])
    # Training asks the backbone, whose prompt would leave the clip out.
    with pytest.raises(ContentError, match="takes no clips"):
        embedder.backbone.plan(Content("a text", clip=clip_of(SIX)), None)
