"""A run that goes wrong says so, and nothing good is lost."""

import json
import resource
import shutil

import numpy as np
import pytest
import torch
from made_rows import make_rows
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import save_qwen2_vl
from training import config_of, log_of, same, weights_of

from mmrag.errors import ConfigError, ContentError, ModelError
from mmrag_recipes import loop as loop_module
from mmrag_recipes import train as train_module
from mmrag_recipes.config import LoraConfig
from mmrag_recipes.export import load_trained
from mmrag_recipes.rows import ImageStore, Item, Row, write_rows
from mmrag_recipes.train import train


def failing_at(monkeypatch, step, times=1):
    """Let the loss be NaN from a step on."""
    original = train_module.step_loss
    seen = []

    def loss(vectors, inputs, config, old):
        seen.append(1)
        value = original(vectors, inputs, config, old)
        return value * float("nan") if step < len(seen) <= step + times else value

    monkeypatch.setattr(train_module, "step_loss", loss)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(
    tiny_model, text_rows, tmp_path, monkeypatch
):
    config = config_of(tiny_model, tmp_path, text_rows)
    with monkeypatch.context() as patch:
        failing_at(patch, step=4)
        with pytest.raises(ModelError, match=r"step 5: the loss is nan"):
            train(config)
    assert not (tmp_path / "final").exists()
    kept = torch.load(tmp_path / "checkpoints" / "step-000003.pt", weights_only=True)
    assert all(bool(value.isfinite().all()) for value in kept["weights"].values())
    train(config)  # the fault was of the moment: the run goes on from there
    assert [record["step"] for record in log_of(tmp_path)] == list(range(6))


def test_steps_without_an_update_may_be_let_pass(tiny_model, text_rows, tmp_path, monkeypatch):
    config = config_of(tiny_model, tmp_path, text_rows, max_skipped_steps=2)
    failing_at(monkeypatch, step=2, times=2)
    train(config)
    assert sum(not np.isfinite(record["loss"]) for record in log_of(tmp_path)) == 2
    assert all(bool(value.isfinite().all()) for value in weights_of(tmp_path).values())


def scripted(monkeypatch, values):
    """Let evaluations have these values, and keep the weights that each one saw."""
    seen = []

    def evaluate(backbone, config):
        state = loop_module.trained_state(backbone.model)
        seen.append({name: value.clone() for name, value in state.items()})
        value = values[len(seen) - 1]
        return {"all": {"ndcg@10": value, "mrr@10": value}}

    monkeypatch.setattr(train_module, "evaluate_now", evaluate)
    return seen


def test_the_final_weights_are_those_of_the_best_evaluation(
    tiny_model, text_rows, tmp_path, monkeypatch
):
    seen = scripted(monkeypatch, [0.2, 0.5, 0.4, 0.3, 0.1])
    options = {"evaluate": str(text_rows), "evaluate_every": 1, "save_every": 1, "patience": 2}
    train(config_of(tiny_model, tmp_path, text_rows, steps=9, **options))
    assert len(seen) == 4  # two without improvement
    assert same(weights_of(tmp_path), seen[1])
    assert not same(weights_of(tmp_path), seen[3])
    assert json.loads((tmp_path / "final" / "run.json").read_text())["best_step"] == 2
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["best.pt", "step-000003.pt", "step-000004.pt"]


def test_an_unknown_metric_is_named_with_those_there_are(tiny_model, text_rows, tmp_path):
    options = {"evaluate": str(text_rows), "evaluate_every": 1, "best_metric": "all/ndcg"}
    with pytest.raises(ConfigError, match=r"best_metric='all/ndcg' is unknown.*all/ndcg@10"):
        train(config_of(tiny_model, tmp_path, text_rows, **options))


def test_weights_that_diverged_are_not_exported(tiny_model, text_rows, tmp_path):
    train(config_of(tiny_model, tmp_path, text_rows, steps=1))
    path = tmp_path / "final" / "trained.safetensors"
    weights = load_file(path)
    name = sorted(weights)[0]
    weights[name][0] = float("nan")
    save_file(weights, path)
    with pytest.raises(ModelError, match="1 trained weights are not finite"):
        load_trained(tmp_path)


