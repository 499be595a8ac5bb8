"""T3 to T10: scale over processes, one reduction, resume, clean batches, faults."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from made_rows import make_rows
from one_step import one_step, prepare_step
from tiny_nano import save_nano
from training import config_of, killed_at, log_of
from two_processes import run_on_two

from mmrag.embedders import load_backbone
from mmrag.errors import ConfigError, ContentError
from mmrag_recipes.__main__ import main
from mmrag_recipes.batches import Batch, Source, one_pass, plan, shard
from mmrag_recipes.config import LoraConfig, TrainConfig
from mmrag_recipes.config_reranker import TrainRerankerConfig
from mmrag_recipes.data import documents_of, load_datasets
from mmrag_recipes.options import SHIPPED, build, find_config, read_file
from mmrag_recipes.row_file import Keys
from mmrag_recipes.rows import Item, Row, read_rows, write_rows
from mmrag_recipes.steps import Feeder
from mmrag_recipes.train import train
from mmrag_recipes.trainable import learning_rate, make_trainable


def test_training_lowers_the_loss_and_writes_what_a_person_needs(tiny_model, text_rows, tmp_path):
    config = config_of(tiny_model, tmp_path, text_rows, steps=25, evaluate=str(text_rows))
    config = config.replace(evaluate_every=25, matryoshka_dims=(8,))
    final = train(config)
    losses = [record["loss"] for record in log_of(tmp_path)]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert (final / "trained.safetensors").is_file()
    assert (tmp_path / "training.png").stat().st_size > 5000
    last = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert 0 <= last["metrics"]["text->text/ndcg@10"] <= 1


@pytest.mark.parametrize("lora", [None, LoraConfig(r=2, dropout=0.2)])
def test_resuming_gives_the_run_that_was_never_stopped(
    tiny_model, mixed_rows, text_rows, tmp_path, lora
):
    """T7: same rows, same losses; the skipped steps prepare nothing."""
    whole = config_of(tiny_model, tmp_path / "whole", mixed_rows, text_rows, lora=lora)
    train(whole)
    expected = log_of(whole.out)
    broken = whole.replace(out=str(tmp_path / "broken"))
    prepared = []
    original = Feeder._collect

    def counting(self, batch, waiting):
        prepared.append(batch)
        return original(self, batch, waiting)

    with killed_at(4):
        train(broken)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Feeder, "_collect", counting)
        train(broken)
    assert len(prepared) == 3  # steps 3, 4, 5: nothing before the checkpoint was decoded
    actual = log_of(broken.out)
    assert [r["rows"] for r in actual] == [r["rows"] for r in expected]
    assert [r["loss"] for r in actual] == pytest.approx([r["loss"] for r in expected], rel=1e-5)


def test_a_run_with_another_configuration_is_not_taken_up(tiny_model, text_rows, tmp_path):
    config = config_of(tiny_model, tmp_path, text_rows, steps=3)
    train(config)
    with pytest.raises(ConfigError, match=r"temperature=0\.03, now 0\.5"):
        train(config.replace(temperature=0.5))


def _unequal_rows(folder: Path) -> Path:
    """Rows of which only some have a teacher's scores, and one has negatives too few to teach."""
    counts = [3, 0, 2, 1]
    rows = [
        Row(
            id=str(n),
            query=Item(text=f"query {n}"),
            positives=[Item(text=f"answer {n}")],
            negatives=[Item(text=f"no {n} {k}") for k in range(counts[n])],
            positive_scores=[0.8],
            negative_scores=[0.1 * k for k in range(counts[n])],
        )
        for n in range(4)
    ]
    write_rows(folder / "rows.jsonl", rows)
    return folder / "rows.jsonl"


