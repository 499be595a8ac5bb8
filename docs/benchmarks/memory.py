"""Memory of training GME-2B and a 7B model, as a table, without any weights.

    PYTHONPATH=.:recipes:tests python docs/benchmarks/memory.py

Sizes are those of Qwen2-VL's published configurations; GME and most embedders of these sizes have
them. A page of 1,024 visual tokens with its prompt is taken for 1,100 tokens.
"""

from __future__ import annotations

import torch
from transformers import Qwen2VLConfig, Qwen2VLModel

from mmrag_recipes.config import DataConfig, LoraConfig, TrainConfig
from mmrag_recipes.memory import memory_of, sizes_of

GIB = 2**30
TOKENS = 1100
MODELS = {
    "2B": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28}
    | {"num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936},
    "7B": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28}
    | {"num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064},
}
QLORA = LoraConfig(quantize="4bit-double")
# Name, bytes of a weight that does not train, cards, options.
WAYS = (
    ("all weights", 4, 1, {}),
    ("all weights, `shard`, 2 cards", 4, 2, {"shard": True}),
    ("all weights, `shard`, 4 cards", 4, 4, {"shard": True}),
    ("all weights, `shard`, 8 cards", 4, 8, {"shard": True}),
    ("LoRA on bfloat16", 2, 1, {"lora": LoraConfig()}),
    ("LoRA on 4 bits (QLoRA)", 2, 1, {"lora": QLORA}),
)


def main() -> None:
    """Print the table."""
    chunk = 4
    print("| model | trained | weights | gradients | optimizer | gathered | activations | sum |")
    print("|---|---|---|---|---|---|---|---|")
    for name, decoder in MODELS.items():
        vision = {"hidden_size": decoder["hidden_size"], "embed_dim": 1280, "depth": 32}
        published = Qwen2VLConfig(text_config=decoder, vision_config=vision)
        with torch.device("meta"):
            model = Qwen2VLModel(published)
        for way, width, cards, options in WAYS:
            config = TrainConfig(model=name, out="", data=(DataConfig(rows=""),), chunk=chunk)
            config = config.replace(gradient_checkpointing=True, **options)
            sizes = sizes_of(model, config)
            parts = memory_of(sizes, config, chunk * TOKENS, width, cards)
            columns = ("weights", "gradients", "optimizer", "gathered", "activations")
            shown = [f"{parts.get(column, 0) / GIB:.1f}" for column in columns]
            total = f"**{sum(parts.values()) / GIB:.1f}**"
            print(f"| {name} | {way} | {' | '.join(shown)} | {total} |")
        plain = config.replace(gradient_checkpointing=False, lora=LoraConfig())
        whole = memory_of(sizes, plain, TOKENS)["activations"] / GIB
        half = memory_of(sizes, plain, TOKENS, 2)["activations"] / GIB
        print(
            f"{name}: {sizes.weights / 1e9:.2f}e9 weights, {sizes.linear / 1e9:.2f}e9 in linear "
            f"layers, {sizes.trained / 1e6:.1f}e6 in adapters; without checkpointing a page takes "
            f"{half:.1f} GiB of activations, {whole:.1f} in float32"
        )


if __name__ == "__main__":
    main()
