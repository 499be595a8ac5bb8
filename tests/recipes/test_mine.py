"""T11: no positive, no copy, quotas, margin, modality pools, determinism."""

import numpy as np
import pytest
from fakes import FakeEmbedder
from PIL import Image

from mmrag.errors import ConfigError, ContentError
from mmrag_recipes import mine as mine_module
from mmrag_recipes import vectors
from mmrag_recipes.__main__ import main
from mmrag_recipes.config import MineConfig
from mmrag_recipes.mine import mine, rescore
from mmrag_recipes.options import build
from mmrag_recipes.rows import ImageStore, Item, Row, read_rows, write_rows
from mmrag_recipes.vectors import VectorCache, nearest


class Planned:
    """An embedder whose vectors are written down: a text or image with its angle."""

    name, family, dim = "planned", "test", 2
    modalities = frozenset({"text", "image", "fused"})
    fingerprint = "0"

    def __init__(self, angles):
        self.angles = angles

    def encode(self, contents, instruction=None, dim=None, progress=False):
        names = [c.text or c.image.name for c in contents]
        degrees = np.deg2rad([self.angles[name] for name in names])
        return np.stack([np.cos(degrees), np.sin(degrees)], axis=1).astype(np.float32)


@pytest.fixture
def store(tmp_path):
    return ImageStore(tmp_path / "images")


def planned(store, image_angles: dict[str, float], text_angles: dict[str, float]):
    images = {}
    for name in image_angles:
        colour = (hash(name) % 255, len(images) * 40, 9)
        images[name] = store.add(Image.new("RGB", (20, 20), colour))
    angles = {**text_angles, **{images[n]: a for n, a in image_angles.items()}}
    return Planned(angles), {name: Item(image=i) for name, i in images.items()}


def configured(**options) -> MineConfig:
    return MineConfig(rows="unused", out="unused", **options)


def unkept(embedder, store):
    return VectorCache(None, embedder, store)


def loose(*items):
    """Documents of no page."""
    return [(item, "") for item in items]


def row_of(positive: Item, others=()) -> Row:
    return Row(id="r", query=Item(text="q"), positives=[positive, *others])


def test_the_two_pools_of_mm_embed(store):
    """Texts above the image that was asked for are wrong; images well below it are right."""
    embedder, images = planned(
        store,
        {"positive": 20, "near": 24, "far": 50, "farther": 60},
        {"q": 0, "above": 5, "below": 30},
    )
    extra = loose(Item(text="above"), Item(text="below"), *images.values())
    config = configured(right=5, wrong=5, max_ratio=0.95, duplicate_cosine=0.9999)
    (mined,), report = mine([row_of(images["positive"])], unkept(embedder, store), config, extra)
    assert mined.negatives == [Item(text="above"), images["far"], images["farther"]]
    # cos 24 / cos 20 = 0.972 is over 0.95, cos 50 / cos 20 = 0.684 is not.
    assert report.dropped["too close to the positive's score"] == 1
    assert mined.negative_scores == pytest.approx(np.cos(np.deg2rad([5, 50, 60])), abs=1e-5)
    assert mined.positive_scores == pytest.approx([np.cos(np.deg2rad(20))], abs=1e-5)
    assert report.taken == {"text for image": 1, "image for image": 2}
    assert report.short == 1


def test_positives_and_their_copies_are_never_negatives(store):
    embedder, _ = planned(
        store, {}, {"q": 0, "a": 10, "second": 60, "A ": 40, "copy": 10.5, "other": 50}
    )
    extra = loose(*(Item(text=text) for text in ("A ", "copy", "other", "q")))
    row = row_of(Item(text="a"), [Item(text="second")])
    config = configured(right=9, max_ratio=99, duplicate_cosine=0.999)
    (mined,), report = mine([row], unkept(embedder, store), config, extra)
    assert mined.negatives == [Item(text="other")]
    assert report.dropped["like a positive"] == 2  # the same words, and the same direction


def test_the_margin_follows_the_worst_positive(store):
    embedder, _ = planned(store, {}, {"q": 0, "a": 0.5, "b": 60, "c": 30, "d": 80})
    row = row_of(Item(text="a"), [Item(text="b")])
    (mined,), _ = mine(
        [row],
        unkept(embedder, store),
        configured(),
        loose(Item(text="c"), Item(text="d")),
    )
    assert mined.negatives == [Item(text="d")]


