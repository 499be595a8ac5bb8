"""Rows: what is refused, with which words; images by id."""

import json

import pytest
from PIL import Image

from mmrag.errors import ContentError
from mmrag_recipes.rows import ImageStore, Item, Row, check_rows, read_rows, store_of, write_rows

GOOD = {"id": "a", "query": {"text": "q"}, "positives": [{"text": "p"}]}


def test_rows_survive_writing_and_reading(tmp_path):
    row = Row(
        id="x",
        task="page_for_question",
        instruction="Find it.",
        query=Item(text="q", image="abc"),
        positives=[Item(image="def")],
        negatives=[Item(text="n")],
        negative_scores=[0.25],
        source="a.pdf#3",
        license="MIT",
    )
    path = tmp_path / "rows.jsonl"
    assert write_rows(path, [row]) == 1
    assert read_rows(path) == [row]
    assert row.pair == "fused->image"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"positives": []}, "positives: List should have at least 1 item"),
        ({"query": {}}, "query: an item needs a text, an image, or both"),
        ({"qeury": 1}, "qeury: Extra inputs are not permitted"),
        ({"negatives": [{"text": "p"}]}, "a negative is the same as a positive"),
        ({"negatives": [{"text": "n"}, {"text": "p", "image": None}]}, "a negative is the same"),
        ({"negative_scores": [0.1]}, "1 negative_scores for 0 negatives"),
        ({"positives": [{"image": "nowhere"}]}, "there is no image with id 'nowhere'"),
        ({"positives": [{"image": "../../etc/passwd"}]}, "there is no image with id"),
        ({"query": {"text": "a \ud800"}}, "query.text: 'utf-8' codec can't encode"),
        ({"positive_scores": [float("nan")]}, "positive_scores.0: Input should be a finite"),
        ({"id": ""}, "id: String should have at least 1 character"),
    ],
)
def test_bad_rows_are_named_and_the_good_ones_kept(tmp_path, change, words):
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps({**GOOD, "id": "first"}), json.dumps({**GOOD, **change}), "{oops", ""]
    path.write_text("\n".join([*lines, json.dumps({**GOOD, "id": "first"})]))
    rows, problems = check_rows(path, store_of(path))
    assert [row.id for row in rows] == ["first"]
    assert len(problems) == 3
    assert problems[0].startswith(f"{path}:2: ")
    assert words in problems[0]
    assert "3: not valid JSON" in problems[1]
    assert "5: id 'first' is in line 1 already" in problems[2]


def test_images_are_stored_once_and_checked(tmp_path):
    store = ImageStore(tmp_path)
    image = Image.new("RGB", (8, 8), "blue")
    first, second = store.add(image), store.add(image)
    assert first == second
    assert len(list(tmp_path.iterdir())) == 1
    with Image.open(store.path(first)) as stored:
        assert stored.size == (8, 8)
    with pytest.raises(ContentError):
        store.add(b"not an image")


def test_equal_items_have_equal_keys_and_others_do_not():
    assert Item(text="a").key == Item(text="a").key
    keys = {Item(text="a").key, Item(image="a").key, Item(text="a", image="b").key}
    assert len(keys) == 3


def test_negatives_may_be_like_positives():
    positives = [Item(text="a"), Item(text="b", image="i"), Item(image=("i", "j"))]
    negatives = [Item(image="a"), Item(text="b"), Item(image="i"), Item(image=("j", "i"))]
    row = Row(id="r", query=Item(text="a"), positives=positives, negatives=negatives)
    assert row.negatives == negatives


@pytest.mark.parametrize(
    ("source", "place"),
    [("a b.pdf#3", "a b.pdf#3"), ("a.pdf#12 (item #7)", "a.pdf#12"), ("nq", None), ("", None)],
)
def test_the_page_that_a_source_names(source, place):
    row = Row(id="r", query=Item(text="q"), positives=[Item(text="p")], source=source)
    assert row.place == place
