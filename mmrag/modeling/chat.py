"""Chat models: their processors, prompts and answer words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import (
    PreTrainedTokenizerBase,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLForConditionalGeneration,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.auto import AutoProcessor

from mmrag.errors import ModelError


def process(processor: Any, texts: Sequence[str], images: Sequence[Sequence[Image.Image]]) -> Any:
    """A model's inputs from prompts, each with its images in order, padded on the right."""
    bos = processor.tokenizer.bos_token
    return processor(
        text=list(texts),
        **({"images": images} if any(images) else {}),
        return_tensors="pt",
        padding=True,
        padding_side="right",
        # Some templates write the begin token themselves; two of them change the answer.
        add_special_tokens=not (bos and texts[0].startswith(bos)),
    )


def load_processor(folder: Path, name: str) -> Any:
    """The processor of a checkpoint. Raises ModelError if it cannot be used, or cannot chat."""
    try:
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exception
        raise ModelError(
            f"{name}: its processor cannot be loaded ({error}). Serve the model with vLLM or the "
            "like and give base_url."
        ) from error
    if getattr(processor, "chat_template", None) is None or not hasattr(processor, "tokenizer"):
        raise ModelError(
            f"{name}: it has no processor with a chat template, so it cannot be asked."
        )
    return processor


# model_type: class and the system turn that its own chat template puts in
NATIVE: dict[str, tuple[Any, str | None]] = {
    "qwen2_vl": (Qwen2VLForConditionalGeneration, "You are a helpful assistant."),
    "qwen2_5_vl": (Qwen2_5_VLForConditionalGeneration, "You are a helpful assistant."),
    "qwen3_vl": (Qwen3VLForConditionalGeneration, None),
}


def answer_ids(
    tokenizer: PreTrainedTokenizerBase, answers: tuple[str, str], name: str
) -> tuple[int, int]:
    """Token ids of the two words as they stand right behind the assistant's turn.

    Raises:
        ModelError: If a word is not exactly one token.
    """
    found = []
    for word in answers:
        ids = tokenizer(word, add_special_tokens=False)["input_ids"]
        # The score is read from one position: the first piece of a longer word would be shared by
        # others.
        if len(ids) != 1 or tokenizer.decode(ids) != word:
            raise ModelError(
                f"{name}: the answer {word!r} is not one token to this model; give a RerankPrompt "
                "with two answers that are, such as yes and no."
            )
        found.append(int(ids[0]))
    return found[0], found[1]


def special_marks(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """The strings that a tokenizer takes for control tokens wherever they stand."""
    # All added ones, not only all_special_tokens, which misses markers such as <|im_start|> in some
    # files.
    added = tokenizer.added_tokens_decoder.values()
    return tuple(str(token) for token in added if token.special)