def test_a_log_line_cut_short_does_not_stop_resuming(tiny_model, text_rows, tmp_path, caplog):
    config = config_of(tiny_model, tmp_path, text_rows)
    train(config)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 7, "loss": 0.')
    train(config.replace(steps=8))
    assert [record["step"] for record in log_of(tmp_path)] == list(range(8))
    assert "cut short" in caplog.text


def pictured_rows(folder, count=8):
    """Rows whose positive is an image, each with one image as a negative."""
    store = ImageStore(folder / "images")
    chance = np.random.default_rng(0)

    def image():
        noise = chance.integers(0, 255, (112, 112, 3), np.uint8)
        return Item(image=store.add(Image.fromarray(noise)))

    rows = [
        Row(id=f"r{n}", query=Item(text=f"q{n}"), positives=[image()], negatives=[image()])
        for n in range(count)
    ]
    write_rows(folder / "rows.jsonl", rows)
    return folder / "rows.jsonl", rows, store


def cut(path, keep):
    path.write_bytes(path.read_bytes()[:keep])


def test_missing_and_broken_images_are_found_before_the_first_step(tiny_model, tmp_path):
    path, rows, store = pictured_rows(tmp_path)
    store.path(rows[1].positives[0].image).unlink()
    cut(store.path(rows[2].positives[0].image), 10)
    train(config_of(tiny_model, tmp_path / "out", path, steps=8, batch_size=2))
    left_out = [
        json.loads(line) for line in (tmp_path / "out/left_out.jsonl").read_text().splitlines()
    ]
    assert {one["row"] for one in left_out} == {"r1", "r2"}
    assert all(one["rows"] == str(path) for one in left_out)
    assert rows[1].positives[0].image in left_out[0]["reason"]
    used = {index for record in log_of(tmp_path / "out") for index in record["rows"]}
    assert used == {0, 3, 4, 5, 6, 7}


