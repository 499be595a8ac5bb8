"""VLM2Vec-Full on Phi-3.5-V: exact against reference vectors and against its recipe by hand."""

import math
import urllib.request

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden_cases import assert_vectors, golden_cases, noise
from PIL import Image
from reference_llava import clip_states, decode, linear, normalised, read_weights, unit
from safetensors.torch import load_file, save_file
from tiny_llava import LONG, SHORT, SIDE, TRAINED_LENGTH, save_phi3v

from mmrag.content import Content
from mmrag.embedders import load_embedder
from mmrag.embedders.families.phi3v import hd_image, hd_size
from mmrag.errors import ConfigError, ContentError, ModelError
from mmrag.modeling.backbone import inputs_of
from mmrag.testing import check_embedder

PHI = "vlm2vec_phi3v"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_phi3v(tmp_path_factory.mktemp("phi3v"))


@pytest.fixture(scope="module")
def embedder(folder):
    return load_embedder(folder, family=PHI, device="cpu")


@pytest.fixture(scope="module")
def reference(golden):
    """Backbone, prepared item and expected values of each case."""

    def options(case):
        style = "mmeb" if "style" in case else "demo"
        return {"style": style, "num_crops": case.get("num_crops", 4)}

    return golden_cases(golden / PHI, PHI, options)


def test_vectors_equal_those_of_the_reference_code(reference):
    assert_vectors(reference)


def test_ids_and_pixels_equal_those_of_the_reference_code(reference):
    for backbone, item, case in reference:
        ids = item.ids.tolist()
        assert len(ids) == case["n_tokens"]
        assert ids[: len(case["head_ids"])] == case["head_ids"]
        assert ids[-len(case["tail_ids"]) :] == case["tail_ids"]
        if case["image"]:
            tiles, grid = backbone.tiles(item.pixels)
            assert [336 * n for n in grid] == case["image_size"]
            assert len(tiles) == case["crops"]
            assert ids.count(-1) == case["n_image_tokens"]
            whole, mean = tiles[0].mean().item(), tiles.mean().item()
            assert math.isclose(mean, case["pixel_mean"], abs_tol=1e-4)
            assert math.isclose(whole, case["pixel_mean_global"], abs_tol=1e-4)


