"""Tiny checkpoints of the CLIP families in their published layout: names, config fields, shards.

Weights are random, and names and shapes are written out here, not taken from transformers.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

SIDE, PATCH = 56, 14
GRIDS = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]
CLIP = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
CLIP |= {"num_attention_heads": 2, "image_size": SIDE, "patch_size": PATCH, "projection_dim": 24}
DECODER = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2}
DECODER |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 700}
DECODER |= {"max_position_embeddings": 32768, "rms_norm_eps": 1e-5}
PIECES = 600
LINES = [
    "Represent the given image with the following question related text information",
    "Find me an everyday image that matches the caption",
    "Instruct: Given a question, retrieve passages that answer the question Query: word",
    "What is in the image the second line of this page Summary above sentence in one word",
]


def save_llama_tokenizer(folder: Path, specials: list[str]) -> Tokenizer:
    """Llama's rules with a few hundred pieces: space pieces, bytes for the rest, <s> in front.

    ``specials`` get the ids from ``PIECES`` on.
    """
    space = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(LINES, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [piece for piece in model["vocab"] if piece not in pieces]
    pieces += [f"<unused{i}>" for i in range(PIECES - len(pieces))]
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in model["merges"]]
    bpe = models.BPE(
        {piece: i for i, piece in enumerate(pieces)},
        merges,
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = space
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>", *specials])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    config |= {
        "unk_token": "<unk>",
        "pad_token": specials[-1],
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return tokenizer


def clip_shapes(prefix: str) -> dict[str, tuple[int, ...]]:
    d, mlp = CLIP["hidden_size"], CLIP["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.class_embedding": (d,),
        "embeddings.patch_embedding.weight": (d, 3, PATCH, PATCH),
        "embeddings.position_embedding.weight": ((SIDE // PATCH) ** 2 + 1, d),
        **linear("pre_layrnorm", (d,)),
        **linear("post_layernorm", (d,)),
    }
    for i in range(CLIP["num_hidden_layers"]):
        layer = f"encoder.layers.{i}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= linear(f"{layer}.self_attn.{part}", (d, d))
        shapes |= linear(f"{layer}.mlp.fc1", (mlp, d)) | linear(f"{layer}.mlp.fc2", (d, mlp))
        shapes |= linear(f"{layer}.layer_norm1", (d,)) | linear(f"{layer}.layer_norm2", (d,))
    return {f"{prefix}.vision_model.{name}": shape for name, shape in shapes.items()}


def decoder_shapes(prefix: str, *, fused: bool = False) -> dict[str, tuple[int, ...]]:
    """Mistral's and Llama's names, or with ``fused`` Phi-3's."""
    d, mlp = DECODER["hidden_size"], DECODER["intermediate_size"]
    head = d // DECODER["num_attention_heads"]
    kv = head * DECODER["num_key_value_heads"]
    parts = {"self_attn.o_proj": (d, d), "mlp.down_proj": (d, mlp)}
    if fused:
        parts |= {"self_attn.qkv_proj": (d + 2 * kv, d), "mlp.gate_up_proj": (2 * mlp, d)}
    else:
        parts |= {"self_attn.q_proj": (d, d), "mlp.gate_proj": (mlp, d), "mlp.up_proj": (mlp, d)}
        parts |= {"self_attn.k_proj": (kv, d), "self_attn.v_proj": (kv, d)}
    parts |= {"input_layernorm": (d,), "post_attention_layernorm": (d,)}
    shapes: dict[str, tuple[int, ...]] = {
        f"{prefix}.layers.{i}.{name}.weight": shape
        for i in range(DECODER["num_hidden_layers"])
        for name, shape in parts.items()
    }
    vocabulary = (DECODER["vocab_size"], d)
    return {**shapes, f"{prefix}.embed_tokens.weight": vocabulary, f"{prefix}.norm.weight": (d,)}


def projector_shapes() -> dict[str, tuple[int, ...]]:
    c, d = CLIP["hidden_size"], DECODER["hidden_size"]
    shapes = linear("multi_modal_projector.linear_1", (d, c))
    return shapes | linear("multi_modal_projector.linear_2", (d, d)) | {"image_newline": (d,)}


