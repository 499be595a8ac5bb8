"""Prompts that more than one architecture shares, and tokenising them within a limit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from transformers import PreTrainedTokenizerBase

from mmrag.content import Content
from mmrag.errors import ConfigError, ContentError
from mmrag.prompting import broken_up

PromptStyle: TypeAlias = Literal["demo", "mmeb"]

REPRESENT = "Represent the given image."
REPRESENT_WITH_TEXT = "Represent the given image with related text information:"


@dataclass(frozen=True, slots=True)
class Prompt:
    """The literal string for the tokenizer in three parts; only ``text`` may be cut."""

    before: str
    text: str
    after: str

    def __str__(self) -> str:
        return self.before + self.text + self.after


def vlm2vec_prompt(
    content: Content, instruction: str | None, image_token: str, style: PromptStyle = "demo"
) -> Prompt:
    """VLM2Vec's literal prompt (arXiv 2410.05160): image, instruction, text, no chat template.

    The style ``demo`` is that of the published examples; ``mmeb`` that of the MMEB evaluation,
    with a newline after the image and one at the end, which is then the token pooled. An
    image without an instruction gets the one that MMEB gives to targets.

    Raises:
        ConfigError: For another ``style``.
    """
    if style not in ("demo", "mmeb"):
        raise ConfigError(f"style={style!r} is not known: use demo or mmeb.")
    text = content.text or ""
    image = ""
    if content.images:
        instruction = instruction or (REPRESENT_WITH_TEXT if text else REPRESENT)
        image = image_token + (" " if style == "demo" else "\n")
    if not instruction:
        return Prompt(image, text, "")
    task = f"{instruction} " if text else instruction
    return Prompt(image + task, text, "\n" if style == "mmeb" else "")


def harmless(
    content: Content, instruction: str | None, placeholders: Sequence[str]
) -> tuple[Content, str | None]:
    """Text and instruction with image placeholders spelt apart: they would pass for images."""
    text = None if content.text is None else broken_up(content.text, placeholders)
    task = None if instruction is None else broken_up(instruction, placeholders)
    return replace(content, text=text, instruction=task), task


def tokenize(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    room: int,
    *,
    special: bool = True,
    keep_end: bool = True,
) -> list[int]:
    """Ids of a prompt, cut to ``room`` at the end of its text.

    Args:
        special: with the ids that the tokenizer adds by itself.
        keep_end: cut before the prompt's end, not together with it.

    Raises:
        ContentError: If all of the text is not enough to cut.
    """
    whole = str(prompt)
    # Tokenised whole, since pieces of a string tokenise differently at their seams. verbose=False:
    # a long text is cut below, so a warning about its length would mislead.
    ids: list[int] = tokenizer(whole, add_special_tokens=special, verbose=False)["input_ids"]
    excess = len(ids) - room
    if excess <= 0:
        return ids
    # Only an over-long text needs to know which of its ids may go.
    spans = tokenizer(
        whole, add_special_tokens=special, return_offsets_mapping=True, verbose=False
    )["offset_mapping"]
    first = len(prompt.before)
    end = first + len(prompt.text) if keep_end else len(whole)
    text = [i for i, (start, stop) in enumerate(spans) if first <= start < stop <= end]
    # Neither image tokens nor the end, which is pooled, may go.
    if excess > len(text):
        raise ContentError(
            "the images and the instruction alone are over max_length; raise max_length, lower "
            "max_image_tokens, or give fewer frames of a clip."
        )
    dropped = set(text[len(text) - excess :])
    return [token for i, token in enumerate(ids) if i not in dropped]


def expand(ids: Sequence[int], image_id: int, counts: Sequence[int]) -> list[int]:
    """Widen each image placeholder to its number of visual tokens."""
    remaining = iter(counts)
    return [
        token
        for original in ids
        for token in ([original] * next(remaining) if original == image_id else [original])
    ]
