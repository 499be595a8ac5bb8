"""The nano recipe, on tiny sizes, and the checkpoint that ships."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pymupdf
import pytest
import torch
import torch.nn.functional as F
from matplotlib import font_manager
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_nano import save_nano
from tokenizers import Tokenizer

from mmrag.content import Content
from mmrag.embedders import load_backbone, load_embedder
from mmrag.errors import ConfigError
from mmrag.modeling.backbone import inputs_of
from mmrag.modeling.checkpoints import SHIPPED
from mmrag.modeling.vision import run_tower
from mmrag_recipes.nano import build, carry, evaluate, fit, images, texts

FONT = font_manager.findfont("DejaVu Sans")
TEXTS = ["a cat", "the dog eats fish", "eye exams", "net revenue", "a page of text", "tax"]


# --- text data -------------------------------------------------------------------------------


def test_passages_end_with_sentences_and_lose_nothing():
    text = "One two three. Four five. Six seven eight nine. Ten."
    cut = texts.passages(text, 5)
    assert cut == ["One two three. Four five.", "Six seven eight nine. Ten."]


def test_wordnet_line_gives_words_and_gloss(tmp_path):
    line = "00001740 03 n 02 entity 0 living_thing 1 002 ~ 00001930 n 0000 | what exists; a test"
    (tmp_path / "data.noun").write_text(f"  1 license text\n{line}\n")
    assert list(texts.wordnet(tmp_path, 50)) == [
        texts.Pair("entity, living thing", "what exists; a test", "wordnet")
    ]


def test_manual_gives_each_heading_its_own_paragraphs(tmp_path):
    body = "word " * 30
    page = f"<h2>1.2. Vacuum¶</h2><p>{body}</p><h3>Other</h3><p>short</p>"
    (tmp_path / "a.html").write_text(page)
    (pair,) = texts.manual(tmp_path, 100)
    assert pair.query == "Vacuum"
    assert pair.text == body.strip()


def test_cloze_takes_its_sentence_out_of_the_passage():
    pair = texts.Pair("q", "This is the first one. Here comes the second. And last a third.", "s")
    cloze = texts.inverse_cloze(pair, random.Random(0))
    assert cloze.query in pair.text
    assert cloze.query not in cloze.text
    assert sorted((cloze.query + " " + cloze.text).split()) == sorted(pair.text.split())


def test_absent_source_is_reported_and_left_out(tmp_path, capsys):
    (tmp_path / "wordnet").mkdir()
    (tmp_path / "wordnet" / "data.noun").write_text("1 03 n 01 entity 0 0 | what exists")
    assert [pair.query for pair in texts.read_pairs(tmp_path, 0)] == ["entity"]
    assert "medquad" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="medquad"):
        texts.read_pairs(tmp_path / "wordnet", 0)


# --- images ----------------------------------------------------------------------------------


def test_pages_are_cut_off_below_their_text():
    text = "to be or not to be " * 20
    whole = images.render_page(text, FONT)
    for seed in range(5):
        page = images.random_page(text, [FONT], random.Random(seed))
        dark = np.asarray(page.convert("L")).min(axis=1) < 200
        blank = len(dark) - 1 - int(np.flatnonzero(dark).max())
        assert 2 <= blank <= 60
        assert page.height < whole.height == 875


def test_missing_fonts_are_an_error(tmp_path):
    with pytest.raises(ConfigError, match="fonts"):
        images.find_fonts(tmp_path)
    assert images.find_fonts(Path(FONT).parent, ("DejaVuSans.",)) == [FONT]


@pytest.fixture
def titled(tmp_path):
    """A folder of drawings whose names are their titles, some of them held out."""
    names = ["red_apple_01.png", "fruit/red-apple-2.png", "Old_house_ab_9.png", "77.png"]
    for name in [*names, *(f"many/blue sky {i}.png" for i in range(9))]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (600, 300), "red").save(tmp_path / name)
    (tmp_path / "broken_thing.png").write_bytes(b"no drawing")
    return tmp_path


def test_drawings_are_titled_by_their_names(titled, capsys, monkeypatch):
    monkeypatch.setattr(images, "is_held_out", lambda title: title == "old house")
    found = images.read_titled(titled, held_out=False)
    assert sorted((one.title, one.topic) for one in found) == [
        *[("blue sky", "many")] * 3,  # nine were there
        *[("red apple", ""), ("red apple", "fruit")],
    ]
    assert {one.image.size for one in found} == {(224, 112)}
    assert "1 drawings could not be read" in capsys.readouterr().out
    assert [one.title for one in images.read_titled(titled, held_out=True)] == ["old house"]


def test_one_title_in_eight_is_held_out():
    held_out = sum(images.is_held_out(f"title {i}") for i in range(8000))
    assert 900 < held_out < 1100


# --- the vision side -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A tiny checkpoint of the new architecture; its text side is the encoder."""
    return save_nano(tmp_path_factory.mktemp("encoder") / "tiny")


