"""Loading a tokenizer, and making sure that it is the one its model was trained with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mmrag.errors import ModelError
from mmrag.modeling.checkpoints import read_json

_PROBE = "the page shows a table of words and numbers"
_MOST_ADDED = 64  # tokens beyond the embedding table, such as a padding that is never embedded


def load_tokenizer(
    folder: Path, *, rows: int, tokens: Mapping[str, int] | None = None
) -> PreTrainedTokenizerBase:
    """Load ``tokenizer.json`` as it is, or build a tokenizer from older files.

    Args:
        rows: of the model's token embeddings.
        tokens: special tokens with the ids that the model's configuration gives them.

    Raises:
        ModelError: If the files are missing or broken, or belong to another model.
    """
    # AutoTokenizer asks to run the code of some checkpoints, and makes up an empty tokenizer where
    # files are missing: every text then has one and the same vector.
    if (folder / "tokenizer.json").is_file():
        # For its errors: a git-lfs pointer or half a file raises ours, which says what to do.
        read_json(folder / "tokenizer.json")
        loader: Any = PreTrainedTokenizerFast
    elif (folder / "vocab.json").is_file() or (folder / "tokenizer.model").is_file():
        loader = AutoTokenizer
    else:
        raise ModelError(
            f"{folder}: tokenizer.json is missing; the checkpoint is incomplete. Download it again."
        )
    try:
        tokenizer: PreTrainedTokenizerBase = loader.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exception
        raise ModelError(f"{folder}: its tokenizer files are broken ({error}).") from error
    check_tokenizer(tokenizer, str(folder), rows=rows, tokens=tokens)
    return tokenizer


def check_tokenizer(
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    *,
    rows: int,
    tokens: Mapping[str, int] | None = None,
) -> None:
    """Raise ModelError for a tokenizer that is empty or belongs to another model."""
    ids = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
    if not set(ids) - {tokenizer.unk_token_id}:
        raise ModelError(f"{name}: its tokenizer has no vocabulary; its files are incomplete.")
    for token, expected in (tokens or {}).items():
        found = tokenizer.convert_tokens_to_ids(token)
        if found != expected:
            raise ModelError(
                f"{name}: the tokenizer of another model: {token} is {found} to it and {expected} "
                "in config.json. Restore the checkpoint's own tokenizer files."
            )
    if max(ids) >= rows or len(tokenizer) > rows + _MOST_ADDED:
        raise ModelError(
            f"{name}: the tokenizer of another model: it has {len(tokenizer)} tokens, and the "
            f"model embeds {rows}. Restore the checkpoint's own tokenizer files."
        )
