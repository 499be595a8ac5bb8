"""Further single-vector embedders on Qwen2-VL, each a recipe: Ops-MM, DSE, vdr, LamRA, UNITE.

Sources: the inference code published with OpenSearch-AI/Ops-MM-embedding-v1, the model card of
MrLight/dse-qwen2-2b-mrl-v1 (DSE, arXiv 2406.11251), those of llamaindex/vdr-2b-multi-v1 and
marco/mcdse-2b-v1, the demo of LamRA (arXiv 2412.01720) and
that of UNITE (arXiv 2505.19650).
"""

from __future__ import annotations

from mmrag.content import Content, Modality
from mmrag.embedders.families.gme import GME_DEFAULT, gme_prompt
from mmrag.modeling.prompts import Prompt
from mmrag.modeling.qwen_clips import VIDEO_BLOCK, ClipRule
from mmrag.modeling.qwen_vl import (
    IMAGE_BLOCK,
    Recipe,
    as_it_is,
    qwen_fetch_size,
    qwen_loader,
)

_SYSTEM = f"<|im_start|>system\n{GME_DEFAULT}<|im_end|>\n<|im_start|>user\n"
_ASSISTANT = "<|im_end|>\n<|im_start|>assistant\n"
_END = "<|endoftext|>"


def dse_prompt(content: Content, instruction: str | None) -> Prompt:
    """DSE's literal prompt; the image is the black one where the content has none."""
    before, text = _SYSTEM + IMAGE_BLOCK, content.text or ""
    if content.images:
        before += "What is shown in this image?"
    else:
        before += "Document: " if instruction is None else "Query: "
    return Prompt(before, text, _ASSISTANT + _END)


def vdr_prompt(content: Content, instruction: str | None) -> Prompt:
    """DSE's literal prompt without the assistant's turn, as the cards of vdr-2b and mcdse have it.

    They have no form for a text as a document, so that DSE's stands in.
    """
    prompt = dse_prompt(content, instruction)
    return Prompt(prompt.before, prompt.text, f"<|im_end|>\n{_END}")


def lamra_prompt(content: Content, instruction: str | None) -> Prompt:
    """LamRA's literal prompt up to the token it pools.

    The reference goes on with ``<emb>.`` and takes the state before ``<emb>``, which under
    causal attention does not see it.
    """
    words = bool(content.text or instruction)
    question = f"\nSummarize above {_parts(content, words, 'image and sentence')} in one word: "
    return _summary(content, instruction, question, _ASSISTANT)


def unite_prompt(content: Content, instruction: str | None) -> Prompt:
    """UNITE's literal prompt."""
    words = bool(content.text or instruction)
    question = f"\nSummary above {_parts(content, words, 'sentence and image')} in one word:"
    return _summary(content, instruction, question, _ASSISTANT + _END)


def _parts(content: Content, words: bool, both: str) -> str:
    if not content.images and content.clip is None:
        return "sentence"
    seen = "image" if content.images else "video"
    return both.replace("image", seen) if words else seen


def _summary(content: Content, instruction: str | None, question: str, end: str) -> Prompt:
    """Image or clip, then the instruction and the text, then the question that sums them up."""
    text = content.text or ""
    task = (instruction or "") + (" " if instruction and text else "")
    image = IMAGE_BLOCK if content.images else ""
    clip = VIDEO_BLOCK if content.clip else ""
    return Prompt(_SYSTEM + clip + image + task, text, question + end)


_PAGES: frozenset[Modality] = frozenset({"text", "image"})

# Which prompt, size before the image rule, positions and bounds of an image each family has, as
# its published inference code sets them; what differs from GME's recipe is said beside it.

# GME's prompt, with M-RoPE positions.
load_ops_mm = qwen_loader(Recipe("ops_mm", gme_prompt, as_it_is, 8192, mrope=True), 256, 1280)

# A small black image stands beside every text. It was trained without instructions: whichever
# one comes marks a query, and is not shown.
load_dse = qwen_loader(
    Recipe("dse", dse_prompt, qwen_fetch_size, 8192, mrope=True, blank=(56, 56)),
    1,
    2560,
    modalities=_PAGES,
)

# vdr-2b-multi-v1 and vdr-2b-v1: DSE, trained on with a prompt without the assistant's turn.
load_vdr = qwen_loader(
    Recipe("vdr", vdr_prompt, as_it_is, 8192, mrope=True, blank=(56, 56)), 1, 768, modalities=_PAGES
)

# The forerunner of vdr-2b, with larger images.
load_mcdse = qwen_loader(
    Recipe("mcdse", vdr_prompt, as_it_is, 8192, mrope=True, blank=(56, 56)),
    1,
    960,
    modalities=_PAGES,
)

# Bounds of images are the checkpoint's own: up to 16384 tokens each. Positions are plain, as in
# its training code; its demo has M-RoPE under later transformers.
load_lamra = qwen_loader(Recipe("lamra", lamra_prompt, qwen_fetch_size, 32768), None, None)

# Unite-Base-Qwen2-VL and Unite-Instruct-Qwen2-VL, 2B and 7B. Frames of clips are resized twice: as
# its demo asks of ``fetch_video``, then by the processor, to the bounds of images.
load_unite = qwen_loader(
    Recipe(
        "unite",
        unite_prompt,
        qwen_fetch_size,
        8192,
        clips=ClipRule(32, frame=(128 * 28 * 28, 360 * 420)),
    ),
    256,
    1280,
)
