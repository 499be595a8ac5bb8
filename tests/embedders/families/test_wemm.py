"""WeMM-Embedding against an independent computation; its literal prompts and limits."""

import json
import urllib.request

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from tiny import save_qwen_tokenizer, seen
from tiny_qwen3 import save_wemm
from transformers import AutoImageProcessor, PreTrainedTokenizerFast, Qwen3_5Model

from mmrag.content import Content
from mmrag.embedders import KNOWN, load_embedder
from mmrag.errors import ModelError
from mmrag.modeling.backbone import inputs_of
from mmrag.testing import check_embedder

IMAGE_BLOCK = "<|vision_start|><|image_pad|><|vision_end|>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_wemm(tmp_path_factory.mktemp("wemm") / "tiny")


@pytest.fixture(scope="module")
def embedder(folder):
    return load_embedder(folder, family="wemm", device="cpu")


def independent_vector(folder, prompt: str, images: list[Image.Image]) -> np.ndarray:
    """The recipe for one item by transformers' own model and positions."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    model = Qwen3_5Model.from_pretrained(folder, dtype=torch.float32).eval()
    inputs = {}
    if images:
        settings = json.loads((folder / "processor_config.json").read_text())["image_processor"]
        (folder / "slow").mkdir(exist_ok=True)
        (folder / "slow/preprocessor_config.json").write_text(json.dumps(settings))
        processor = AutoImageProcessor.from_pretrained(
            folder / "slow", backend="pil", do_resize=False
        )
        inputs = dict(processor(images=images, return_tensors="pt"))
        for grid in inputs["image_grid_thw"]:
            prompt = prompt.replace("<|image_pad|>", "<slot>" * (int(grid.prod()) // 4), 1)
        prompt = prompt.replace("<slot>", "<|image_pad|>")
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(int(ids[0, -1])) == "<embedding>"
    kinds = (ids == model.config.image_token_id).int()
    output = model(input_ids=ids, mm_token_type_ids=kinds, **inputs)
    vector = output.last_hidden_state[0, -1].numpy()
    return vector / np.linalg.norm(vector)


@torch.no_grad()
def test_vectors_equal_an_independent_computation(embedder, folder):
    noise = np.random.default_rng(0).integers(0, 255, (131, 217, 3), dtype=np.uint8)
    wide, small = Image.fromarray(noise), Image.fromarray(noise[:64, :96])
    sized = wide.resize((224, 128), Image.Resampling.BICUBIC)  # 6.8 and 4.1 times 32, rounded
    end = "<|im_end|><embedding>"
    task = "Find a page."
    cases = [
        (Content("find the page"), [], f"<|im_start|>user\nfind the page{end}"),
        (Content(""), [], f"<|im_start|>user\n{end}"),
        (Content("\n x "), [], f"<|im_start|>user\n\n x {end}"),
        (Content("x", None, task), [], f"<|im_start|>user\n{task} x{end}"),
        (Content(image=wide), [sized], f"<|im_start|>user{IMAGE_BLOCK}{end}"),
        (Content("a page", wide), [sized], f"<|im_start|>user{IMAGE_BLOCK}a page{end}"),
        (Content(None, small, task), [small], f"<|im_start|>user{IMAGE_BLOCK}{task}{end}"),
        (
            Content("two", [small, wide], task),
            [small, sized],
            f"<|im_start|>user{IMAGE_BLOCK}{IMAGE_BLOCK}{task} two{end}",
        ),
    ]
    together = embedder.encode([content for content, _, _ in cases])
    for vector, (content, images, prompt) in zip(together, cases, strict=True):
        expected = independent_vector(folder, prompt, images)
        assert vector @ expected >= 0.9999
        assert embedder.encode([content])[0] @ expected >= 0.9999


def test_published_names_of_weights(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert "model.language_model.layers.0.linear_attn.in_proj_qkv.weight" in names
    assert "model.visual.merger.linear_fc2.weight" in names


def test_contract(folder):
    check_embedder(
        load_embedder(folder, family="wemm", device="cpu", max_length=110, max_image_tokens=16)
    )


def test_images_are_resized_twice(folder):
    backbone = load_embedder(folder, family="wemm", device="cpu", min_image_tokens=64).backbone
    image = Image.new("RGB", (40, 20))
    # fetch_image: 96x64 for at least 4 tokens; the processor: at least 64 tokens.
    assert backbone.recipe.fit(40, 20) == (96, 64)
    item = inputs_of(backbone, Content(image=image), None)
    assert seen(item, backbone.rule)[0] == [[1, 14, 20]]


def test_long_text_keeps_the_token_that_is_pooled(folder):
    embedder = load_embedder(folder, family="wemm", device="cpu", max_length=40)
    ids = inputs_of(embedder.backbone, Content("word " * 100), None).ids.tolist()
    vocabulary = embedder.backbone.tokenizer.get_vocab()
    assert len(ids) == 40
    assert ids[-2:] == [vocabulary["<|im_end|>"], vocabulary["<embedding>"]]


def test_a_checkpoint_without_the_token_is_refused(tmp_path):
    with pytest.raises(ModelError, match="<embedding>"):
        folder = save_wemm(tmp_path / "tiny")
        save_qwen_tokenizer(folder)
        load_embedder(folder, family="wemm", device="cpu")


def test_known_checkpoints_state_their_dimensions():
    rows = {m.name: m for m in KNOWN if m.family == "wemm"}
    assert [m.dim for m in rows.values()] == [2048, 2560, 4096]
    assert all(m.matryoshka_dims[-1] == m.dim for m in rows.values())


@pytest.mark.hub
def test_published_similarities_of_the_2b():
    """The model card's texts and image; its numbers are from bfloat16."""
    address = (
        "https://huggingface.co/datasets/sentence-transformers/example-documents/resolve/main/"
        "llama4_hgf.png"
    )
    with urllib.request.urlopen(address, timeout=60) as response:
        image = response.read()
    queries = ["Which Llama 4 model variants are available?", "How is mapo tofu prepared?"]
    documents = [
        "Mapo tofu is a Sichuan dish of soft tofu simmered in a spicy, numbing sauce of chili "
        "bean paste and Sichuan peppercorn.",
        Content("Represent this image.", image),
    ]
    embedder = load_embedder("tencent/WeMM-Embedding-2B")
    similarities = embedder.encode(queries) @ embedder.encode(documents).T
    np.testing.assert_allclose(similarities, [[0.0683, 0.4972], [0.7829, 0.1428]], atol=0.02)
