"""The nano recipe, on tiny sizes, and the checkpoint that ships."""

import dataclasses
import itertools
import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import font_manager
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from mmrag.content import Content
from mmrag.embedders import load_embedder
from mmrag.errors import ConfigError
from mmrag.modeling.loading import SHIPPED
from mmrag.modeling.qwen_images import to_patches
from mmrag_recipes.nano import (
    build,
    checkpoint,
    distil,
    glyphs,
    grams,
    pictures,
    reading,
    texts,
    tower,
    vectors,
)
from mmrag_recipes.nano.config import NanoConfig, TextConfig, VisionConfig
from mmrag_recipes.nano.crops import WHOLE, Crops, scanned
from mmrag_recipes.options import build as build_options
from mmrag_recipes.options import read_arguments, read_file

FONT = font_manager.findfont("DejaVu Sans")
LAYOUT = glyphs.Layout(font=FONT, size=24, leading=1.2, x=2, y=0, ink=0, paper=255)
WORDS = [
    *("[PAD]", "[UNK]", "the", "cat", "dog", "eats", "fish", "bone", "user", "you", "are", "a"),
    *("system", "helpful", "assistant", "find", "page"),
]
SMALL = VisionConfig(
    depth=1, width=32, crops=2, crop_width=84, crop_height=28, fonts=(str(Path(FONT).parent),)
)


