"""MM-Embed: exact against reference vectors and against its recipe written out by hand."""

import json
import logging
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden_cases import assert_vectors, golden_cases, noise
from PIL import Image
from reference_llava import clip_states, decode, linear, norm, normalised, read_weights, unit
from tiny_llava import LATENT_HEADS, PIECES, SIDE, save_mm_embed

from mmrag.content import Content
from mmrag.embedders import load_embedder
from mmrag.embedders.families.mm_embed import mm_embed_prompt, read_config
from mmrag.embedders.known import find_known
from mmrag.errors import ContentError, ModelError
from mmrag.modeling.backbone import inputs_of
from mmrag.testing import check_embedder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_mm_embed(tmp_path_factory.mktemp("mm_embed"))


@pytest.fixture(scope="module")
def embedder(folder):
    return load_embedder(folder, family="mm_embed", device="cpu")


@pytest.fixture(scope="module")
def reference(golden):
    """Backbone, prepared item and expected values of each case."""

    def read(case, image):
        text = "" if case["text"] is None and image is None else case["text"]
        # A bare query is one with an empty instruction.
        return Content(text, image), (case["instruction"] or "") if case["is_query"] else None

    def options(case):
        return {"max_length": case["max_length"]}

    return golden_cases(golden / "mm_embed", "mm_embed", options, read)


def test_vectors_equal_those_of_the_reference_code(reference):
    assert_vectors(reference)


def test_ids_and_pixels_equal_those_of_the_reference_code(reference):
    for backbone, item, case in reference:
        ids = item.ids.tolist()
        assert len(ids) == case["n_tokens"]
        if case["image"]:
            first = ids.index(32000)
            assert ids.count(32000) == 577
            ids = ids[: first + 1] + ids[first + 577 :]  # the reference counts before widening
            assert [1, *item.tiles.shape] == case["pixel_shape"]
            pixels = backbone.rule.normalise(item.tiles)
            assert math.isclose(pixels.mean().item(), case["pixel_mean"], abs_tol=1e-4)
        assert len(ids) == case["n_text_tokens"]
        assert ids[: len(case["head_ids"])] == case["head_ids"]
        assert ids[-len(case["tail_ids"]) :] == case["tail_ids"]
        assert item.masked == case["masked_from_pooling"]


TASK = "Given a question, retrieve passages"
CASES = [
    (Content("word"), None, "word"),
    (Content("What is in the image"), TASK, f"Instruct: {TASK}\nQuery: What is in the image"),
    (Content(image=noise(70, 40)), None, "<image>\n"),
    (Content(image=noise(33, 80)), TASK, f"Instruct: {TASK}\nQuery: <image>\n"),
    (Content("the line", noise(56, 56)), None, "<image>\nthe line"),
    (Content("the line", noise(90, 50)), TASK, f"Instruct: {TASK}\nQuery: <image>\nthe line"),
]


@pytest.mark.parametrize(
    ("content", "instruction", "prompt"), [*CASES, (Content("word"), "", "Query: word")]
)
def test_prompts(content, instruction, prompt):
    assert str(mm_embed_prompt(content, instruction)) == prompt


@torch.no_grad()
def independent_vector(w, tokenizer, prompt, instruction, image):
    """NV-Embed over LLaVA-NeXT's image vectors, by hand."""
    ids = [*tokenizer(prompt)["input_ids"], tokenizer.eos_token_id]
    rows = []
    for token in ids:
        if token != PIECES:
            rows.append(w["language_model.embed_tokens.weight"][token][None])
            continue
        squashed = normalised(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC))
        states = clip_states(w, "vision_tower.vision_model.", squashed, heads=2, layers=3)
        hidden = F.gelu(linear(states, w, "multi_modal_projector.linear_1"))
        rows += [linear(hidden, w, "multi_modal_projector.linear_2"), w["image_newline"][None]]
    frequencies = 10000.0 ** -(torch.arange(0, 12, 2) / 12)  # the retriever's, not text_config's
    x = decode(w, "language_model", torch.cat(rows), frequencies, causal=False)

    block = "latent_attention_model.cross_attend_blocks."
    asked = norm(x, w, f"{block}0.norm")
    latents = norm(w["latent_attention_model.latents"], w, f"{block}0.norm_context")
    keys, values = linear(latents, w, f"{block}0.fn.to_kv").chunk(2, dim=-1)
    queries = linear(asked, w, f"{block}0.fn.to_q")
    heads = []
    parts = (t.chunk(LATENT_HEADS, dim=-1) for t in (queries, keys, values))
    for q, k, v in zip(*parts, strict=True):
        heads.append((q @ k.T / math.sqrt(q.shape[-1])).softmax(-1) @ v)
    x = x + linear(torch.cat(heads, dim=-1), w, f"{block}0.fn.to_out")
    up, gate = linear(norm(x, w, f"{block}1.norm"), w, f"{block}1.fn.net.0").chunk(2, dim=-1)
    x = x + linear(up * F.gelu(gate), w, f"{block}1.fn.net.2")

    skipped = 0
    if instruction:
        alone = [*tokenizer(f"Instruct: {instruction}")["input_ids"], tokenizer.eos_token_id]
        skipped = len(alone)
    return unit(x[skipped:].mean(dim=0))