@pytest.fixture(scope="module")
def on_two_processes(tiny_model, mixed_rows, text_rows, tmp_path_factory) -> tuple[dict, dict]:
    """Configurations by name, and what one step of each gave rank 0 of two gloo processes."""
    folder = tmp_path_factory.mktemp("ranks")
    images = make_rows(tmp_path_factory.mktemp("pictures"), 4, negatives=0)
    base = config_of(tiny_model, folder / "out", mixed_rows, batch_size=8)
    configs = {
        "whole": base,
        "cached": base.replace(chunk=3),
        # Of four rows, the first and third go to rank 0: only rank 1 has the row of its query's
        # image, and with two rows rank 0 has text alone.
        "text on rank 0": config_of(
            tiny_model, folder / "out", images, batch_size=2, hard_negatives=0
        ),
        "text alone": config_of(tiny_model, folder / "out", text_rows, batch_size=4),
        "teacher": config_of(
            tiny_model, folder / "out", _unequal_rows(folder), hard_negatives=3, distil_weight=0.7
        ),
    }
    for name, config in configs.items():
        (folder / f"{name}.json").write_text(config.model_dump_json(exclude_none=True))
    worker = Path(__file__).parent / "one_step.py"
    run_on_two([sys.executable, str(worker), str(folder)], 600)
    return configs, torch.load(folder / "results.pt", weights_only=True)


@pytest.mark.parametrize("name", ["whole", "cached", "teacher"])
def test_two_processes_give_the_gradient_of_one(on_two_processes, name):
    """T3: the ratio is 1.0 for every weight."""
    configs, results = on_two_processes
    one, two = one_step(configs[name]), results[name]
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
    for weight, gradient in one["gradients"].items():
        scale = gradient.abs().max().clamp(min=1e-6)
        assert (two["gradients"][weight] - gradient).abs().max() / scale < 2e-3, weight


def test_gradients_are_reduced_once_per_step(on_two_processes):
    """T4: however many chunks there are."""
    _, results = on_two_processes
    assert results["whole"]["reductions"] == results["cached"]["reductions"] == 1


def test_a_process_without_images_does_not_hang_the_others(on_two_processes):
    """T6: rank 0 had no image and took part for the vision tower all the same."""
    _, results = on_two_processes
    tower = [g for n, g in results["text on rank 0"]["gradients"].items() if n.startswith("visual")]
    assert max(float(gradient.abs().max()) for gradient in tower) > 0


def test_batches_have_one_data_set_and_no_row_answers_another(mixed_rows, text_rows):
    """T10."""
    shared = Item(text="the same document")
    rows = [
        Row(id=str(n), query=Item(text=f"q{n}"), positives=[shared if n % 3 else Item(text=str(n))])
        for n in range(30)
    ]
    rows[4] = rows[4].model_copy(update={"negatives": [Item(text="9")]})
    sources = [Source(Keys.of(rows), [10] * 30), Source(Keys.of(read_rows(text_rows)), [20] * 16)]
    rows_of = [rows, read_rows(text_rows)]
    stream = plan(sources, 4, seed=1)
    for _ in range(60):
        batch = next(stream)
        chosen = [rows_of[batch.dataset][i] for i in batch.rows]
        positives = [item.key for row in chosen for item in row.positives]
        assert len(positives) == len(set(positives))
        assert not {item.key for row in chosen for item in row.negatives} & set(positives)


def test_a_pass_uses_each_row_once_and_puts_like_costs_together():
    rows = [
        Row(id=str(n), query=Item(text=f"q{n}"), positives=[Item(text=f"p{n}")]) for n in range(64)
    ]
    costs = [30 if n % 2 else 3000 for n in range(64)]
    batches = list(one_pass(Source(Keys.of(rows), costs), 8, np.random.default_rng(0)))
    used = [index for batch in batches for index in batch]
    assert sorted(used) == list(range(64))
    assert all(len({costs[i] for i in batch}) == 1 for batch in batches)


def test_the_costliest_rows_get_their_turn_too():
    """What is left over from full batches must not be the same rows in every pass."""
    rows = [
        Row(id=str(n), query=Item(text=f"q{n}"), positives=[Item(text=f"p{n}")]) for n in range(11)
    ]
    stream = plan([Source(Keys.of(rows), [10] * 8 + [900] * 3)], 4, seed=0)
    used = {index for _ in range(60) for index in next(stream).rows}
    assert used == set(range(11))


