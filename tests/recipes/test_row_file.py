"""Rows by offset: the same rows as in memory, in one process or in several."""

import hashlib
import json
import os
import shutil

import numpy as np
import pytest
from training import config_of

from mmrag.embedders import load_backbone
from mmrag.errors import ContentError
from mmrag_recipes import data, row_file
from mmrag_recipes.data import LEFT_OUT, load_datasets
from mmrag_recipes.row_file import Keys, open_rows
from mmrag_recipes.rows import Item, Row, read_rows, store_of, write_rows
from mmrag_recipes.train import load_model


def rows_of(count):
    return [
        Row(
            id=f"r{n}",
            query=Item(text=f"q{n} ü"),
            positives=[Item(text=f"p{n} {k}") for k in range(1 + n % 2)],
            negatives=[Item(text=f"n{n} {k}") for k in range(n % 3)],
            source=f"a.pdf#{n}" if n % 4 else "",
        )
        for n in range(count)
    ]


def test_rows_and_keys_are_those_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(row_file, "_RANGE", 150)  # a line or two in each
    monkeypatch.setattr(row_file, "_FEW_TASKS", 1000)
    path = tmp_path / "rows.jsonl"
    expected = rows_of(30)
    write_rows(path, expected)
    path.write_text(path.read_text().replace("\n", "\n\n", 3).rstrip("\n"))  # as people edit
    rows = open_rows(path)
    assert list(rows) == expected
    assert rows[-1] == expected[-1]
    keys = Keys.of(expected)
    assert (rows.keys.queries == keys.queries).all()
    assert (rows.keys.places == keys.places).all()
    for index in range(30):
        assert (rows.keys.positives[index] == keys.positives[index]).all()
        assert (rows.keys.negatives[index] == keys.negatives[index]).all()