def test_rank_cut_quota_and_sampling(store):
    texts = {"q": 0, "a": 1} | {f"n{i}": 20 + i for i in range(20)}
    embedder, _ = planned(store, {}, texts)
    extra = loose(*(Item(text=f"n{i}") for i in range(20)))
    row = row_of(Item(text="a"))

    def mined(**options):
        (result,), _ = mine([row], unkept(embedder, store), configured(right=3, **options), extra)
        return [item.text for item in result.negatives]

    assert mined() == ["n0", "n1", "n2"]
    assert mined(rank_cut=11) == ["n10", "n11", "n12"]
    drawn = mined(sample="random", seed=1)
    assert drawn == mined(sample="random", seed=1)
    assert drawn != mined(sample="random", seed=2)
    assert mined(depth=3) == ["n0", "n1"]


@pytest.mark.parametrize("options", [{"sample": "best"}, {"rank_cut": 100, "depth": 100}])
def test_settings_that_contradict_each_other(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        build(MineConfig, {"rows": "r", "out": "o", **options}, "here")


def test_nothing_from_the_page_that_answers_is_a_negative(store):
    """A passage of the page, and the page less another sentence, may answer as well."""
    angles = {"page": 10, "passage": 40, "other page": 60, "other file": 70}
    embedder, _ = planned(store, {}, {**angles, **{f"what of {text}?": 0 for text in angles}})
    asked = {"page": "a.pdf#1", "passage": "a.pdf#1 (why)", "other page": "a.pdf#11"}
    rows = [
        Row(
            id=text,
            query=Item(text=f"what of {text}?"),
            positives=[Item(text=text)],
            source=source,
        )
        for text, source in {**asked, "other file": "b.pdf#1"}.items()
    ]
    config = configured(right=9, max_ratio=0.95, duplicate_cosine=0.9999)
    mined, report = mine(rows, unkept(embedder, store), config)
    assert mined[0].negatives == [Item(text="other page"), Item(text="other file")]
    assert report.dropped["from the positive's page"] == 2


def test_what_answers_the_same_query_in_another_row_is_no_negative(store):
    embedder, _ = planned(store, {}, {"q": 0, "one": 10, "two": 40, "three": 50})
    rows = [
        Row(id="1", query=Item(text="q"), positives=[Item(text="one")]),
        Row(id="2", query=Item(text="q"), positives=[Item(text="two")]),
    ]
    config = configured(duplicate_cosine=0.9999)
    mined, report = mine(rows, unkept(embedder, store), config, loose(Item(text="three")))
    assert [row.negatives for row in mined] == [[Item(text="three")]] * 2
    assert report.dropped["answers the same query of another row"] == 2


def test_the_margin_is_below_a_positive_that_scores_negative(store):
    """At cos 120 = -.5, 95 % of the score would be above it."""
    embedder, _ = planned(store, {}, {"q": 0, "a": 120, "near": 121, "far": 150})
    extra = loose(Item(text="near"), Item(text="far"))
    config = configured(duplicate_cosine=0.99999)
    (mined,), report = mine([row_of(Item(text="a"))], unkept(embedder, store), config, extra)
    assert mined.negatives == [Item(text="far")]
    assert report.dropped["too close to the positive's score"] == 1


def test_pages_without_a_row_are_candidates_and_the_own_page_is_none(store):
    embedder, _ = planned(store, {}, {"q": 0, "a": 10, "own passage": 30, "other page": 40})
    row = row_of(Item(text="a")).model_copy(update={"source": "a.pdf#1"})
    extra = [(Item(text="own passage"), "a.pdf#1"), (Item(text="other page"), "b.pdf#7")]
    (mined,), report = mine([row], unkept(embedder, store), configured(), extra)
    assert mined.negatives == [Item(text="other page")]
    assert report.dropped["from the positive's page"] == 1


def test_nearest_in_blocks_is_a_stable_sort_of_all(monkeypatch):
    chance = np.random.default_rng(0)
    queries = chance.integers(-2, 3, (7, 3)).astype(np.float32)  # many equal scores
    documents = chance.integers(-2, 3, (50, 3)).astype(np.float32)
    expected = np.argsort(-(queries @ documents.T), axis=1, kind="stable")
    for at_once in (1, 120, 10_000):
        monkeypatch.setattr(vectors, "_SCORES_AT_ONCE", at_once)
        for depth in (1, 10, 50, 99):
            found = [order.tolist() for order, _ in nearest(queries, documents, depth)]
            assert found == expected[:, :depth].tolist()


def test_vectors_are_kept_between_runs_and_by_instruction(store, tmp_path, monkeypatch):
    monkeypatch.setattr(vectors, "_ITEMS_AT_ONCE", 2)
    items = [Item(text=f"word{n}") for n in range(5)]
    embedder = FakeEmbedder()
    first = VectorCache(tmp_path, embedder, store).encode(items)
    assert embedder.encoded == 5
    again = FakeEmbedder()
    assert (VectorCache(tmp_path, again, store).encode(items[::-1]) == first[::-1]).all()
    assert again.encoded == 0
    VectorCache(tmp_path, again, store).encode(items, ["Find a page."] * 5)
    assert again.encoded == 5
    other = FakeEmbedder(version="2")
    VectorCache(tmp_path, other, store).encode(items)
    assert other.encoded == 5


def test_where_vectors_cannot_be_kept_they_are_made_all_the_same(store, tmp_path, caplog):
    items = [Item(text=f"t{n}") for n in range(vectors._ITEMS_AT_ONCE + 1)]
    in_the_way = tmp_path / "rows.jsonl.index"
    in_the_way.write_text("no folder")
    embedder = FakeEmbedder()
    found = VectorCache(in_the_way, embedder, store).encode(items)
    assert (found == VectorCache(None, embedder, store).encode(items)).all()
    assert [record.message[:22] for record in caplog.records] == ["vectors are not kept: "]


def test_a_reranker_scores_as_the_teacher(store):
    class Lengths:
        name = "lengths"

        def judge(self, pairs, instruction=None):
            assert instruction == "Find it."
            texts = [document.text for _, document in pairs]
            return [ContentError("no") if "bad" in text else len(text) / 10 for text in texts]

    row = row_of(Item(text="four")).model_copy(
        update={"negatives": [Item(text="sixsix")], "instruction": "Find it."}
    )
    bad = row.model_copy(update={"negatives": [Item(text="bad")]})
    scored, failed = rescore([row, bad], Lengths(), store)
    assert (scored.positive_scores, scored.negative_scores) == ([0.4], [0.6])
    assert (failed.positive_scores, failed.negative_scores) == ([], [])


def test_the_command_writes_the_scores_of_a_reranker(tmp_path, monkeypatch):
    class Lengths:
        name = "lengths"

        def judge(self, pairs, instruction=None):
            return [len(document.text) / 10 for _, document in pairs]

    texts = ("whales swim", "camels walk far")
    rows = [Row(id=t, query=Item(text=f"about {t}"), positives=[Item(text=t)]) for t in texts]
    write_rows(tmp_path / "rows.jsonl", rows)
    monkeypatch.setattr(mine_module, "load_embedder", lambda name, family: FakeEmbedder())
    monkeypatch.setattr(mine_module, "load_scorer", lambda name: Lengths())
    words = ["mine", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "mined.jsonl")]
    main([*words, "--reranker", "lengths", "--max-ratio", "5"])
    whales, camels = read_rows(tmp_path / "mined.jsonl")
    assert (whales.positive_scores, whales.negative_scores) == ([1.1], [1.5])
    assert (camels.positive_scores, camels.negative_scores) == ([1.5], [1.1])


def test_the_command_searches_a_folder_and_keeps_its_vectors(tmp_path, monkeypatch, capsys):
    (tmp_path / "papers").mkdir()
    for name in ("whales", "tigers", "camels"):
        (tmp_path / "papers" / f"{name}.txt").write_text(f"All about {name} and where they live.")
    row = Row(id="r", query=Item(text="whales"), positives=[Item(text="whales swim in oceans")])
    write_rows(tmp_path / "rows.jsonl", [row])
    embedder = FakeEmbedder()
    monkeypatch.setattr(mine_module, "load_embedder", lambda name, family: embedder)
    words = ["mine", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "mined.jsonl")]
    main([*words, "--corpus", str(tmp_path / "papers"), "--max-ratio", "5"])
    (mined,) = read_rows(tmp_path / "mined.jsonl")
    assert len(mined.negatives) == 3
    assert "3 negatives" in capsys.readouterr().out
    before = embedder.encoded
    main([*words, "--corpus", str(tmp_path / "papers")])
    assert embedder.encoded == before