def test_rows_that_share_classes_fill_a_batch_without_in_batch_negatives():
    classes = [Item(text="cat"), Item(text="dog")]
    rows = [
        Row(
            id=str(n),
            query=Item(text=f"q{n}"),
            positives=[classes[n % 2]],
            negatives=[classes[1 - n % 2]],
        )
        for n in range(16)
    ]
    batches = one_pass(
        Source(Keys.of(rows), [10] * 16, in_batch=False), 8, np.random.default_rng(0)
    )
    assert sorted(index for batch in batches for index in batch) == list(range(16))
    # Where rows see each other's classes, no two of them go together.
    assert list(one_pass(Source(Keys.of(rows), [10] * 16), 8, np.random.default_rng(0))) != batches


def test_plans_are_deterministic_and_follow_the_seed(text_rows):
    sources = [Source(Keys.of(read_rows(text_rows)), list(range(16)))]

    def first(seed):
        stream = plan(sources, 4, seed)
        return [next(stream) for _ in range(12)]

    assert first(1) == first(1)
    assert first(1) != first(2)


def test_shards_are_equal_and_disjoint():
    parts = [shard(range(11), rank, 4) for rank in range(4)]
    assert {len(part) for part in parts} == {2}
    assert len({i for part in parts for i in part}) == 8


def test_negatives_rotate_over_the_passes():
    row = Row(
        id="r",
        query=Item(text="q"),
        positives=[Item(text="a"), Item(text="b")],
        negatives=[Item(text=str(n)) for n in range(5)],
        negative_scores=[0.1 * n for n in range(5)],
    )
    seen = set()
    for epoch in range(5):
        (positive, _), *negatives = documents_of(row, epoch, 2)
        assert positive.text == "ab"[epoch % 2]
        assert all(score == pytest.approx(0.1 * int(item.text)) for item, score in negatives)
        seen |= {item.text for item, _ in negatives}
    assert seen == set("01234")


def test_the_learning_rate_rises_and_falls_to_zero(tiny_model):
    config = TrainConfig(model="m", out="o", data=("r",), steps=100, warmup=0.1, lr=1.0)
    rates = [learning_rate(step, config) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0)
    assert rates[9] == pytest.approx(1.0)
    assert rates[-1] < 0.02


def test_freezing_what_is_not_there_is_an_error(tiny_model, text_rows, tmp_path):
    with pytest.raises(ConfigError, match="no weight begins with 'vision_tower'"):
        train(config_of(tiny_model, tmp_path, text_rows, freeze=("vision_tower",)))


def test_frozen_towers_stay_as_they_are(tiny_model, mixed_rows, tmp_path):
    config = config_of(tiny_model, tmp_path, mixed_rows, steps=2, freeze=("visual",))
    final = train(config)
    from safetensors.torch import load_file

    names = set(load_file(final / "trained.safetensors"))
    assert names
    assert not any(name.startswith("visual") for name in names)


def test_the_dry_run_shows_rows_tokens_and_memory(tiny_model, mixed_rows, tmp_path, capsys):
    path = tmp_path / "c.toml"
    path.write_text(
        f'model = "{tiny_model}"\nfamily = "gme"\nout = "{tmp_path}/out"\n'
        f'hard_negatives = 2\ndevice = "cpu"\n[[data]]\nrows = "{mixed_rows}"\n'
    )
    main(["train", "--config", str(path), "--dry-run"])
    shown = capsys.readouterr().out
    assert "24 rows" in shown
    assert "2 to 2 negatives" in shown
    assert "tokens per row" in shown
    assert "GiB" in shown
    assert not (tmp_path / "out").exists()


def test_bad_rows_are_named_before_training(tiny_model, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"id": "a", "query": {"text": "q"}, "positives": []}\n')
    with pytest.raises(ContentError, match=r"rows\.jsonl:1: positives"):
        train(config_of(tiny_model, tmp_path / "out", rows))


