"""Write token vectors as a Qwen2-VL checkpoint in GME's published layout.

The decoder is built so that, before any training, the pooled state is the sum of the token
vectors of the user turn, whatever the instruction says:

* Dimension ``SCALE`` of every token holds a large constant. RMSNorm then divides all tokens by
  nearly the same number, and longer vectors (rarer words) keep their weight.
* Layer 0 marks what follows the start of the user turn: one head attends to that token alone and
  writes 1 to dimension ``MARK``.
* Visual tokens come as codes. Layer 0's feed-forward part turns them into sums of vectors
  (``dictionary_weights``); it does nothing to text.
* Layer 1 attends evenly to the marked positions, with identity values and output.
* All other outputs are zero: they change nothing, and training can use them.

Keys and queries use the slowest rotary pair, which turns by less than 0.01 over 4096 tokens.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer
from torch import Tensor

from mmrag_recipes.nano.tower import CODE, Dictionary

SCALE, START, MARK = -3, -2, -1  # reserved dimensions; word vectors have those before them
RESERVED = 3
HEAD_DIM = 64
LARGE = 64.0  # value of SCALE; word vectors have a mean norm of 1
FOCUS = 40.0  # attention logit of a marked position over an unmarked one
GUARD = 4096.0  # keeps the dictionary's gates shut for text; a power of two, so that it cancels
_SURE = 16.0  # silu(x) = x

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
    # Turns are single tokens, so that the words of the prompt stay out of the sum.
    "<|im_start|>system\n",
    "<|im_start|>user\n",
    "<|im_start|>assistant\n",
)
USER_TURN = "<|im_start|>user\n"


def build_tokenizer(base: Tokenizer) -> Tokenizer:
    """The WordPiece tokenizer ``base`` with Qwen's special tokens and nothing added around."""
    tokenizer = Tokenizer.from_str(base.to_str())
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    spec = json.loads(tokenizer.to_str())
    spec["post_processor"] = None  # no [CLS] and [SEP]
    return Tokenizer.from_str(json.dumps(spec))


def hidden_size(word_dim: int) -> int:
    """Width of a decoder for word vectors of ``word_dim`` dimensions."""
    width = word_dim + RESERVED
    if width % HEAD_DIM:
        raise ValueError(f"word vectors need {-width % HEAD_DIM} more dimensions, or fewer")
    return width


def build_config(
    tokenizer: Tokenizer, width: int, mlp: int, vision: dict[str, Any]
) -> dict[str, Any]:
    """``config.json`` for a decoder of two layers."""
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL}
    return {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "attention_dropout": 0.0,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "vision_token_id": ids["<|vision_pad|>"],
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "hidden_act": "silu",
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": 2,
        "num_attention_heads": width // HEAD_DIM,
        "num_key_value_heads": width // HEAD_DIM,
        "max_position_embeddings": 4096,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [8, 12, 12]},
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "torch_dtype": "float16",
        "vocab_size": tokenizer.get_vocab_size(),
        "vision_config": {
            "model_type": "qwen2_vl",
            "hidden_size": width,
            "in_chans": 3,
            "in_channels": 3,
            "patch_size": 14,
            "spatial_patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "hidden_act": "quick_gelu",
            "mlp_ratio": 4,
            **vision,
        },
    }


def decoder_weights(
    words: NDArray[np.floating[Any]], tokenizer: Tokenizer, mlp: int
) -> dict[str, Tensor]:
    """Weights of the decoder described above.

    Args:
        words: (vocabulary of the base tokenizer, word_dim): vectors whose sum is the text's.
        tokenizer: from ``build_tokenizer``.
        mlp: inner width of the feed-forward layers, which put out zero.
    """
    width = hidden_size(words.shape[1])
    weights = {"model.embed_tokens.weight": _embeddings(words, tokenizer, width)}
    generator = torch.Generator().manual_seed(0)
    for layer in range(2):
        at = f"model.layers.{layer}."
        square = torch.zeros(width, width)
        for name in ("q_proj", "k_proj", "v_proj"):
            weights[f"{at}self_attn.{name}.weight"] = square.clone()
            weights[f"{at}self_attn.{name}.bias"] = torch.zeros(width)
        weights[f"{at}self_attn.o_proj.weight"] = square.clone()
        for name in ("gate_proj", "up_proj"):
            draw = torch.randn(mlp, width, generator=generator) / math.sqrt(width)
            weights[f"{at}mlp.{name}.weight"] = draw
        weights[f"{at}mlp.down_proj.weight"] = torch.zeros(width, mlp)
        weights[f"{at}input_layernorm.weight"] = torch.ones(width)
        weights[f"{at}post_attention_layernorm.weight"] = torch.ones(width)
    _mark_user_turn(weights, width)
    _sum_marked(weights, width)
    norm = torch.ones(width)
    norm[-RESERVED:] = 0.0
    weights["model.norm.weight"] = norm
    return weights


def _embeddings(words: NDArray[np.floating[Any]], tokenizer: Tokenizer, width: int) -> Tensor:
    table = torch.zeros(tokenizer.get_vocab_size(), width)
    table[: len(words), : words.shape[1]] = torch.from_numpy(np.asarray(words, dtype=np.float32))
    table[:, SCALE] = LARGE
    table[tokenizer.token_to_id(USER_TURN), START] = 1.0
    # So that an empty text has a direction too.
    table[tokenizer.token_to_id("<|endoftext|>"), 0] = 1e-3
    return table


