"""Prompts that more than one architecture shares, and tokenising them within a limit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mmrag.content import Content
from mmrag.errors import ConfigError, ContentError, ModelError

PromptStyle: TypeAlias = Literal["demo", "mmeb"]

REPRESENT = "Represent the given image."
REPRESENT_WITH_TEXT = "Represent the given image with related text information:"


def vlm2vec_prompt(
    content: Content, instruction: str | None, image_token: str, style: PromptStyle = "demo"
) -> Prompt:
    """VLM2Vec's literal prompt (arXiv 2410.05160): image, instruction, text, no chat template.

    The style ``demo`` is that of the published examples; ``mmeb`` that of the MMEB evaluation,
    with a newline after the image and one at the end, which is then the token pooled. A
    image without an instruction gets the one that MMEB gives to targets.
    """
    if style not in ("demo", "mmeb"):
        raise ConfigError(f"style={style!r} is not known: use demo or mmeb.")
    text = content.text or ""
    if content.images and not instruction:
        instruction = REPRESENT_WITH_TEXT if text else REPRESENT
    image = image_token + (" " if style == "demo" else "\n") if content.images else ""
    task = (instruction or "") + (" " if instruction and text else "")
    return Prompt(image + task, text, "\n" if style == "mmeb" and instruction else "")


def load_fast_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load ``tokenizer.json`` as it is; AutoTokenizer would ask to run code of some checkpoints.

    Raises: ModelError if it is missing or broken.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = PreTrainedTokenizerFast.from_pretrained(
            folder, local_files_only=True
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: tokenizer.json is missing or broken ({error}).") from error
    return tokenizer


def tokenize(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, room: int) -> list[int]:
    """Ids of a prompt, with those the tokenizer adds, cut to ``room`` at the end of its text.

    Raises: ContentError if all of the text is not enough to cut.
    """
    encoded = tokenizer(str(prompt), return_offsets_mapping=True, verbose=False)
    ids: list[int] = encoded["input_ids"]
    excess = len(ids) - room
    if excess <= 0:
        return ids
    first, end = len(prompt.before), len(prompt.before) + len(prompt.text)
    spans = encoded["offset_mapping"]
    text = [i for i, (start, stop) in enumerate(spans) if first <= start < stop <= end]
    if excess > len(text):
        raise ContentError(
            "the image and the instruction alone are over max_length; raise max_length."
        )
    dropped = set(text[len(text) - excess :])
    return [token for i, token in enumerate(ids) if i not in dropped]


def without_token(content: Content, token: str) -> Content:
    """Break up an image placeholder that stands in the text itself: it would pass for one."""
    if content.text is None or token not in content.text:
        return content
    broken = content.text.replace(token, f"{token[0]} {token[1:]}")
    return Content(broken, content.image, content.instruction)


@dataclass(frozen=True, slots=True)
class Prompt:
    """The literal string for the tokenizer in three parts; only ``text`` may be cut."""

    before: str
    text: str
    after: str

    def __str__(self) -> str:
        return self.before + self.text + self.after