@pytest.fixture(scope="module")
def plain():
    tokenizer = Tokenizer(models.WordPiece({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


@pytest.fixture(scope="module")
def table():
    rng = np.random.default_rng(0)
    return rng.normal(size=(len(WORDS), 61)).astype(np.float32) / 8


@pytest.fixture(scope="module")
def reader(table):
    """A tower and a dictionary of random weights, strong enough to be heard."""
    torch.manual_seed(0)
    reader = reading.Reader(tower.new_tower(SMALL, 64, seed=0), torch.from_numpy(table), units=12)
    torch.nn.init.normal_(reader.tower.merger.mlp[2].bias, std=0.5)
    torch.nn.init.normal_(reader.dictionary.gate.weight, std=0.3)
    torch.nn.init.normal_(reader.dictionary.up.weight, std=0.05)
    return reader


@pytest.fixture(scope="module")
def folder(plain, table, reader, tmp_path_factory):
    """A whole checkpoint of width 64."""
    out = tmp_path_factory.mktemp("nano")
    config = NanoConfig(
        data="", work="", out=str(out), mlp=32, text=TextConfig(dim=61), vision=SMALL
    )
    build.write_checkpoint(config, distil.Student(table, table, {}), reader, plain)
    return out


@pytest.fixture(scope="module")
def embedder(folder):
    return load_embedder(folder, device="cpu")


def summed(words, table):
    total = sum(table[WORDS.index(word)] for word in words.split())
    return total / np.linalg.norm(total)


# --- the decoder -----------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["the cat eats fish", "user", "you are a helpful assistant"])
def test_text_is_the_sum_of_its_token_vectors(embedder, table, text):
    vector = embedder.encode([text])[0]
    assert vector[:61] @ summed(text, table) > 0.9995
    assert np.all(vector[61:] == 0)


def test_words_of_prompt_and_instruction_stay_out_of_the_sum(embedder, table):
    vector = embedder.encode(["cat"], instruction="Find the dog page for the user.")[0]
    assert vector[:61] @ summed("cat", table) > 0.9995


def test_long_text_is_summed_to_the_end(embedder, table):
    text = "the " * 300 + "fish " * 300
    assert embedder.encode([text])[0][:61] @ summed("the fish", table) > 0.999


def test_empty_text_has_a_vector_of_its_own(embedder):
    vector = embedder.encode([""])[0]
    assert math.isclose(float(np.linalg.norm(vector)), 1.0, rel_tol=1e-5)


def read_page(reader, page):
    """What training sees on a page, less what it sees on white paper; (tokens, dim)."""
    paper = Image.new("RGB", (56, 56), "white")
    blank = tower.read_picture(reader.tower, reader.dictionary, paper).mean(0)
    return tower.read_picture(reader.tower, reader.dictionary, page) - blank


def test_picture_is_the_sum_of_what_the_dictionary_gives(embedder, reader):
    page = Image.new("RGB", (168, 112), "white")
    page.paste(glyphs.render(WORDS[2:], 168, 56, LAYOUT, random.Random(0))[0], (0, 0))
    vector = embedder.encode([page])[0]
    total = read_page(reader, page).sum(0)
    assert vector[:61] @ (total / total.norm()).numpy() > 0.9995
    assert np.all(vector[61:] == 0)


def test_picture_and_text_are_summed_together(embedder, reader, table):
    page = glyphs.render(WORDS[2:], 112, 56, LAYOUT, random.Random(0))[0].convert("RGB")
    vector = embedder.encode([Content(text="cat fish", image=page)])[0]
    words = sum(table[WORDS.index(word)] for word in ("cat", "fish"))
    total = read_page(reader, page).sum(0).numpy() * tower.common_size(table) + words
    assert vector[:61] @ (total / np.linalg.norm(total)) > 0.9995


def test_empty_paper_adds_nothing_to_the_sum(embedder):
    paper = Image.new("RGB", (112, 84), "white")
    plain, with_paper = embedder.encode(["cat fish", Content(text="cat fish", image=paper)])
    assert plain @ with_paper > 0.999


def test_text_is_preferred_where_there_is_some(embedder):
    assert embedder.prefers_text


def test_width_must_hold_whole_heads():
    with pytest.raises(ValueError, match="dimensions"):
        checkpoint.hidden_size(60)


# --- text data -------------------------------------------------------------------------------


def test_passages_end_with_sentences_and_lose_nothing():
    text = "One two three. Four five. Six seven eight nine. Ten."
    cut = texts.passages(text, 5)
    assert cut == ["One two three. Four five.", "Six seven eight nine. Ten."]


def test_wordnet_line_gives_words_and_gloss(tmp_path):
    line = "00001740 03 n 02 entity 0 living_thing 1 002 ~ 00001930 n 0000 | what exists; a test"
    (tmp_path / "data.noun").write_text(f"  1 licence text\n{line}\n")
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
    assert texts.read_pairs(tmp_path, {"medquad": 5}, 50, 0) == []
    assert "medquad" in capsys.readouterr().out


# --- vectors and distillation ----------------------------------------------------------------


def test_rare_pieces_weigh_more():
    counts = np.full(vectors.FIRST_PIECE + 3, 5)
    counts[-3:] = 1000, 10, 0
    weights = vectors.rarity(counts, 2.0)
    assert weights[-3] < weights[-2] < weights[-1]


def test_trigrams_have_word_ends_and_skip_marks():
    assert grams.trigrams("A to!") == [" a ", None, " to", "to ", None]
    assert grams.count("to to")["to "] == 2


def test_chosen_bags_embed_as_all_bags_do(table):
    bags = distil.Bags.of([[1, 2], [], [3, 3, 4]], [[1, 2], [], [1, 1, 5]])
    weights = torch.from_numpy(table)
    whole = bags.embed(weights)
    expected = table[3] * 2 + table[4] * 5
    assert torch.allclose(bags.take(np.array([2, 1])).embed(weights), whole[[2, 1]])
    assert np.allclose(whole[2], expected / np.linalg.norm(expected), atol=1e-6)


def test_distillation_learns_what_the_teacher_knows(plain, table):
    """The teacher calls a cat a dog; at the start the student does not."""
    queries = ["cat", "fish", "bone", "page"] * 8
    passages = ["dog", "eats", "helpful", "find"] * 8
    rng = np.random.default_rng(1)
    same = np.repeat(rng.normal(size=(1, 4, 16)), 8, axis=0).reshape(32, 16)
    teacher = same / np.linalg.norm(same, axis=1, keepdims=True)
    pairs = [texts.Pair(q, p, "") for q, p in zip(queries, passages, strict=True)]
    config = TextConfig(epochs=40, batch=4, held_out=0, gram_count=1, learning_rate=0.02)
    student = distil.distil(pairs, (teacher, teacher), table, plain, config, seed=0)
    cat, dog, eats = (student.words[WORDS.index(w)] for w in ("cat", "dog", "eats"))
    assert cosine(cat, dog) > cosine(cat, eats) + 0.3
    assert cosine(table[WORDS.index("cat")], table[WORDS.index("dog")]) < 0.5
    seen = sum(student.grams[student.vocabulary[g]] for g in (" do", "dog", "og "))
    assert cosine(cat, seen) > 0.5


def cosine(a, b):
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


# --- the tower -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def crop():
    return glyphs.render(["to", "be"], 84, 28, LAYOUT, random.Random(0))


def test_characters_lie_where_they_are_said_to_lie(crop):
    picture, found = crop
    assert [glyphs.CLASSES[g.kind] for g in found] == list("tobe")
    dark = np.asarray(picture) < 128
    for glyph in found:
        assert dark[:, round(glyph.left) : round(glyph.right)].any()
    gap = slice(math.ceil(found[1].right), math.floor(found[2].left))
    assert not dark[:, gap].any()


def test_probes_and_trigrams_follow_the_characters(crop):
    _, found = crop
    classes = glyphs.probe_classes(found, 84, 28)
    assert classes.shape == (12, 4)
    first, second = found[0], found[1]
    row = 14 + 3.5  # the third row of probes
    for glyph in (first, second):
        column = int((glyph.left + glyph.right) / 2 // 7)
        if glyph.left <= column * 7 + 3.5 <= glyph.right:
            patch = (int(row) // 14 % 2) * 2 + column // 2 % 2 + 4 * (column // 4)
            assert classes[patch, column % 2] == glyph.kind
    places = glyphs.gram_places(found, 84, 28, {" to": 0, "to ": 1, " be": 2, "be ": 3})
    assert [gram for _, gram in places] == [0, 1, 2, 3]
    for (patch, _), glyph in zip(places, found, strict=True):
        column = int((glyph.left + glyph.right) / 2) // 14
        row = int((glyph.top + glyph.bottom) / 2) // 14
        assert patch == 4 * (column // 2) + 2 * row + column % 2


def test_tables_set_words_in_columns():
    table = dataclasses.replace(LAYOUT, size=12, columns=30)
    picture, found = glyphs.render(["a", "bcdefg", "h"] * 8, 168, 56, table, random.Random(0))
    assert {g.left % 30 for g in found if g.kind == glyphs.kind_of("a")} == {2.0}
    assert np.asarray(picture).min() < 50


def test_bars_are_drawn_where_the_text_was_cleared():
    paper = Image.new("L", (112, 56), 255)
    rng = random.Random(0)
    inked = [np.asarray(glyphs.clear_edge(paper, [], 255, rng)[0]).min() < 255 for _ in range(200)]
    assert 0.05 < np.mean(inked) < 0.2  # 0.6 * 0.2, less those that empty nothing


def test_cleared_edge_holds_neither_ink_nor_characters(crop):
    picture, found = crop
    rng = random.Random(0)
    for _ in range(20):
        cleared, kept = glyphs.clear_edge(picture, found, 255, rng)
        assert set(kept) <= set(found)
        for glyph in set(found) - set(kept):
            middle = round((glyph.left + glyph.right) / 2)
            seen = np.asarray(cleared)[14:, :]
            same = np.array_equal(seen, np.asarray(picture)[14:, :])
            assert not same, f"character at {middle} was dropped, its ink was not"


def test_each_head_starts_on_its_neighbour():
    heads = 6
    config = SMALL.replace(width=heads * tower.HEAD_DIM)
    eyes = tower.new_tower(config, 64, seed=0)
    bias = eyes.blocks[0].attn.qkv.bias.detach().view(3, heads, tower.HEAD_DIM)
    size = 8
    pairs = tower.HEAD_DIM // 4
    frequency = 10000.0 ** (-2 * np.arange(pairs) / (tower.HEAD_DIM // 2))
    row, column = np.divmod(np.arange(size * size), size)
    angles = np.concatenate([row[:, None] * frequency, column[:, None] * frequency], axis=1)

    def turned(vector):
        half = tower.HEAD_DIM // 2
        a, b = vector[:half].numpy(), vector[half:].numpy()
        cos, sin = np.cos(angles), np.sin(angles)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=1)

    here = 3 * size + 3
    for head, (down, right) in enumerate(tower.NEIGHBOURS):
        logits = turned(bias[0, head])[here] @ turned(bias[1, head]).T
        assert logits.argmax() == (3 + down) * size + 3 + right


def test_cosine_patches_are_orthogonal():
    flat = tower.cosine_patches(32)[:-2, 0, 0].flatten(1)  # the last two are of colour
    gram = flat @ flat.T
    assert torch.allclose(gram, torch.diag(gram.diag()), atol=1e-6)


def test_tower_starts_with_a_linear_merger():
    mlp = tower.new_tower(SMALL, 64, seed=0).merger.mlp
    one, two = torch.randn(2, 4 * SMALL.width)
    torch.testing.assert_close(mlp(one + two), mlp(one) + mlp(two))


def small_crops(folder=str(Path(FONT).parent)):
    patches = tower.new_tower(SMALL, 64, seed=0).patch_embed.proj.weight.detach()
    config = SMALL.replace(fonts=(folder,))
    words, grams = ["to be or not to be"] * 20, {" to": 0, " be": 1}
    return Crops(words, torch.randn(3, 61), grams, patches.flatten(1).T, config, 0)


def test_crops_carry_what_the_tower_would_see():
    eyes = tower.new_tower(SMALL, 64, seed=0)
    crop = small_crops().draw()
    assert crop.patches.shape == (12, SMALL.width)
    assert crop.grid == (1, 2, 6)
    assert crop.wanted.shape == (3, 61)
    white = Image.new("RGB", (84, 28), "white")
    pixels, _ = to_patches(white, WHOLE)
    embedding = eyes.patch_embed.proj.weight.detach().flatten(1).T
    torch.testing.assert_close(pixels @ embedding, eyes.patch_embed(pixels), atol=1e-4, rtol=1e-4)


def test_scans_are_noisy_and_paler():
    page = Image.new("L", (64, 64), 255)
    page.paste(0, (0, 0, 32, 64))
    scan = np.asarray(scanned(page, random.Random(1)), dtype=float)
    assert scan[:, 40:].std() > 0
    assert scan[:, 40:].mean() < 255
    assert scan[:, :24].mean() > 0


def test_tower_learns_and_goes_on_where_it_stopped(tmp_path, monkeypatch):
    seconds = itertools.count()
    monkeypatch.setattr(reading.time, "monotonic", lambda: float(next(seconds)))
    crops, out = small_crops(), tmp_path / "tower.pt"

    def train(minutes):
        eyes = tower.new_tower(SMALL, 64, seed=0)
        torch.manual_seed(0)
        reader = reading.Reader(eyes, crops.vectors, 2)
        eyes.patch_embed = torch.nn.Identity()
        before = reading.read_loss(reader, batch, 0.5)[0]
        config = SMALL.replace(minutes=minutes)
        reading.train_reader(reader, crops, None, config, out)
        return before, reading.read_loss(reader, batch, 0.5)[0], torch.load(out)["step"]

    batch = [crops.draw() for _ in range(8)]
    untrained, _, first = train(0.5)
    _, trained, second = train(0.8)
    assert (first, second) == (29, 46)
    assert trained < untrained


def test_common_error_is_what_pages_have_too_much_of(reader, table):
    fonts = SMALL.replace(faces=("DejaVuSans.",))
    config = NanoConfig(data="", work="", out="", text=TextConfig(dim=61), vision=fonts)
    units = reader.dictionary.vectors
    vocabulary = {" to": 0, "to ": 1, " be": 2, "be ": 40}  # the dictionary has 12
    student = distil.Student(table, table, vocabulary)
    passages = ["to be or not to be", "to"]
    found = build.common_error(config, student, reader, passages)
    wanted = [2 * units[0] + 2 * units[1] + 2 * units[2], units[0] + units[1]]
    rest = torch.zeros(61)
    for text, vector in zip(passages, wanted, strict=True):
        page = glyphs.render_page(text, FONT)
        wide, tall = (round(side / 28) * 28 for side in page.size)
        page = page.resize((wide, tall), Image.Resampling.BICUBIC)
        tokens = tower.read_picture(reader.tower, reader.dictionary, page)
        rest += (tokens.sum(0) - vector) / len(tokens)
    torch.testing.assert_close(found, rest / 2, atol=1e-4, rtol=1e-3)


def test_missing_fonts_are_an_error():
    with pytest.raises(FileNotFoundError, match="fonts"):
        small_crops("/none")


@pytest.fixture
def titled(tmp_path):
    """A folder of pictures whose names are their titles, some of them held out."""
    names = ["red_apple_01.png", "fruit/red-apple-2.png", "Old_house_ab_9.png", "77.png"]
    for name in [*names, *(f"many/blue sky {i}.png" for i in range(9))]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (600, 300), "red").save(tmp_path / name)
    (tmp_path / "broken_thing.png").write_bytes(b"no picture")
    return tmp_path


def test_pictures_are_titled_by_their_names(titled, capsys, monkeypatch):
    monkeypatch.setattr(pictures, "is_held_out", lambda title: title == "old house")
    found = pictures.read_titled(titled, held_out=False)
    assert sorted((one.title, one.topic) for one in found) == [
        *[("blue sky", "many")] * 3,  # nine were there
        *[("red apple", ""), ("red apple", "fruit")],
    ]
    assert {one.picture.size for one in found} == {(224, 112)}
    assert "1 pictures could not be read" in capsys.readouterr().out
    assert [one.title for one in pictures.read_titled(titled, held_out=True)] == ["old house"]


def test_one_title_in_eight_is_held_out():
    held_out = sum(pictures.is_held_out(f"title {i}") for i in range(8000))
    assert 900 < held_out < 1100


_PRIMARIES = ("red", "lime", "blue")


def test_grey_has_no_colour_and_colours_differ():
    weights = tower.cosine_patches(SMALL.width).flatten(1).T

    def colour(name):
        patches, _ = to_patches(Image.new("RGB", (28, 28), name), WHOLE)
        return (patches @ weights)[0, -2:]

    grey = colour("grey")
    for name in ("white", "black"):
        torch.testing.assert_close(colour(name), grey, atol=1e-4, rtol=0)
    red, lime, blue = ((colour(name) - grey).round().sign().tolist() for name in _PRIMARIES)
    assert (red, lime, blue) == ([1, 1], [-1, 1], [0, -1])


def test_tower_learns_what_pictures_show(plain, table, monkeypatch):
    """Discs that differ in colour alone."""
    monkeypatch.setattr(pictures, "_SMALLEST", 2)
    monkeypatch.setattr(pictures, "LARGEST", 3)
    items = []
    for title, colour in zip(("cat", "dog", "fish"), _PRIMARIES, strict=True):
        disc = Image.new("RGB", (84, 84), "white")
        ImageDraw.Draw(disc).ellipse((14, 14, 70, 70), fill=colour)
        items.append(pictures.Titled(title, "", disc))
    eyes = tower.new_tower(SMALL, 64, seed=0)
    embedding = eyes.patch_embed.proj.weight.detach().flatten(1).T
    source = pictures.Pictures(items, torch.from_numpy(table), plain, embedding, seed=0)
    torch.manual_seed(0)
    reader = reading.Reader(eyes, torch.from_numpy(table), units=12)
    eyes.patch_embed = torch.nn.Identity()
    optimizer = torch.optim.Adam(reader.parameters(), lr=3e-3)
    for _ in range(60):
        loss, metrics = pictures.picture_loss(reader, source, 6)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert metrics["titles"] == 1.0


def test_pictures_that_are_missing_are_said(tmp_path, plain, table, capsys):
    vision = SMALL.replace(picture_folder="openclipart")
    config = NanoConfig(data=str(tmp_path), work="", out="", vision=vision)
    student = distil.Student(table, table, {})
    assert build.titled_pictures(config, student, torch.zeros(1, 1), plain) is None
    assert "will not know any" in capsys.readouterr().out


# --- configuration and the shipped folder ----------------------------------------------------


def test_shipped_configuration_is_read_and_unknown_keys_are_refused(tmp_path):
    given = Path(build.__file__).with_name("nano.toml")
    config = read_arguments(NanoConfig, ["--config", str(given), "--text.epochs", "1"], "nano")
    assert config.text.epochs == 1
    assert config.text.limits["medquad"] > 0
    with pytest.raises(ConfigError, match="epoch"):
        build_options(NanoConfig, {**read_file(given), "text": {"epoch": 1}}, "here")


def test_finished_steps_are_not_done_again(tmp_path, table):
    config = NanoConfig(data="/none", work=str(tmp_path), out="", text=TextConfig(dim=61))
    pairs = [texts.Pair("q", "p", "s")]
    texts.write_pairs(pairs, tmp_path / "pairs.jsonl")
    names = np.array([" to", "to "])
    np.savez(tmp_path / "student.npz", words=table, grams=table[:2], vocabulary=names)
    assert build.read_pairs(config) == pairs
    student = build.learn_text(config, build.Sources(Path(), Path()), pairs)
    assert student.vocabulary == {" to": 0, "to ": 1}
    assert np.array_equal(student.words, table)


@pytest.fixture(scope="module")
def shipped():
    return load_embedder("mmrag-nano", device="cpu")


def test_shipped_checkpoint_is_small_and_says_what_it_takes(shipped):
    folder = SHIPPED / "mmrag-nano"
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 48_000_000
    settings = json.loads((folder / "mmrag.json").read_text())
    assert shipped.modalities == frozenset(settings["modalities"])
    assert shipped.dim == 384


def test_shipped_checkpoint_finds_the_passage(shipped):
    passages = [
        "Vision care pays for one eye exam and a pair of glasses each year.",
        "The pilot reported a loss of engine power during the climb.",
        "Net revenue grew by four percent on higher sales.",
    ]
    questions = ["Who pays for my spectacles?", "Why did the airplane crash?", "How much profit?"]
    scores = shipped.encode(questions, "page_for_question") @ shipped.encode(passages).T
    assert scores.argmax(axis=1).tolist() == [0, 1, 2]


def test_leading_dimensions_of_the_shipped_checkpoint_carry_most(shipped):
    words = ["cat", "dog", "income tax", "revenue", "aircraft", "engine", "doctor", "nurse"]
    full, short = shipped.encode(words), shipped.encode(words, dim=128)
    off = ~np.eye(len(words), dtype=bool)
    assert np.corrcoef((full @ full.T)[off], (short @ short.T)[off])[0, 1] > 0.8