def linear(name: str, weight: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": weight, f"{name}.bias": (weight[0],)}


def save_weights(folder: Path, shapes: dict[str, tuple[int, ...]], seed: int = 0) -> None:
    """Random float32 weights in two shards, wide enough that attention is not flat."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        is_norm = "norm" in name and name.endswith("weight")
        weights[name] = 1 + 0.1 * noise if is_norm else noise * (0.3 if len(shape) > 1 else 0.1)
    names, files = sorted(weights), {}
    for number in (1, 2):
        file = f"model-{number:05d}-of-00002.safetensors"
        part = {name: weights[name].contiguous() for name in names[number - 1 :: 2]}
        save_file(part, folder / file, metadata={"format": "pt"})
        files |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def save_preprocessor(folder: Path, **fields: object) -> None:
    config = {
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "do_convert_rgb": True,
        **fields,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(config))


def save_llava(folder: Path, *, decoder: str = "mistral") -> Path:
    """LLaVA-NeXT as VLM2Vec-LLaVaNext and E5-V (``decoder="llama"``) were published."""
    folder.mkdir(parents=True, exist_ok=True)
    save_llama_tokenizer(folder, ["<image>", "<pad>"])
    vocabulary = (DECODER["vocab_size"], DECODER["hidden_size"])
    shapes = clip_shapes("vision_tower") | decoder_shapes("language_model.model")
    shapes |= projector_shapes() | {"language_model.lm_head.weight": vocabulary}
    save_weights(folder, shapes)
    save_preprocessor(folder, **llava_images())
    text = {**DECODER, "model_type": decoder, "rope_theta": 1e6, "sliding_window": None}
    (folder / "config.json").write_text(json.dumps(llava_config(text)))
    return folder


def llava_images() -> dict[str, object]:
    return {
        "image_processor_type": "LlavaNextImageProcessor",
        "aspect_ratio_setting": "anyres",
        "crop_size": {"height": SIDE, "width": SIDE},
        "size": {"shortest_edge": SIDE},
        "image_grid_pinpoints": GRIDS,
        "do_center_crop": True,
        "do_normalize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_resize": True,
        "resample": 3,
        "rescale_factor": 1 / 255,
    }


def llava_config(text: dict[str, object]) -> dict[str, object]:
    return {
        "architectures": ["LlavaNextForConditionalGeneration"],
        "model_type": "llava_next",
        "image_grid_pinpoints": GRIDS,
        "image_token_index": PIECES,
        "projector_hidden_act": "gelu",
        "text_config": text,
        "tie_word_embeddings": False,
        "use_image_newline_parameter": True,
        "vision_config": {**CLIP, "model_type": "clip_vision_model", "vocab_size": 32000},
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "transformers_version": "4.39.0.dev0",
    }


LATENTS, LATENT_HEADS, LATENT_HEAD_DIM = 8, 2, 12


def save_mm_embed(folder: Path) -> Path:
    """MM-Embed, with the configuration of its decoder beside it."""
    (folder / "retriever").mkdir(parents=True, exist_ok=True)
    save_llama_tokenizer(folder, ["<image>", "<pad>"])
    d, inner = DECODER["hidden_size"], LATENT_HEADS * LATENT_HEAD_DIM
    attend, feed = (f"latent_attention_model.cross_attend_blocks.{i}" for i in range(2))
    shapes = clip_shapes("vision_tower") | decoder_shapes("language_model") | projector_shapes()
    shapes |= linear(f"{attend}.norm", (d,)) | linear(f"{attend}.norm_context", (d,))
    shapes |= {f"{attend}.fn.to_q.weight": (inner, d), f"{attend}.fn.to_kv.weight": (2 * inner, d)}
    shapes |= {f"{attend}.fn.to_out.weight": (d, inner)} | linear(f"{feed}.norm", (d,))
    shapes |= linear(f"{feed}.fn.net.0", (8 * d, d)) | linear(f"{feed}.fn.net.2", (d, 4 * d))
    shapes |= {"latent_attention_model.latents": (LATENTS, d)}
    # Smaller than the vocabulary of the tokenizer, as published.
    shapes["language_model.embed_tokens.weight"] = (PIECES, d)
    save_weights(folder, shapes)
    save_preprocessor(folder, **llava_images())
    text = {**DECODER, "model_type": "mistral", "rope_theta": 1e6}
    config = llava_config(text) | {
        "architectures": ["NVMMEmbedModel"],
        "auto_map": {"AutoModel": "modeling_nvmmembed.NVMMEmbedModel"},
        "retriever": "nvidia/NV-Embed-v1",
        "global_image_patch_only": True,
        "add_eos_token": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    latent = {"model_type": "latent_attention", "num_latents_value": LATENTS, "latent_dim": d}
    latent |= {"num_cross_heads": LATENT_HEADS, "cross_dim_head": LATENT_HEAD_DIM}
    decoder = {**DECODER, "vocab_size": PIECES, "model_type": "bidir_mistral", "rope_theta": 1e4}
    retriever = {
        "architectures": ["NVEmbedModel"],
        "model_type": "nvembed",
        "latent_attention_config": latent,
        "text_config": {**decoder, "sliding_window": 4096},
    }
    (folder / "retriever" / "config.json").write_text(json.dumps(retriever))
    return folder


SHORT, LONG = [1.1, 1.3, 2.0, 3.7, 5.1, 7.1], [1.1, 1.6, 7.4, 28.0, 57.0, 64.0]
TRAINED_LENGTH = 200


def save_phi3v(folder: Path) -> Path:
    """Phi-3.5-vision as VLM2Vec-Full was published, with a short trained length."""
    folder.mkdir(parents=True, exist_ok=True)
    save_llama_tokenizer(folder, ["<|image|>", "<|endoftext|>"])
    d, merged = DECODER["hidden_size"], 4 * CLIP["hidden_size"]
    vocabulary = (DECODER["vocab_size"], d)
    images = "model.vision_embed_tokens"
    shapes = clip_shapes(f"{images}.img_processor") | decoder_shapes("model", fused=True)
    shapes |= {f"{images}.glb_GN": (1, 1, merged), f"{images}.sub_GN": (1, 1, 1, merged)}
    shapes |= linear(f"{images}.img_projection.0", (d, merged))
    shapes |= linear(f"{images}.img_projection.2", (d, d))
    shapes |= {"lm_head.weight": vocabulary, f"{images}.wte.weight": vocabulary}
    save_weights(folder, shapes)
    save_preprocessor(folder, num_crops=4, num_img_tokens=144)
    config = {
        "architectures": ["Phi3VForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "modeling_phi3_v.Phi3VForCausalLM"},
        **DECODER,
        "model_type": "phi3_v",
        "hidden_act": "silu",
        "img_processor": {"name": "clip_vision_model", "image_dim_out": CLIP["hidden_size"]},
        "max_position_embeddings": 32 * TRAINED_LENGTH,
        "original_max_position_embeddings": TRAINED_LENGTH,
        "pad_token_id": PIECES + 1,
        "rope_scaling": {"type": "su", "short_factor": SHORT, "long_factor": LONG},
        "rope_theta": 10000.0,
        "sliding_window": 262144,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "clip_config.json").write_text(json.dumps(CLIP))
    return folder
