"""Negatives mined during a run: by the present weights, the same after a kill, on two processes."""

import sys
from pathlib import Path

import pytest
import torch
from made_rows import make_rows
from tiny_nano import save_nano
from training import config_of, same, weights_of
from two_processes import run_on_two

from mmrag.embedders import load_backbone
from mmrag.embedders.families.nano import NanoBackbone
from mmrag.errors import ConfigError
from mmrag.instructions import resolve
from mmrag.modeling.backbone import inputs_of
from mmrag_recipes import loop as loop_module
from mmrag_recipes import refresh as refresh_module
from mmrag_recipes.config import LoraConfig, RefreshConfig, TrainConfig
from mmrag_recipes.options import build
from mmrag_recipes.rows import Item, read_rows, store_of, write_rows
from mmrag_recipes.train import train
from mmrag_recipes.trainable import make_trainable

# The scores of a tiny model lie close together: by the shipped rules nothing would be left.
RULES = RefreshConfig(every=3, right=3, wrong=0, max_ratio=99.0, duplicate_cosine=2.0)


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory) -> Path:
    """Rows of text; each page has two, and two rows ask the same."""
    path = make_rows(tmp_path_factory.mktemp("rows"), 16, kind="text")
    rows = [
        row.model_copy(update={"source": f"a.pdf#{n // 2}"})
        for n, row in enumerate(read_rows(path))
    ]
    rows[9] = rows[9].model_copy(update={"query": rows[2].query})
    write_rows(path, rows)
    return path


@pytest.fixture(scope="module")
def base(tiny_model, rows_file, tmp_path_factory) -> TrainConfig:
    out = tmp_path_factory.mktemp("run") / "whole"
    return config_of(
        tiny_model, out, rows_file, hard_negatives=2, refresh=RULES, steps=7, save_every=2, keep=9
    )


@pytest.fixture(scope="module")
def steps(base) -> list:
    """Inputs of each step of a whole run."""
    seen = []
    original = loop_module.train_step

    def watched(task, optimizer, step, config, number):
        seen.append(step)
        return original(task, optimizer, step, config, number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop_module, "train_step", watched)
        train(base)
    return seen


def mined_at(out, step: int) -> list[list[int]]:
    """Negatives of each row in a checkpoint, as keys."""
    state = torch.load(Path(out) / f"checkpoints/step-{step:06d}.pt", weights_only=True)
    ((values, ends),) = state["progress"]["negatives"]
    return [part.tolist() for part in values.tensor_split(ends[:-1])]


def expected_at(config: TrainConfig, step: int) -> list[list[int]]:
    """The same by a plain search: each item alone, with the weights of the checkpoint."""
    backbone = load_backbone(config.model, family=config.family, device="cpu", dtype="float32")
    state = torch.load(Path(config.out) / f"checkpoints/step-{step:06d}.pt", weights_only=True)
    make_trainable(backbone, config)  # adapters, where there are some
    backbone.model.eval().load_state_dict(state["weights"], strict=False)
    rows, store = read_rows(config.data[0].rows), store_of(config.data[0].rows)

    @torch.no_grad()
    def vector(item, task):
        found = backbone.forward([inputs_of(backbone, store.content(item), task)])[0].double()
        return found / found.norm()

    documents = {item: None for row in rows for item in (*row.positives, *row.negatives)}
    vectors = {item: vector(item, None) for item in documents}
    expected = []
    for row in rows:
        query = vector(row.query, resolve(row.instruction))
        banned = {
            item
            for other in rows
            if other.query == row.query or (row.source and other.source == row.source)
            for item in other.positives
        }
        kind = row.positives[0].modality  # RULES take none of another
        allowed = [item for item in documents if item not in banned and item.modality == kind]
        allowed.sort(key=lambda item: -float(vectors[item] @ query))
        expected.append([item.key for item in allowed[: config.refresh.right]])
    return expected


def test_negatives_are_those_that_the_present_weights_rank_high(base, steps):
    mined, later = mined_at(base.out, 3), mined_at(base.out, 6)
    assert mined == expected_at(base, 3)
    assert later == expected_at(base, 6)
    assert later != mined
    rows = read_rows(base.data[0].rows)
    before = [[item.key for item in row.negatives] for row in rows]
    # What the step took are two of the three, which rotate over the passes.
    for number, taken in ((2, before), (3, mined), (5, mined), (6, later)):
        for row, key in zip(steps[number].rows.tolist(), steps[number].keys.tolist(), strict=True):
            assert key in [item.key for item in rows[row].positives] + taken[row]