def _mark_user_turn(weights: dict[str, Tensor], width: int) -> None:
    at = "model.layers.0."
    unit = LARGE / math.sqrt(width)  # undoes RMSNorm: inputs have their own size again
    weights[f"{at}input_layernorm.weight"] *= unit
    slow = HEAD_DIM // 2 - 1  # the slowest rotary pair is (slow, slow + HEAD_DIM / 2)
    weights[f"{at}self_attn.q_proj.bias"][slow] = math.sqrt(HEAD_DIM)
    weights[f"{at}self_attn.k_proj.weight"][slow, START] = FOCUS
    weights[f"{at}self_attn.v_proj.weight"][0, START] = 1.0
    weights[f"{at}self_attn.o_proj.weight"][MARK, 0] = 1.0


def _sum_marked(weights: dict[str, Tensor], width: int) -> None:
    at = "model.layers.1."
    weights[f"{at}input_layernorm.weight"] *= LARGE / math.sqrt(width)
    for head in range(width // HEAD_DIM):
        slow = head * HEAD_DIM + HEAD_DIM // 2 - 1
        weights[f"{at}self_attn.q_proj.bias"][slow] = math.sqrt(HEAD_DIM)
        weights[f"{at}self_attn.k_proj.weight"][slow, MARK] = FOCUS
    through = torch.eye(width)
    through[-RESERVED:] = 0.0
    weights[f"{at}self_attn.v_proj.weight"] = through
    weights[f"{at}self_attn.o_proj.weight"] = through.clone()


def tower_weights(tower: Any, word_dim: int, size: float) -> dict[str, Tensor]:
    """The tower's part of a checkpoint: tokens are codes, with the reserved dimensions set.

    Args:
        size: what training divided trigram vectors by (``tower.common_size``).
    """
    weights = {f"visual.{name}": value.clone() for name, value in tower.state_dict().items()}
    last, bias = weights["visual.merger.mlp.2.weight"], weights["visual.merger.mlp.2.bias"]
    last *= CODE * size
    bias *= CODE * size
    last[word_dim:] = 0.0
    bias[word_dim:] = 0.0
    bias[SCALE], bias[START] = LARGE, -1.0
    return weights


def dictionary_weights(
    dictionary: Dictionary, blank: Tensor, size: float, mlp: int
) -> dict[str, Tensor]:
    """Layer 0's feed-forward part: ``dictionary`` for visual tokens, zero for text.

    Visual tokens are those with -1 at ``START``. One more unit, always on for them, takes away
    what white paper gives: all tokens of an empty page are equal, and a page has hundreds.

    Args:
        blank: (dim,), what ``dictionary`` gives for white paper.
        mlp: inner width, more than the dictionary's units.
    """
    units, dim = dictionary.vectors.shape
    width, codes = hidden_size(dim), CODE * size
    gate, up, down = torch.zeros(mlp, width), torch.zeros(mlp, width), torch.zeros(width, mlp)
    gate[:units, :dim] = dictionary.gate.weight.detach() / codes
    gate[:units, MARK] = dictionary.gate.bias.detach()
    up[:units, :dim] = dictionary.up.weight.detach() / codes
    up[:units, MARK] = dictionary.up.bias.detach()
    down[:dim, :units] = size * dictionary.vectors.T
    gate[units, MARK], up[units, MARK] = _SURE, 1.0
    down[:dim, units] = -size / _SURE * blank
    gate[: units + 1, START], gate[: units + 1, SCALE] = -GUARD, -GUARD / LARGE
    at = "model.layers.0."
    return {
        f"{at}post_attention_layernorm.weight": torch.full((width,), LARGE / math.sqrt(width)),
        f"{at}mlp.gate_proj.weight": gate,
        f"{at}mlp.up_proj.weight": up,
        f"{at}mlp.down_proj.weight": down,
    }


def save_checkpoint(
    folder: Path,
    weights: dict[str, Tensor],
    config: dict[str, Any],
    tokenizer: Tokenizer,
    settings: dict[str, Any],
) -> None:
    """Write the folder: weights in float16, config, tokenizer, picture rule, ``mmrag.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    half = {name: value.detach().to(torch.float16).contiguous() for name, value in weights.items()}
    save_file(half, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    _write(folder / "config.json", config)
    _write(folder / "preprocessor_config.json", image_rule(settings))
    _write(folder / "mmrag.json", settings)
    _write(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "unk_token": "[UNK]",
            "clean_up_tokenization_spaces": False,
            "model_max_length": config["max_position_embeddings"],
        },
    )


def image_rule(settings: dict[str, Any]) -> dict[str, Any]:
    """``preprocessor_config.json`` as GME publishes it, with the bounds of ``settings``."""
    least = 28 * 28 * int(settings["min_image_tokens"])
    most = 28 * 28 * int(settings["max_image_tokens"])
    return {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2VLProcessor",
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "rescale_factor": 1 / 255,
        "resample": 3,
        "patch_size": 14,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "min_pixels": least,
        "max_pixels": most,
        "size": {"shortest_edge": least, "longest_edge": most},
    }


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