def test_an_image_that_only_decoding_shows_broken_costs_its_row_one_step(
    tiny_model, tmp_path, caplog
):
    path, rows, store = pictured_rows(tmp_path)
    broken, negative = rows[1].positives[0].image, rows[2].negatives[0].image
    for name in (broken, negative):
        cut(store.path(name), store.path(name).stat().st_size // 2)
    config = config_of(tiny_model, tmp_path / "out", path, steps=4, batch_size=4)
    train(config)
    lines = (tmp_path / "out" / "log.jsonl").read_text().splitlines()
    skipped = [record for record in map(json.loads, lines) if "skipped" in record]
    assert {record["skipped"] for record in skipped} == {"r1", "r2"}
    assert all(broken in r["reason"] or negative in r["reason"] for r in skipped)
    assert all(r["reason"].startswith("negative") == (r["skipped"] == "r2") for r in skipped)
    assert "row r1 is left out" in caplog.text
    assert len(log_of(tmp_path / "out")) == 4


def test_a_step_of_which_nothing_can_be_decoded_is_no_end(tiny_model, tmp_path):
    path, rows, store = pictured_rows(tmp_path, count=2)
    for row in rows:
        file = store.path(row.positives[0].image)
        cut(file, file.stat().st_size // 2)
    train(config_of(tiny_model, tmp_path / "out", path, steps=2, batch_size=2))
    assert [record["loss"] for record in log_of(tmp_path / "out")] == [0.0, 0.0]


def test_data_of_which_no_row_can_be_used_is_an_error(tiny_model, tmp_path):
    path, *_ = pictured_rows(tmp_path)
    shutil.rmtree(tmp_path / "images")
    with pytest.raises(ContentError, match="no row can be used"):
        train(config_of(tiny_model, tmp_path / "out", path))


FREE = {
    "chunk": 3,
    "gradient_checkpointing": True,
    "steps": 7,
    "save_every": 2,
    "keep": 1,
    "log_every": 1,
    "evaluate_every": 2,
    "report": (),
}
FIXED = {
    "batch_size": 2,
    "hard_negatives": 0,
    "temperature": 0.5,
    "seed": 3,
    "lr": 0.5,
    "schedule": "cosine",
    "freeze": ("visual",),
    "lora": LoraConfig(r=2),
}


@pytest.fixture(scope="module")
def half(tiny_model, text_rows, tmp_path_factory):
    """A run that was stopped after three steps of six."""
    out = tmp_path_factory.mktemp("half")
    with pytest.MonkeyPatch.context() as patch:
        failing_at(patch, step=4)
        with pytest.raises(ModelError):
            train(config_of(tiny_model, out, text_rows))
    return out


@pytest.mark.parametrize("key", FREE)
def test_what_does_not_move_the_result_may_change_on_resuming(
    half, tiny_model, text_rows, tmp_path, key
):
    shutil.copytree(half, tmp_path / "out")
    config = config_of(tiny_model, tmp_path / "out", text_rows, **{key: FREE[key]})
    train(config)
    assert [record["step"] for record in log_of(tmp_path / "out")] == list(range(config.steps))


@pytest.mark.parametrize("key", FIXED)
def test_what_moves_the_result_may_not_and_is_named(half, tiny_model, text_rows, key):
    # Adapters are other weights altogether, and a frozen tower has no optimizer state.
    with pytest.raises(ConfigError, match=f"holds a run with {key}="):
        train(config_of(tiny_model, half, text_rows, **{key: FIXED[key]}))


def test_base_weights_and_images_are_part_of_a_run(tmp_path):
    path, rows, store = pictured_rows(tmp_path)
    model = save_qwen2_vl(tmp_path / "model", seed=3)
    config = config_of(model, tmp_path / "out", path, steps=2)
    train(config)
    weights = load_file(model / "model.safetensors")
    save_file(
        {name: value * 1.01 for name, value in weights.items()},
        model / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(ConfigError, match=r"other weights of the model it started from"):
        train(config)
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    train(config)
    Image.new("RGB", (112, 112), "red").save(store.path(rows[0].positives[0].image), "PNG")
    with pytest.raises(ConfigError, match=r"other rows or images \(data\[0\]\.rows\)"):
        train(config)


def test_a_finished_run_is_not_trained_again(tiny_model, text_rows, tmp_path, monkeypatch):
    config = config_of(tiny_model, tmp_path, text_rows, steps=2)
    train(config)
    before = (tmp_path / "final" / "trained.safetensors").stat().st_mtime_ns

    def never(*given):
        raise AssertionError("a step was run")

    with monkeypatch.context() as patch:
        patch.setattr(loop_module, "train_step", never)
        train(config)
    assert (tmp_path / "final" / "trained.safetensors").stat().st_mtime_ns == before
    train(config.replace(steps=3))
    assert [record["step"] for record in log_of(tmp_path)] == [0, 1, 2]


def test_a_damaged_end_of_a_run_is_made_again(tiny_model, text_rows, tmp_path, caplog):
    config = config_of(tiny_model, tmp_path, text_rows, steps=2)
    train(config)
    end = tmp_path / "final" / "run.json"
    whole = end.read_text()
    end.write_text(whole[:40])
    train(config)
    assert "run.json is damaged: the end of the run is made again" in caplog.text
    assert end.read_text() == whole
    assert [record["step"] for record in log_of(tmp_path)] == [0, 1]


def test_other_rows_are_refused(tiny_model, tmp_path):
    """Mining again and training into the same folder must not give the old weights back."""
    rows = make_rows(tmp_path / "data", 8, kind="text")
    config = config_of(tiny_model, tmp_path / "out", rows, steps=3)
    train(config)
    make_rows(tmp_path / "data", 9, kind="text")
    with pytest.raises(ConfigError, match="other rows"):
        train(config)


def test_a_checkpoint_without_room_leaves_those_of_before(tiny_model, text_rows, tmp_path):
    config = config_of(tiny_model, tmp_path, text_rows, steps=3, save_every=1)
    train(config.replace(steps=1))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        with pytest.raises(ModelError, match=r"step-000002\.pt cannot be written .* bytes"):
            train(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [one.name for one in (tmp_path / "checkpoints").iterdir()] == ["step-000001.pt"]
    train(config)
    assert [record["step"] for record in log_of(tmp_path)] == [0, 1, 2]


@pytest.mark.parametrize("cut", [0, 1000])
def test_a_damaged_checkpoint_is_named(tiny_model, text_rows, tmp_path, cut):
    config = config_of(tiny_model, tmp_path, text_rows, steps=4, save_every=1)
    train(config)
    whole = weights_of(tmp_path)
    shutil.rmtree(tmp_path / "final")
    last = tmp_path / "checkpoints" / "step-000004.pt"
    last.write_bytes(last.read_bytes()[:cut])
    with pytest.raises(ModelError, match=r"step-000004\.pt is damaged.*Delete it"):
        train(config)
    last.unlink()
    train(config)
    assert same(weights_of(tmp_path), whole)


def test_a_run_that_could_learn_nothing_is_refused(tiny_model, tmp_path):
    """Without a negative the loss is zero whatever the weights are."""
    bare = make_rows(tmp_path / "bare", 4, negatives=0, kind="text")
    alone = make_rows(tmp_path / "one", 1, kind="text")
    mined = make_rows(tmp_path / "mined", 1, negatives=1, kind="text")
    config = config_of(tiny_model, tmp_path / "out", bare, steps=1, hard_negatives=0)
    separate = (config.data[0].replace(in_batch_negatives=False),)
    for changes in (
        {"batch_size": 1},
        {"data": separate},
        {"data": separate, "hard_negatives": 1},  # of which the rows have none
        {"data": (config.data[0].replace(rows=str(alone)),)},
    ):
        with pytest.raises(ConfigError, match="nothing could be learned"):
            train(config.replace(**changes))
    own = config_of(tiny_model, tmp_path / "out", mined, steps=1, hard_negatives=1, batch_size=1)
    train(own)
    assert log_of(tmp_path / "out")[0]["loss"] > 0


def test_what_an_evaluation_lacks_is_told_before_the_first_step(tiny_model, text_rows, tmp_path):
    gone = tmp_path / "dev.jsonl"
    write_rows(gone, [Row(id="a", query=Item(text="q"), positives=[Item(image="gone")])])
    for options, error, words in (
        ({"evaluate": str(gone)}, ContentError, "no image with id 'gone'"),
        ({"evaluate": str(text_rows), "best_metric": "all/mrr"}, ConfigError, "all/mrr@10"),
        ({"evaluate": str(text_rows), "best_metric": "text->image/mrr@10"}, ConfigError, "unknown"),
    ):
        with pytest.raises(error, match=words):
            train(config_of(tiny_model, tmp_path / "out", text_rows, **options))
    assert not (tmp_path / "out").exists()


def test_the_best_evaluation_of_a_resumed_run_is_of_one_kind(
    tiny_model, text_rows, tmp_path, monkeypatch
):
    """0.9 by one metric is not better than 0.2 by another."""
    seen = scripted(monkeypatch, [0.9, 0.8, 0.2, 0.1])
    options = {"evaluate": str(text_rows), "evaluate_every": 1, "save_every": 1}
    config = config_of(tiny_model, tmp_path, text_rows, steps=2, **options)
    train(config)
    assert same(weights_of(tmp_path), seen[0])
    train(config.replace(steps=3, best_metric="all/mrr@10"))
    assert same(weights_of(tmp_path), seen[2])
    train(config.replace(steps=4, best_metric="all/mrr@10"))
    assert same(weights_of(tmp_path), seen[2])


def test_without_an_evaluation_that_counts_the_last_weights_are_the_final_ones(
    tiny_model, text_rows, tmp_path, monkeypatch
):
    scripted(monkeypatch, [0.9])
    options = {"evaluate": str(text_rows), "evaluate_every": 1, "save_every": 1}
    config = config_of(tiny_model, tmp_path, text_rows, steps=1, **options)
    train(config)
    changed = config.replace(steps=2, best_metric="all/mrr@10", evaluate_every=5)
    train(changed)
    last = torch.load(tmp_path / "checkpoints" / "step-000002.pt", weights_only=True)
    assert same(weights_of(tmp_path), last["weights"])