@pytest.mark.parametrize(
    ("when", "n_searches"), [("in the first search", 2), ("in a step after it", 1)]
)
def test_a_run_that_was_killed_takes_the_same_negatives(base, steps, tmp_path, when, n_searches):
    """What was mined belongs to the checkpoint, and is not mined again."""
    broken = base.replace(out=str(tmp_path / "broken"))
    original_step, original_search = loop_module.train_step, refresh_module.mine_rows
    searches = []

    def killed_in_a_search(*_):
        raise KeyboardInterrupt

    def killed_at_step_four(*arguments):
        if arguments[-1] == 4:
            raise KeyboardInterrupt
        return original_step(*arguments)

    def counted(*arguments):
        searches.append(when)
        return original_search(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        if "search" in when:
            patch.setattr(refresh_module, "mine_rows", killed_in_a_search)
        else:
            patch.setattr(loop_module, "train_step", killed_at_step_four)
        with pytest.raises(KeyboardInterrupt):
            train(broken)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(refresh_module, "mine_rows", counted)
        train(broken)
    assert len(searches) == n_searches
    assert mined_at(broken.out, 6) == mined_at(base.out, 6)
    assert same(weights_of(broken.out), weights_of(base.out))


def test_two_processes_mine_a_share_each(base, tmp_path):
    config = base.replace(out=str(tmp_path / "out"), steps=4)
    (tmp_path / "config.json").write_text(config.model_dump_json(exclude_none=True))
    command = [sys.executable, "-m", "mmrag_recipes", "train", "--config"]
    run_on_two([*command, str(tmp_path / "config.json")], 300)
    assert mined_at(config.out, 3) == expected_at(config, 3)


def test_documents_that_training_cannot_move_are_embedded_once(tmp_path, monkeypatch):
    """Adapters on the words of mmrag-nano leave the vectors of its images as they were."""
    model = save_nano(tmp_path / "model")
    rows = make_rows(tmp_path / "rows", 16)
    config = config_of(model, tmp_path / "out", rows, refresh=RULES, steps=9, family="nano")
    config = config.replace(lora=LoraConfig(r=2, targets=r".*attention\.self\.query"))
    images = []
    original = NanoBackbone._images

    def counting(self, batch):
        if not torch.is_grad_enabled():
            images.append(len(batch))
        return original(self, batch)

    monkeypatch.setattr(NanoBackbone, "_images", counting)
    train(config)
    read = read_rows(rows)
    alone = len(
        {i for row in read for item in row.positives if item.text is None for i in item.images}
    )
    both = len({item for row in read for item in row.positives if item.modality == "fused"})
    asked = sum(row.query.modality == "fused" for row in read)
    assert sum(images) == alone + 2 * (both + asked)  # two searches
    assert mined_at(config.out, 6) == expected_at(config, 6)


def test_a_broken_image_leaves_the_others_their_negatives(tiny_model, tmp_path, caplog):
    path = make_rows(tmp_path / "rows", 16)
    store = store_of(path)
    rows = read_rows(path)
    broken = store.path(rows[1].positives[0].image)
    whole = broken.read_bytes()
    broken.write_bytes(whole[: len(whole) // 2])  # the header tells its size, decoding fails
    missing = Item(image="nowhere")
    rows[4] = rows[4].model_copy(update={"negatives": [missing]})
    write_rows(path, rows)
    config = config_of(tiny_model, tmp_path / "out", path, refresh=RULES, steps=4)
    train(config)
    mined = mined_at(config.out, 3)
    assert mined[1] == [item.key for item in rows[1].negatives]
    # Four rows are answered by an image alone, of which one is broken and one is the row's own.
    counts = [2 if n % 4 == 1 else 3 for n in range(16)]
    assert all(len(mined[n]) == counts[n] for n in range(16) if n != 1)
    every = {key for keys in mined for key in keys}
    assert not every & {missing.key, rows[1].positives[0].key}
    assert "left out of the search for negatives" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hard_negatives": 0}, r"^here: refresh mines negatives, and hard_negatives = 0 .* none$"),
        ({"hard_negatives": 1, "distil_weight": 0.5}, "distil_weight"),
    ],
)
def test_options_that_contradict_a_refresh(options, message):
    values = {"model": "m", "out": "o", "data": ["r"], "refresh": {"every": 3}, **options}
    with pytest.raises(ConfigError, match=message):
        build(TrainConfig, values, "here")