def key_of(*content):
    """The key of a text and an image, as an index holds it."""
    digest = hashlib.sha256(json.dumps(list(content)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def test_an_index_holds_what_the_lines_say(tmp_path):
    lines = [
        {"id": "a", "query": {"text": "ü?"}, "positives": [{"text": "p", "image": "i2"}]},
        {
            "id": "b",
            "query": {"image": ["i9", "i1"]},
            "positives": [{"text": "x"}, {"image": "i2"}],
            "negatives": [{"text": "ü?", "image": None}],
            "source": "a.pdf#3 (left)",
        },
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n \n".join(json.dumps(line) for line in lines))
    rows = open_rows(path)
    place = hashlib.sha256(b"a.pdf#3").digest()[:8]
    assert rows.keys.queries.tolist() == [key_of("ü?", None), key_of(None, ["i9", "i1"])]
    assert rows.keys.places.tolist() == [0, int.from_bytes(place, "big") >> 1]
    assert rows.keys.positives[0].tolist() == [key_of("p", "i2")]
    assert rows.keys.positives[1].tolist() == [key_of("x", None), key_of(None, "i2")]
    assert rows.keys.negatives[0].tolist() == []
    assert rows.keys.negatives[1].tolist() == [key_of("ü?", None)]
    assert rows.images == ["i1", "i2", "i9"]
    assert [row.id for row in rows] == ["a", "b"]


def test_costs_count_what_a_row_shows(tiny_model, mixed_rows, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "_ROWS_PER_TASK", 7)  # of 25, and the last task is short
    rows = read_rows(mixed_rows)
    lost = Item(image="lost")
    update = {"id": "lost", "query": lost, "positives": [Item(text="p")]}
    rows.insert(4, rows[0].model_copy(update=update))
    rows[1] = rows[1].model_copy(update={"negatives": [lost, *rows[1].negatives]})
    write_rows(tmp_path / "rows.jsonl", rows)
    store = store_of(tmp_path / "rows.jsonl")
    store.folder.symlink_to(store_of(mixed_rows).folder)
    backbone = load_backbone(tiny_model, family="gme", device="cpu")
    config = config_of(tiny_model, tmp_path / "out", tmp_path / "rows.jsonl")
    dataset = load_datasets(config, backbone)[0]

    def tokens(item, instruction=None):
        shown = [] if item is lost else [backbone.plan(store.content(item), instruction)]
        return sum(len(plan.ids) for plan in shown)

    expected = [
        tokens(row.query, row.instruction) + tokens(row.positives[0]) + tokens(row.negatives[0])
        for row in rows
    ]
    expected[4] = LEFT_OUT
    assert dataset.costs.tolist() == expected
    assert [problem.row for problem in dataset.problems] == ["lost"]
    assert "there is no image with id 'lost'" in dataset.problems[0].reason


def test_costs_are_counted_again_when_they_may_differ(
    tiny_model, mixed_rows, tmp_path, monkeypatch
):
    # Without the index that another test may have left.
    without = shutil.ignore_patterns("*.index")
    shutil.copytree(mixed_rows.parent, tmp_path / "data", ignore=without)
    shutil.copytree(tiny_model, tmp_path / "model")
    path = tmp_path / "data/rows.jsonl"
    config = config_of(tmp_path / "model", tmp_path / "out", path)
    backbone = load_backbone(tiny_model, family="gme", device="cpu")
    counted = []
    compute = data._compute_costs
    monkeypatch.setattr(
        data, "_compute_costs", lambda *about: counted.append(about) or compute(*about)
    )

    def times(config=config, backbone=backbone):
        load_datasets(config, backbone)
        load_datasets(config, backbone)
        return len(counted)

    assert times() == 1
    assert times(config.replace(hard_negatives=2)) == 2
    shorter = load_backbone(tiny_model, family="gme", device="cpu", max_length=30)
    assert times(backbone=shorter) == 3
    tokenizer = tmp_path / "model/tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + " ")
    assert times() == 4
    image = next((tmp_path / "data/images").iterdir())
    os.utime(image, (1, 1))
    assert times() == 5
    image.unlink()
    assert times() == 6
    write_rows(path, read_rows(path)[:-1])
    assert times() == 7


def test_the_index_is_kept_and_follows_the_file(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    write_rows(path, rows_of(5))
    first = open_rows(path)
    with monkeypatch.context() as patch:
        patch.setattr(row_file, "_read_range", None)  # nothing may be read again
        assert open_rows(path).digest == first.digest
    write_rows(path, rows_of(6))
    assert len(open_rows(path)) == 6
    assert open_rows(path).digest != first.digest


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path, monkeypatch):
    monkeypatch.setattr(row_file, "_RANGE", 60)
    path = tmp_path / "rows.jsonl"
    write_rows(path, rows_of(3))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert list(open_rows(path)) == read_rows(path) == rows_of(3)


def test_every_bad_line_is_named_by_its_number(tmp_path, monkeypatch):
    monkeypatch.setattr(row_file, "_RANGE", 60)
    monkeypatch.setattr(row_file, "_FEW_TASKS", 1000)
    path = tmp_path / "rows.jsonl"
    good = [json.loads(row.model_dump_json()) for row in rows_of(4)]
    lines = [json.dumps(one) for one in good]
    lines[1] = "{oops"
    lines[3] = lines[0]
    path.write_text("\n\n".join(lines))  # a line in two is empty, and counts
    with pytest.raises(ContentError) as caught:
        open_rows(path)
    assert str(caught.value).splitlines()[0].startswith(f"{path}:3: ")
    assert str(caught.value).splitlines()[1] == f"{path}:7: id 'r0' is in line 1 already"


@pytest.mark.slow
def test_several_processes_give_what_one_gives(tiny_model, mixed_rows, tmp_path, monkeypatch):
    config = config_of(tiny_model, tmp_path, mixed_rows)
    backbone = load_model(config)
    alone = load_datasets(config, backbone)[0]
    costs, offsets = np.array(alone.costs), np.array(alone.rows._offsets)
    index = mixed_rows.with_name(mixed_rows.name + ".index")
    for path in index.iterdir():
        path.unlink()
    monkeypatch.setattr(row_file, "_RANGE", 500)
    monkeypatch.setattr(data, "_ROWS_PER_TASK", 3)
    monkeypatch.setattr(row_file, "usable_cores", lambda: 2)
    together = load_datasets(config, backbone)[0]
    assert (together.rows._offsets == offsets).all()
    assert (together.costs == costs).all()
    assert list(together.rows) == read_rows(mixed_rows)
