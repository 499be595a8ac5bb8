"""VLM2Vec on Qwen2-VL: v1 (2B and 7B) and V2.0, as adapters or merged into their base.

There is no chat template, and no marks around the image: ``<|image_pad|> {instruction}
{text}``. The reference code counts images by those marks, so its positions are plain.

V2.0 takes clips: ``<|video_pad|> {instruction} {text}``. The style ``demo`` sees a frame a second,
as the published example of a video file does, each of 128 visual tokens to 360 x 420 pixels;
``mmeb`` sees 8 frames, sized as images, as the MMEB-V2 evaluation and the training do. The
instruction of a clip that comes without one is that of the evaluation's video retrieval. No item
there has a clip and an image; it is refused.

Source: VLM2Vec (arXiv 2410.05160), VLM2Vec-V2 (arXiv 2507.04590) and TIGER-AI-Lab/VLM2Vec.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from mmrag.content import Content
from mmrag.modeling.loading import Placement
from mmrag.modeling.prompts import REPRESENT, Prompt, PromptStyle, vlm2vec_prompt
from mmrag.modeling.qwen_clips import VIDEO, ClipRule
from mmrag.modeling.qwen_vl import IMAGE, QwenBackbone, Recipe, load_qwen

UNDERSTAND = "Understand the content of the provided document image."
UNDERSTAND_CLIP = "Understand the content of the provided video."

# What the reference code sets, whatever the checkpoint's own file says.
MIN_IMAGE_TOKENS = 4
MAX_IMAGE_TOKENS = 1280
_LEAST_SIDE = 28
CLIPS: dict[str, ClipRule] = {
    "demo": ClipRule(768, frame=(128 * 28 * 28, 360 * 420)),
    "mmeb": ClipRule(8),
}


def load_vlm2vec_v1(
    folder: Path,
    placement: Placement,
    *,
    style: PromptStyle = "demo",
    squash: int | None = None,
    max_length: int = 8192,
    min_image_tokens: int = MIN_IMAGE_TOKENS,
    max_image_tokens: int = MAX_IMAGE_TOKENS,
) -> QwenBackbone:
    """Load VLM2Vec-Qwen2VL-2B/7B.

    ``squash``: side in pixels of the square that every image is resized to first; the MMEB
    evaluation of v1 has 1344.
    """
    recipe = Recipe(
        "vlm2vec_qwen2vl",
        partial(render, for_image=REPRESENT, style=style),
        partial(fit, squash=squash),
        max_length,
    )
    return load_qwen(folder, placement, recipe, min_image_tokens, max_image_tokens)


def load_vlm2vec_v2(
    folder: Path,
    placement: Placement,
    *,
    style: PromptStyle = "demo",
    max_length: int = 8192,
    min_image_tokens: int = MIN_IMAGE_TOKENS,
    max_image_tokens: int = MAX_IMAGE_TOKENS,
) -> QwenBackbone:
    """Load VLM2Vec-V2.0."""
    recipe = Recipe(
        "vlm2vec_v2",
        partial(render, for_image=UNDERSTAND, style=style),
        partial(fit, squash=None),
        max_length,
        clips=CLIPS.get(style),  # the prompt refuses other styles
    )
    return load_qwen(folder, placement, recipe, min_image_tokens, max_image_tokens)


def render(
    content: Content, instruction: str | None, *, for_image: str, style: PromptStyle
) -> Prompt:
    """The literal prompt; ``for_image`` is the instruction of an image that comes without."""
    if content.clip is not None:
        # Without newlines in both styles: the evaluation has them for images alone.
        text = content.text or ""
        return Prompt(f"{VIDEO} {instruction or UNDERSTAND_CLIP}{' ' * bool(text)}", text, "")
    if content.modality == "image":
        instruction = instruction or for_image
    prompt = vlm2vec_prompt(content, instruction, IMAGE, style)
    # Nothing at all is no input to the reference code; a newline makes it one.
    return prompt if str(prompt) else Prompt("", "", "\n")


def fit(width: int, height: int, *, squash: int | None) -> tuple[int, int]:
    """Size before the common image rule: an image thinner than a patch becomes 56x56."""
    if squash is not None:
        return squash, squash
    return (56, 56) if min(width, height) < _LEAST_SIDE else (width, height)
