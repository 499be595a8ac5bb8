"""Carry the vision side of an earlier mmrag-nano into the space of the sentence encoder.

In mmrag-nano 0.1 a text was the sum of its word vectors, and the visual tokens of an image added
up to a vector of the same space: a tower puts out codes, and the first feed-forward layer of a
Qwen2-VL decoder looks up letter trigrams in them. Its texts were distilled from the sentence
encoder, so a linear map leads from the old space to the new one; it is fitted on texts, by least
squares, and applied to what the visual tokens add.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

_RESERVED = 3  # last dimensions of the old decoder, which hold no meaning
_MARK = -1  # of these, the one that is 1 for visual tokens: its weights are biases
_ON = 16.0  # silu(16) = 16: a unit with this gate passes on what comes up


def carry(
    old: Path, tokenizer: Tokenizer, texts: Sequence[str], wanted: Tensor
) -> dict[str, Tensor]:
    """Weights ``visual.*`` and ``readout.*`` of a nano checkpoint.

    Args:
        old: folder of mmrag-nano 0.1.
        tokenizer: of the encoder, whose pieces the old word vectors belong to.
        texts, wanted: texts, and the encoder's unit vectors of them, (len(texts), dim).
    """
    weights = {name: value.float() for name, value in load_file(old / "model.safetensors").items()}
    words = weights["model.embed_tokens.weight"][:, :-_RESERVED]
    # (old dim, dim)
    linear = least_squares(old_vectors(words, tokenizer, texts), wanted)
    mlp = "model.layers.0.mlp."
    gate, up, down = (weights[f"{mlp}{name}_proj.weight"] for name in ("gate", "up", "down"))
    # The last unit was always on and held what white paper gives: it becomes the bias.
    units, dim = len(gate) - 1, len(linear)
    through = torch.eye(dim, gate.shape[1])  # the old decoder let the codes themselves through
    readout = {
        "gate_proj.weight": torch.cat([gate[:units], torch.zeros_like(through)]),
        "gate_proj.bias": torch.cat([gate[:units, _MARK], torch.full((dim,), _ON)]),
        "up_proj.weight": torch.cat([up[:units], through]),
        "up_proj.bias": torch.cat([up[:units, _MARK], torch.zeros(dim)]),
        "down_proj.weight": linear.T @ torch.cat([down[:dim, :units], torch.eye(dim) / _ON], dim=1),
        "down_proj.bias": linear.T @ down[:dim, units] * _ON,
    }
    for name in ("gate_proj", "up_proj"):
        readout[f"{name}.weight"][:, -_RESERVED:] = 0.0
    visual = {name: value for name, value in weights.items() if name.startswith("visual.")}
    for name in ("weight", "bias"):
        visual[f"visual.merger.mlp.2.{name}"][-_RESERVED:] = 0.0
    return visual | {f"readout.{name}": value for name, value in readout.items()}


def old_vectors(words: Tensor, tokenizer: Tokenizer, texts: Sequence[str]) -> Tensor:
    """Unit vectors of texts in the old space: sums of word vectors, (len(texts), dim)."""
    found = tokenizer.encode_batch(list(texts), add_special_tokens=False)
    sums = [words[torch.tensor(one.ids, dtype=torch.long)].sum(0) for one in found]
    return F.normalize(torch.stack(sums), dim=1)


def least_squares(given: Tensor, wanted: Tensor, ridge: float = 0.03) -> Tensor:
    """The matrix that maps rows of ``given`` nearest to those of ``wanted``, (columns, columns).

    ridge: penalty, as a share of the mean square of a column of ``given``.
    """
    products = given.T @ given
    # Words that occur in few of the texts would otherwise get huge weights.
    penalty = ridge * products.diag().mean() * torch.eye(len(products))
    return torch.as_tensor(torch.linalg.solve(products + penalty, given.T @ wanted))