def independent_images(w, image, num_crops):
    """Tokens of an image, after the published code: tile by tile, block by block."""
    tall = image.width < image.height
    if tall:
        image = image.transpose(Image.Transpose.TRANSPOSE)
    ratio = image.width / image.height
    scale = 1
    while scale * np.ceil(scale / ratio) <= num_crops:
        scale += 1
    scale -= 1
    width = scale * SIDE
    height = int(width / ratio)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    padded = Image.new("RGB", (width, int(np.ceil(height / SIDE) * SIDE)), (255, 255, 255))
    padded.paste(image, (0, int((padded.height - height) / 2)))
    if tall:
        padded = padded.transpose(Image.Transpose.TRANSPOSE)
    pixels = normalised(padded)
    whole = F.interpolate(pixels[None], size=(SIDE, SIDE), mode="bicubic")[0]

    prefix = "model.vision_embed_tokens."
    newline, separator = w[f"{prefix}sub_GN"].flatten(), w[f"{prefix}glb_GN"].flatten()

    def feature_map(tile):
        states = clip_states(w, f"{prefix}img_processor.vision_model.", tile, heads=2, layers=3)
        return states.view(SIDE // 14, SIDE // 14, -1)

    def tokens(features):
        rows = []
        for y in range(0, len(features), 2):
            for x in range(0, features.shape[1], 2):
                corners = [features[y, x], features[y, x + 1]]
                rows.append(torch.cat([*corners, features[y + 1, x], features[y + 1, x + 1]]))
            rows.append(newline)
        return torch.stack(rows)

    lines = [
        torch.cat(
            [
                feature_map(pixels[:, top : top + SIDE, left : left + SIDE])
                for left in range(0, padded.width, SIDE)
            ],
            dim=1,
        )
        for top in range(0, padded.height, SIDE)
    ]
    merged = torch.cat([tokens(torch.cat(lines)), separator[None], tokens(feature_map(whole))])
    hidden = F.gelu(linear(merged, w, f"{prefix}img_projection.0"))
    return linear(hidden, w, f"{prefix}img_projection.2")


@torch.no_grad()
def independent_vector(w, tokenizer, prompt, image, num_crops=4):
    parts = []
    for number, piece in enumerate(prompt.split("<|image_1|>")):
        if number:
            parts.append(independent_images(w, image, num_crops))
        parts.append(w["model.embed_tokens.weight"][tokenizer(piece)["input_ids"]])
    x = torch.cat(parts)
    factors = torch.tensor(SHORT if len(x) <= TRAINED_LENGTH else LONG)
    frequencies = 1 / (factors * 10000.0 ** (torch.arange(0, 12, 2) / 12))
    scale = math.sqrt(1 + math.log(32) / math.log(TRAINED_LENGTH))
    states = decode(w, "model", x, frequencies, causal=True, scale=scale)
    return unit(states[-1])


CASES = [
    (Content("word"), None, "word"),
    (Content("word"), "Find the page:", "Find the page: word"),
    (Content(image=noise(100, 61)), None, "<|image_1|> Represent the given image."),
    (Content(image=noise(40, 150)), "Find the image.", "<|image_1|> Find the image."),
    (
        Content("the second line", noise(300, 200)),
        None,
        "<|image_1|> Represent the given image with related text information: the second line",
    ),
    (Content("word " * (TRAINED_LENGTH + 9)), None, "word " * (TRAINED_LENGTH + 9)),
]


def test_vectors_equal_an_independent_computation(embedder, folder):
    weights, tokenizer = read_weights(folder), embedder.backbone.tokenizer
    contents = [Content(c.text, c.image, instruction) for c, instruction, _ in CASES]
    vectors = embedder.encode(contents)
    for vector, (content, _, prompt) in zip(vectors, CASES, strict=True):
        image = content.images[0] if content.images else None
        assert vector @ independent_vector(weights, tokenizer, prompt, image) >= 0.9999


def test_more_crops_equal_an_independent_computation(folder):
    embedder = load_embedder(folder, family=PHI, device="cpu", num_crops=9)
    image = noise(120, 100)
    prompt = "<|image_1|> Represent the given image."
    tokenizer = embedder.backbone.tokenizer
    expected = independent_vector(read_weights(folder), tokenizer, prompt, image, num_crops=9)
    assert embedder.encode([image])[0] @ expected >= 0.9999


def test_a_long_item_leaves_the_others_in_its_batch_alone(embedder):
    """Past the trained length other rotary factors hold: they must not reach the neighbours."""
    backbone = embedder.backbone
    items = [inputs_of(backbone, c, None) for c, _, _ in CASES]
    assert items[-1].n_tokens > TRAINED_LENGTH > items[0].n_tokens
    with torch.no_grad():
        together = backbone.forward(items)
        alone = torch.cat([backbone.forward([item]) for item in items])
    assert (torch.cosine_similarity(together, alone) >= 0.99999).all()


def test_token_ids(embedder):
    item = inputs_of(embedder.backbone, Content(image=noise(112, 112)), None)
    ids = item.ids.tolist()
    # 2x2 tiles and the whole, of 2x2 tokens each, a separator, and the ends of 4 + 2 rows.
    count = 5 * 4 + 1 + 6
    assert ids[: 1 + count] == [1] + [-1] * count
    tokens = embedder.backbone.tokenizer.convert_ids_to_tokens(ids[1 + count :])
    assert tokens[:2] == ["<s>", "▁"]
    assert "".join(tokens[1:]) == "▁▁Represent▁the▁given▁image<0x2E>"


def test_prompts_of_the_evaluation(folder, embedder):
    style = {"style": "mmeb", "device": "cpu"}
    evaluation = load_embedder(folder, family=PHI, **style)
    tokenizer = embedder.backbone.tokenizer

    def tail(content, instruction):
        ids = inputs_of(evaluation.backbone, content, instruction).ids
        return ids[ids >= 0].tolist()

    spoken = "\nRepresent the given image.\n"
    assert tail(Content(image=noise(60, 60)), None) == [1, *tokenizer(spoken)["input_ids"]]
    assert tail(Content("word"), "Find:") == tokenizer("Find: word\n")["input_ids"]
    assert tail(Content("word"), None) == tokenizer("word")["input_ids"]
    assert evaluation.fingerprint != embedder.fingerprint


@pytest.mark.parametrize(
    ("size", "crops", "expected"),
    [
        ((612, 792), 4, (672, 672)),
        ((1400, 200), 4, (1344, 336)),
        ((150, 1300), 4, (336, 1344)),
        ((640, 480), 16, (1344, 1008)),
        ((1900, 1500), 16, (1344, 1344)),
        ((5, 5), 1, (336, 336)),
        ((9000, 2), 4, (1344, 336)),
        ((1, 4000), 4, (336, 1344)),
    ],
)
def test_sizes_of_hd_images(size, crops, expected):
    assert hd_size(*size, crops, 336) == expected
    assert hd_image(Image.new("RGB", size), crops, 336).size == expected


def test_contract(folder):
    check_embedder(load_embedder(folder, family=PHI, device="cpu", max_length=230))


def test_long_text_is_cut_and_an_image_is_not(folder):
    backbone = load_embedder(folder, family=PHI, device="cpu", style="mmeb", max_length=60).backbone
    item = inputs_of(backbone, Content("word " * 900, noise(112, 112)), "Find the image.")
    assert item.n_tokens == 60
    assert (item.ids == -1).sum() == 27
    tokens = backbone.tokenizer.convert_ids_to_tokens(item.ids[-3:].tolist())
    assert tokens == ["▁word", "▁word", "<0x0A>"]
    small = load_embedder(folder, family=PHI, device="cpu", max_length=20)
    with pytest.raises(ContentError, match="max_length"):
        small.encode([noise(112, 112)])


def test_an_impossible_number_of_crops_is_refused(folder):
    with pytest.raises(ConfigError, match="num_crops=0"):
        load_embedder(folder, family=PHI, device="cpu", num_crops=0)


def test_weights_without_a_place_and_places_without_weights_are_named(folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    for shard in tmp_path.glob("*.safetensors"):
        weights = load_file(shard)
        if separator := weights.pop("model.vision_embed_tokens.glb_GN", None) is not None:
            weights["model.vision_embed_tokens.other"] = torch.ones(1) * separator
        save_file(weights, shard, metadata={"format": "pt"})
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("embed_tokens.glb_GN", "embed_tokens.other"))
    with pytest.raises(ModelError, match=r"not in the file: \S*glb_GN; 1 weights .*other"):
        load_embedder(tmp_path, family=PHI, device="cpu")


def test_another_architecture_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "phi3_v"}')
    with pytest.raises(ModelError, match=r"config\.json"):
        load_embedder(tmp_path, family=PHI, device="cpu")


def test_gradients_reach_every_part(embedder):
    backbone = embedder.backbone
    items = [inputs_of(backbone, Content("word", noise(60, 50)), None)]
    backbone.forward([*items, inputs_of(backbone, Content("word"), None)]).square().sum().backward()
    images = backbone.model.vision_embed_tokens
    for part in (images.img_processor, images.img_projection, backbone.model.layers):
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters())
    assert images.glb_GN.grad.abs().sum() > 0
    assert images.sub_GN.grad.abs().sum() > 0
    backbone.model.zero_grad()


@pytest.mark.hub
def test_published_similarities():
    """The repository's own example: a cat and a dog, with 16 crops."""
    address = "https://raw.githubusercontent.com/TIGER-AI-Lab/VLM2Vec/main/assets/example.jpg"
    with urllib.request.urlopen(address, timeout=60) as response:
        example = response.read()
    embedder = load_embedder("TIGER-Lab/VLM2Vec-Full", num_crops=16)
    asked = "Represent the given image with the following question:"
    query = embedder.encode([Content("What is in the image", example, asked)])
    answers = embedder.encode(["A cat and a dog", "A cat and a tiger"])
    np.testing.assert_allclose((query @ answers.T)[0], [0.3008, 0.2051], atol=0.02)