def test_vectors_equal_an_independent_computation(embedder, folder):
    weights, tokenizer = read_weights(folder), embedder.backbone.tokenizer
    contents = [Content(c.text, c.image, instruction) for c, instruction, _ in CASES]
    vectors = embedder.encode(contents)
    for vector, (content, instruction, prompt) in zip(vectors, CASES, strict=True):
        image = content.images[0] if content.images else None
        assert vector @ independent_vector(weights, tokenizer, prompt, instruction, image) >= 0.9999


def test_token_ids_and_mask(embedder):
    backbone = embedder.backbone
    item = inputs_of(backbone, Content("word", noise(50, 40)), "Find the image")
    tokens = backbone.tokenizer.convert_ids_to_tokens(item.ids.tolist())
    assert "".join(tokens[-4:]) == "<0x0A>word</s>"
    assert tokens.count("<image>") == 17
    # What is left out of the mean ends with the newline; "Query:" is in.
    assert tokens[item.masked - 1] == "<0x0A>"
    assert "".join(tokens[item.masked :]).startswith("Query")


def test_contract(folder):
    check_embedder(load_embedder(folder, family="mm_embed", device="cpu", max_length=128))


def test_the_end_token_survives_a_cut(folder, embedder):
    backbone = load_embedder(folder, family="mm_embed", device="cpu", max_length=40).backbone
    words = Content(" ".join(map(str, range(100))))
    text = inputs_of(backbone, words, "Find the image")
    fused = inputs_of(backbone, Content(words.text, noise(9, 9)), None)
    assert text.n_tokens == 40
    assert fused.n_tokens == 40 + 16  # an image of 17 tokens counts as one
    assert [int(item.ids[-1]) for item in (text, fused)] == [2, 2]
    whole = inputs_of(embedder.backbone, words, "Find the image")
    assert torch.equal(text.ids[:-1], whole.ids[:39])
    with pytest.raises(ContentError, match="max_length"):
        inputs_of(backbone, Content("x"), "Find the image that matches the caption " * 9)


def test_every_token_of_the_text_has_an_embedding(embedder):
    """The padding token is beyond the decoder's vocabulary, the picture's token marks images."""
    item = inputs_of(embedder.backbone, Content("a <pad> and <image> token"), None)
    assert PIECES not in item.ids
    assert int(item.ids.max()) < PIECES
    assert np.isfinite(embedder.encode(["<pad>", "<image>"])).all()


def test_transparency_is_dropped_as_published(embedder):
    clear = noise(40, 40)
    clear.putalpha(0)
    a, b = embedder.encode([clear, noise(40, 40)])
    assert a @ b >= 0.99999


def test_an_unknown_decoder_is_refused(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "retriever": "someone/else"}))
    with pytest.raises(ModelError, match=r"'someone/else'.*retriever/"):
        load_embedder(tmp_path, family="mm_embed", device="cpu")


def test_without_a_retriever_folder_the_decoder_is_that_of_nv_embed_v1(folder, tmp_path):
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    config = read_config(tmp_path)
    text = config.text_config
    assert (text.hidden_size, text.num_hidden_layers, text.vocab_size) == (4096, 32, 32000)
    assert text.rope_parameters["rope_theta"] == 10000
    assert config.latent_attention_config["num_latents_value"] == 512


def test_its_license_is_told(folder, tmp_path, caplog):
    assert find_known("nvidia/MM-Embed").non_commercial
    (tmp_path / "MM-Embed").symlink_to(folder)
    with caplog.at_level(logging.WARNING):
        load_embedder(tmp_path / "MM-Embed", device="cpu")
    assert "forbids commercial use" in caplog.text


def test_gradients_reach_every_part(embedder):
    backbone = embedder.backbone
    items = [inputs_of(backbone, Content("word", noise(60, 50)), "Find")]
    backbone.forward([*items, inputs_of(backbone, Content("word"), None)]).square().sum().backward()
    model = backbone.model
    parts = [model.vision_tower, model.multi_modal_projector, model.language_model]
    for part in [*parts, model.latent_attention_model]:
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters())
    model.zero_grad()


def test_an_empty_instruction_marks_a_query(embedder):
    """``Query: `` alone: the vector of a document is another one (cosine 0.63 as published)."""
    bare, document = embedder.encode(["a cat"], ""), embedder.encode(["a cat"])
    plan = embedder.backbone.plan(Content("a cat"), "")
    assert "Query: a cat" in embedder.backbone.tokenizer.decode(plan.ids)
    assert not np.allclose(bare, document, atol=1e-3)
    own = embedder.encode([Content("a cat", instruction="")])
    np.testing.assert_allclose(own, bare, atol=1e-6)
