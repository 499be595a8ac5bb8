"""Rows by offset: the same rows as in memory, in one process or in several."""

import json

import numpy as np
import pytest
from training import config_of

from mmrag.errors import ContentError
from mmrag_recipes import data, row_file
from mmrag_recipes.data import load_datasets
from mmrag_recipes.row_file import Keys, open_rows
from mmrag_recipes.rows import Item, Row, read_rows, write_rows
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


def test_every_bad_line_is_named_by_its_number(tmp_path, monkeypatch):
    monkeypatch.setattr(row_file, "_RANGE", 60)
    monkeypatch.setattr(row_file, "_FEW_TASKS", 1000)
    path = tmp_path / "rows.jsonl"
    good = [json.loads(row.model_dump_json()) for row in rows_of(4)]
    lines = [json.dumps(one) for one in good]
    lines[1] = "{oops"
    lines[3] = lines[0]
    path.write_text("\n".join(lines))
    with pytest.raises(ContentError) as caught:
        open_rows(path)
    assert f"{path}:2: " in str(caught.value)
    assert f"{path}:4: id 'r0' is in line 1 already" in str(caught.value)


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
