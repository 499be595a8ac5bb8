"""Further single-vector embedders on Qwen2-VL, each a recipe: Ops-MM, DSE, vdr, LamRA, UNITE.

Sources: the inference code published with OpenSearch-AI/Ops-MM-embedding-v1, the model card of
MrLight/dse-qwen2-2b-mrl-v1 (DSE, arXiv 2406.11251), those of llamaindex/vdr-2b-multi-v1 and
marco/mcdse-2b-v1, the demo of LamRA (arXiv 2412.01720) and
that of UNITE (arXiv 2505.19650).
"""

from __future__ import annotations

from pathlib import Path

from mmrag.content import Content, Modality
from mmrag.embedders.families.gme import GME_DEFAULT, gme_prompt
from mmrag.modeling.loading import Placement
from mmrag.modeling.prompts import Prompt
from mmrag.modeling.qwen_vl import (
    IMAGE_BLOCK,
    QwenBackbone,
    Recipe,
    as_it_is,
    load_qwen,
    qwen_fetch_size,
)

_SYSTEM = f"<|im_start|>system\n{GME_DEFAULT}<|im_end|>\n<|im_start|>user\n"
_ASSISTANT = "<|im_end|>\n<|im_start|>assistant\n"
_END = "<|endoftext|>"


def load_ops_mm(
    folder: Path,
    placement: Placement,
    *,
    max_length: int = 8192,
    min_image_tokens: int = 256,
    max_image_tokens: int = 1280,
) -> QwenBackbone:
    """Load Ops-MM-embedding-v1-2B/7B: GME's prompt, with M-RoPE positions."""
    recipe = Recipe("ops_mm", gme_prompt, as_it_is, max_length, mrope=True)
    return load_qwen(folder, placement, recipe, min_image_tokens, max_image_tokens)


def load_dse(
    folder: Path,
    placement: Placement,
    *,
    max_length: int = 8192,
    min_image_tokens: int = 1,
    max_image_tokens: int = 2560,
) -> QwenBackbone:
    """Load dse-qwen2-2b-mrl-v1: M-RoPE positions, and a small black image beside every text.

    It was trained without instructions: whichever one comes marks a query, and is not shown.
    """
    modalities: frozenset[Modality] = frozenset({"text", "image"})
    recipe = Recipe("dse", dse_prompt, qwen_fetch_size, max_length, mrope=True, blank=(56, 56))
    return load_qwen(
        folder, placement, recipe, min_image_tokens, max_image_tokens, modalities=modalities
    )


def load_vdr(
    folder: Path,
    placement: Placement,
    *,
    max_length: int = 8192,
    min_image_tokens: int = 1,
    max_image_tokens: int = 768,
) -> QwenBackbone:
    """Load vdr-2b-multi-v1 or vdr-2b-v1: DSE, trained on with a prompt without assistant turn."""
    modalities: frozenset[Modality] = frozenset({"text", "image"})
    recipe = Recipe("vdr", vdr_prompt, as_it_is, max_length, mrope=True, blank=(56, 56))
    return load_qwen(
        folder, placement, recipe, min_image_tokens, max_image_tokens, modalities=modalities
    )


def load_mcdse(
    folder: Path,
    placement: Placement,
    *,
    max_length: int = 8192,
    min_image_tokens: int = 1,
    max_image_tokens: int = 960,
) -> QwenBackbone:
    """Load mcdse-2b-v1, the forerunner of vdr-2b with larger images."""
    modalities: frozenset[Modality] = frozenset({"text", "image"})
    recipe = Recipe("mcdse", vdr_prompt, as_it_is, max_length, mrope=True, blank=(56, 56))
    return load_qwen(
        folder, placement, recipe, min_image_tokens, max_image_tokens, modalities=modalities
    )


def load_lamra(
    folder: Path,
    placement: Placement,
    *,
    max_length: int = 32768,
    min_image_tokens: int | None = None,
    max_image_tokens: int | None = None,
) -> QwenBackbone:
    """Load LamRA-Ret. Bounds of images are the checkpoint's own: up to 16384 tokens each.

    Positions are plain, as in its training code; its demo has M-RoPE under later transformers.
    """
    recipe = Recipe("lamra", lamra_prompt, qwen_fetch_size, max_length)
    return load_qwen(folder, placement, recipe, min_image_tokens, max_image_tokens)


def load_unite(
    folder: Path,
    placement: Placement,
    *,
    max_length: int = 8192,
    min_image_tokens: int = 256,
    max_image_tokens: int = 1280,
) -> QwenBackbone:
    """Load Unite-Base-Qwen2-VL or Unite-Instruct-Qwen2-VL, 2B or 7B."""
    recipe = Recipe("unite", unite_prompt, qwen_fetch_size, max_length)
    return load_qwen(folder, placement, recipe, min_image_tokens, max_image_tokens)


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
    if not content.images:
        return "sentence"
    return both if words else "image"


def _summary(content: Content, instruction: str | None, question: str, end: str) -> Prompt:
    """Image, then the instruction and the text, then the question that sums them up."""
    text = content.text or ""
    task = (instruction or "") + (" " if instruction and text else "")
    image = IMAGE_BLOCK if content.images else ""
    return Prompt(_SYSTEM + image + task, text, question + end)