@pytest.fixture(scope="module")
def old(encoder, tmp_path_factory):
    """What a checkpoint of 0.1 held: word vectors, a tower, and a dictionary in layer 0."""
    folder = tmp_path_factory.mktemp("old")
    for name in ("config.json", "preprocessor_config.json"):
        shutil.copyfile(encoder / name, folder / name)
    torch.manual_seed(1)
    tower = load_file(encoder / "model.safetensors")
    weights = {name: value for name, value in tower.items() if name.startswith("visual.")}
    mlp = "model.layers.0.mlp."
    weights |= {
        "model.embed_tokens.weight": torch.randn(200, 32),
        f"{mlp}gate_proj.weight": torch.randn(12, 32),
        f"{mlp}up_proj.weight": torch.randn(12, 32),
        f"{mlp}down_proj.weight": torch.randn(32, 12),
    }
    weights[f"{mlp}gate_proj.weight"][11] = weights[f"{mlp}up_proj.weight"][11] = 0.0
    weights[f"{mlp}gate_proj.weight"][11, -1] = 16.0
    weights[f"{mlp}up_proj.weight"][11, -1] = 1.0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_images_come_over_by_the_map_of_texts(encoder, old, tmp_path, monkeypatch):
    """Against the old decoder's arithmetic, with a new space that is the old one turned."""
    tokenizer = build.plain_tokenizer(encoder)
    weights = load_file(old / "model.safetensors")
    words, mlp = weights["model.embed_tokens.weight"][:, :29], "model.layers.0.mlp."
    turn = torch.linalg.qr(torch.randn(32, 29))[0].T  # (29, 32)
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    many = [" ".join(random.Random(n).choices(letters, k=9)) for n in range(300)]
    wanted = carry.old_vectors(words, tokenizer, many) @ turn
    monkeypatch.setattr(carry.least_squares, "__defaults__", (0.0,))
    carried = carry.carry(old, tokenizer, many, wanted)
    own = load_file(encoder / "model.safetensors")
    text_side = {name: v for name, v in own.items() if not name.startswith(("visual", "readout"))}
    build.write_checkpoint(tmp_path, encoder, {**text_side, **carried}, old)
    backbone = load_backbone(tmp_path, device="cpu", dtype="float32")
    page = images.render_page("a page", FONT).crop((0, 0, 112, 84))
    found = load_embedder(tmp_path, device="cpu", dtype="float32").encode([page])[0]

    prepared = inputs_of(backbone, Content(image=page), None)
    codes = run_tower(backbone.model.visual, [prepared.image], backbone.rule).pooler_output
    codes[:, 29:] = torch.tensor([64.0, -1.0, 1.0])  # what the old decoder added or had learned
    gate, up, down = (weights[f"{mlp}{name}_proj.weight"] for name in ("gate", "up", "down"))
    gate, up = gate.clone(), up.clone()
    gate[:, 29:31] = up[:, 29:31] = 0.0
    tokens = codes[:, :29] + (F.silu(codes @ gate.T) * (codes @ up.T) @ down.T)[:, :29]
    expected = F.normalize(tokens.sum(0) @ turn, dim=0).detach().numpy()
    assert found @ expected > 0.999


def test_least_squares_finds_the_map():
    torch.manual_seed(0)
    given, matrix = torch.randn(100, 8), torch.randn(8, 5)
    found = carry.least_squares(given, given @ matrix, ridge=0.0)
    torch.testing.assert_close(found, matrix, atol=1e-4, rtol=1e-4)
    assert carry.least_squares(given, given @ matrix, ridge=10.0).norm() < matrix.norm() / 2


def test_summed_units_are_what_the_last_layer_gets(encoder):
    backbone = load_backbone(encoder, device="cpu", dtype="float32")
    pages = [images.render_page(text, FONT).crop((0, 0, 200, 100)) for text in TEXTS[:3]]
    units = fit.summed_units(backbone, pages)
    layer = backbone.model.readout.down_proj
    sums = units @ torch.cat([layer.weight.T, layer.bias[None]])
    embedder = load_embedder(encoder, device="cpu", dtype="float32")
    found = F.normalize(sums, dim=1).detach().numpy()
    assert (embedder.encode(pages) * found).sum(axis=1).min() > 0.9999