def test_steps_use_the_teachers_scores(tiny_model, tmp_path):
    """Following a teacher that prefers the negative moves the loss the other way."""
    rows = [
        Row(
            id=str(n),
            query=Item(text=f"q{n}"),
            positives=[Item(text=f"p{n}")],
            negatives=[Item(text=f"n{n}")],
            positive_scores=[0.0],
            negative_scores=[9.0],
        )
        for n in range(4)
    ]
    path = tmp_path / "rows.jsonl"
    write_rows(path, rows)
    config = config_of(tiny_model, tmp_path / "a", path, distil_weight=1.0, steps=12, lr=3e-3)
    train(config)
    backbone = load_backbone(tiny_model, family="gme", device="cpu")
    from safetensors.torch import load_file

    backbone.model.load_state_dict(
        load_file(tmp_path / "a/final/trained.safetensors"), strict=False
    )
    dataset = load_datasets(config, backbone)[0]
    step = prepare_step(Batch(0, (0, 1, 2, 3), 0), dataset, backbone, 1)
    vectors = torch.nn.functional.normalize(backbone.forward(step.inputs), dim=-1)
    queries, documents = vectors[:4], vectors[4:]
    similarity = queries @ documents.T
    assert (similarity[range(4), [1, 3, 5, 7]] > similarity[range(4), [0, 2, 4, 6]]).all()


def test_no_two_rows_of_a_page_share_a_batch():
    rows = [
        Row(
            id=str(n),
            query=Item(text=f"q{n}"),
            positives=[Item(text=f"p{n}")],
            source=f"a.pdf#{n % 6} (part {n})",
        )
        for n in range(18)
    ]
    batches = list(one_pass(Source(Keys.of(rows), [10] * len(rows)), 6, np.random.default_rng(0)))
    assert sorted(n for batch in batches for n in batch) == list(range(18))
    assert all(len({n % 6 for n in batch}) == 6 for batch in batches)


def test_the_shipped_configurations_are_valid():
    for path in sorted(SHIPPED.glob("*.toml")):
        options = TrainRerankerConfig if path.stem == "reranker" else TrainConfig
        assert build(options, read_file(path), path.name).data


def test_the_adapters_of_adapt_toml_fit_the_shipped_architecture(tmp_path):
    shipped = build(TrainConfig, read_file(find_config("adapt")), "adapt")
    folder = save_nano(tmp_path / "nano")
    backbone = load_backbone(folder, device="cpu", dtype="float32")
    make_trainable(backbone, shipped.replace(model=str(folder)))
    names = {n for n, p in backbone.model.named_parameters() if p.requires_grad}
    assert len(names) == 2 * 2 * 2  # layers, query and value, the two matrices of each
    assert all(".attention.self." in name for name in names)


def test_a_missing_evaluation_file_is_told_before_training(tiny_model, text_rows, tmp_path):
    with pytest.raises(ContentError, match="cannot be read"):
        train(config_of(tiny_model, tmp_path / "out", text_rows, evaluate="none.jsonl"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora": LoraConfig(targets="nothing")}, r"lora\.targets"),
        ({"matryoshka_dims": (9999,)}, "dim=9999"),
        ({"matryoshka_layers": ((1, 9999),)}, "dim=9999"),
        ({"matryoshka_layers": ((3, 8),)}, "layers=3 is not possible: this model has 2 layers"),
        ({"matryoshka_layers": ((2, 8),)}, "widths at its full depth are matryoshka_dims"),
    ],
)
def test_settings_that_do_not_fit_the_model(tiny_model, text_rows, tmp_path, changes, words):
    with pytest.raises(ConfigError, match=words):
        train(config_of(tiny_model, tmp_path, text_rows, **changes))


@pytest.mark.parametrize("setting", ["steps=0", "batch_size=0", "log_every=0", "chunk=-1"])
def test_numbers_that_would_hang_or_crash_are_refused(setting):
    values = {"model": "m", "out": "o", "data": ["r"]}
    name, _, value = setting.partition("=")
    with pytest.raises(ConfigError, match=f"{name}: Input should be greater than or equal"):
        build(TrainConfig, {**values, name: int(value)}, "here")
    with pytest.raises(ConfigError, match=f"{name}: Input should be a valid integer"):
        build(TrainConfig, {**values, name: False}, "here")


def test_weights_that_no_process_used_have_no_gradient(on_two_processes):
    """Weight decay and momentum would move them; on one process they stay."""
    configs, results = on_two_processes
    one, two = one_step(configs["text alone"]), results["text alone"]
    assert one["gradients"].keys() == two["gradients"].keys()
    assert not any(name.startswith("visual") for name in two["gradients"])