def test_fit_brings_images_to_their_texts():
    torch.manual_seed(0)
    passages = F.normalize(torch.randn(40, 16), dim=1)
    mixed = torch.randn(16, 24)
    units = torch.cat([passages @ mixed, torch.ones(40, 1)], dim=1)
    pages = fit.Pages(units[:20], passages[:20], passages[:20])
    drawings = fit.Drawings(units[20:], passages[20:], torch.arange(20))
    layer = torch.nn.Linear(24, 16)
    layer.weight.data *= 0.05  # so that what is learned outweighs it

    def right():
        vectors = F.normalize(layer(units[:, :-1]), dim=1)
        return float(((vectors @ passages.T).argmax(1) == torch.arange(40)).float().mean())

    before = right()
    fit.fit_readout(layer, pages, drawings)
    assert before < 0.3
    assert right() > 0.7


# --- measuring -------------------------------------------------------------------------------


def test_chance_is_that_of_a_random_order():
    found = evaluate.chance(20)
    assert found["hit@5"] == found["recall@5"] == 0.25
    ranks = np.arange(1, 21)
    gains = np.where(ranks <= 10, 1 / np.log2(ranks + 1), 0)
    assert found["ndcg@10"] == pytest.approx(gains.mean())
    assert evaluate.chance(4)["hit@5"] == 1.0


def test_scans_are_the_pages_that_answer_a_question(tmp_path):
    (tmp_path / "pdfs").mkdir()
    pdf = pymupdf.open()
    for word in ("cover", "turbines", "propellers"):
        pdf.new_page().insert_text((72, 72), word)
    pdf.save(tmp_path / "pdfs" / "a.pdf")
    asked = [("turbines?", [2]), ("both?", [3, 2])]
    rows = [
        {"question": q, "pages": [{"file": "a.pdf", "page": page} for page in pages]}
        for q, pages in asked
    ]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    scans, questions, right = evaluate.read_scans(tmp_path)
    assert questions == ["turbines?", "both?"]
    assert right == [{0}, {0, 1}]
    assert all(820 < image.width < 830 for image in scans)  # 595 points at 100 dpi


# --- the shipped folder ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def shipped():
    return load_embedder("mmrag-nano", device="cpu")


def test_shipped_checkpoint_is_small_and_says_what_it_takes(shipped):
    folder = SHIPPED / "mmrag-nano"
    assert sum(path.stat().st_size for path in folder.iterdir()) < 60_000_000
    settings = json.loads((folder / "mmrag.json").read_text())
    assert settings.items() >= build._SETTINGS.items()
    assert shipped.modalities == frozenset(settings["modalities"])
    assert (shipped.family, shipped.dim) == ("nano", 384)
    assert shipped.prefers_text and shipped.prefers_passages


def test_shipped_checkpoint_finds_the_passage(shipped):
    passages = [
        "Vision care pays for one eye exam and a pair of glasses each year.",
        "The pilot reported a loss of engine power during the climb.",
        "Net revenue grew by four percent on higher sales.",
    ]
    questions = ["Who pays for my spectacles?", "Why did the airplane crash?", "How much profit?"]
    scores = shipped.encode(questions, "page_for_question") @ shipped.encode(passages).T
    assert scores.argmax(axis=1).tolist() == [0, 1, 2]


def test_shipped_checkpoint_finds_an_image_of_a_page(shipped):
    written = [
        "Vision care pays for one eye exam and a pair of glasses each year. " * 4,
        "The pilot reported a loss of engine power during the climb. " * 4,
    ]
    pages = [images.render_page(text, FONT) for text in written]
    questions = ["an eye exam and glasses", "loss of engine power"]
    scores = shipped.encode(questions, "page_for_question") @ shipped.encode(pages).T
    assert scores.argmax(axis=1).tolist() == [0, 1]


def test_shipped_tokenizer_is_that_of_the_encoder(shipped):
    tokenizer = Tokenizer.from_file(str(SHIPPED / "mmrag-nano" / "tokenizer.json"))
    assert tokenizer.encode("Eye exams").tokens == ["[CLS]", "eye", "exams", "[SEP]"]
    assert tokenizer.truncation is None and tokenizer.padding is None
