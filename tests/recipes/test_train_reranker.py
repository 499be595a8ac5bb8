"""Training of rerankers: losses by hand, effect, resume, faults, and exports that score alike."""

import json
import pickle

import numpy as np
import pytest
import torch
from made_rows import make_rows
from safetensors.torch import load_file, save_file
from tiny import save_qwen2_vl
from tiny_chat import save_llava
from tiny_qwen3 import add_words, save_qwen3_vl
from training import killed_at, log_of, same, weights_of

from mmrag.content import Content
from mmrag.errors import ConfigError, ContentError, ModelError
from mmrag.rerankers import RerankPrompt, load_scorer
from mmrag.rerankers.local import LocalScorer
from mmrag_recipes import loop as loop_module
from mmrag_recipes.__main__ import main
from mmrag_recipes.batches import Batch
from mmrag_recipes.config import DataConfig, LoraConfig, RunConfig
from mmrag_recipes.config_reranker import PromptConfig, TrainRerankerConfig
from mmrag_recipes.data import load_datasets
from mmrag_recipes.evaluate_reranker import evaluate_scorer
from mmrag_recipes.export_reranker import export_reranker, load_trained_reranker
from mmrag_recipes.options import build, find_config, read_file
from mmrag_recipes.pair_steps import PairFeeder, PairPlanner, encode_pairs, pair_loss
from mmrag_recipes.rows import Item, Row, read_rows, store_of, write_rows
from mmrag_recipes.train_reranker import RerankerTask, load_asker, train_reranker

WORDS = ("True", "False", "yes", "no", "gold", "grey")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = save_qwen2_vl(tmp_path_factory.mktemp("reranker") / "tiny", seed=4)
    add_words(folder, WORDS)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return make_rows(tmp_path_factory.mktemp("pairs"), 8, negatives=2)


def config_of(model, out, *rows, **changes):
    config = TrainRerankerConfig(
        model=str(model),
        out=str(out),
        data=tuple(DataConfig(rows=str(path)) for path in rows),
        steps=4,
        batch_size=2,
        hard_negatives=2,
        lr=1e-3,
        device="cpu",
        save_every=2,
    )
    return config.replace(**changes)


def test_losses_by_hand():
    logits = torch.tensor([[2.0], [-1.0], [0.5], [0.3]])
    rows = [[2.0, -1.0], [0.5, 0.3]]
    listwise = np.mean([-a / 2 + np.log(np.exp(a / 2) + np.exp(b / 2)) for a, b in rows])
    assert float(pair_loss(logits, [2, 2], "listwise", 2.0)) == pytest.approx(listwise, rel=1e-5)
    right = [np.log1p(np.exp(-a)) for a, _ in rows]
    wrong = [np.log1p(np.exp(b)) for _, b in rows]
    expected = np.mean([*right, *wrong])
    assert float(pair_loss(logits, [2, 2], "pointwise", 9.0)) == pytest.approx(expected, rel=1e-5)
    # A row that lost its negatives has nothing to choose from.
    assert float(pair_loss(logits[:1], [1], "listwise", 1.0)) == pytest.approx(0.0, abs=1e-6)
    nothing = pair_loss(torch.zeros(0, 1, requires_grad=True), [], "listwise", 1.0)
    nothing.backward()
    assert float(nothing.detach()) == 0


def test_training_sees_the_logits_of_inference(model, rows, tmp_path):
    """Texts and images, queries that are asked by different prompts, and instructions."""
    config = config_of(model, tmp_path, rows)
    asker = load_asker(config)
    (dataset,) = load_datasets(config, RerankerTask(config, asker).planner)
    ((_, step),) = PairFeeder([dataset], asker, 2).steps([Batch(0, tuple(range(8)), 0)])
    assert step.counts == [3] * 8
    with torch.no_grad():
        found = encode_pairs(asker, step.inputs).squeeze(1).numpy()
    scorer, store = load_scorer(model, device="cpu"), store_of(rows)
    expected = []
    for row in read_rows(rows):
        pairs = [
            (store.content(row.query), store.content(item))
            for item in (*row.positives, *row.negatives)
        ]
        expected.extend(scorer.logits(pairs, row.instruction))
    np.testing.assert_allclose(found, expected, atol=1e-4)


def learnable(folder, count, first=0):
    """Rows whose right answer is the one that says gold, whatever else it says."""
    rows = [
        Row(
            id=f"r{n}",
            query=Item(text=f"which {n}?"),
            positives=[Item(text=f"gold page {n * 7}")],
            negatives=[Item(text=f"grey page {n * 7 + k}") for k in range(3)],
        )
        for n in range(first, first + count)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "rows.jsonl", rows)
    return folder / "rows.jsonl"


@pytest.mark.parametrize("loss", ["listwise", "pointwise"])
def test_what_was_learned_shows_on_other_rows(model, tmp_path, loss):
    train, dev = learnable(tmp_path / "a", 12), learnable(tmp_path / "b", 8, 50)
    config = config_of(model, tmp_path / "run", train, loss=loss, steps=30, lr=5e-3)
    config = config.replace(lora=LoraConfig(r=4), evaluate=str(dev), evaluate_every=30)
    before = evaluate_scorer(load_scorer(model, device="cpu"), read_rows(dev), store_of(dev))
    train_reranker(config)
    out = export_reranker(tmp_path / "run", tmp_path / "out", dtype="float32")
    after = evaluate_scorer(load_scorer(out, device="cpu"), read_rows(dev), store_of(dev))
    assert before["all"]["ndcg@10"] < 0.85
    assert after["all"]["ndcg@10"] > 0.9
    last = (tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1]
    logged = json.loads(last)["metrics"]["all/ndcg@10"]
    assert logged == pytest.approx(after["all"]["ndcg@10"])


def test_an_export_asks_as_the_training_did(model, rows, tmp_path):
    prompt = PromptConfig(template="Is {query} met by {document}?", answers=("yes", "no"))
    limits = {"max_length": 90, "max_image_tokens": 6}
    config = config_of(model, tmp_path / "run", rows, prompt=prompt, limits=limits, lr=0.02)
    train_reranker(config.replace(lora=LoraConfig(r=2)))
    asker, _ = load_trained_reranker(tmp_path / "run")
    out = export_reranker(tmp_path / "run", tmp_path / "out", dtype="float32")
    pairs = [(Content("where?"), Content("a page " * 60)), (Content("x"), Content("y"))]
    expected = LocalScorer(asker, name="run").score(pairs)
    loaded = load_scorer(out, device="cpu")
    np.testing.assert_allclose(loaded.score(pairs), expected, atol=1e-5)
    asked = RerankPrompt("Is {query} met by {document}?", ("yes", "no"))
    start = load_scorer(model, device="cpu", prompt=asked, **limits)
    assert np.abs(start.score(pairs) - expected).max() > 1e-3
    # What the caller says goes first.
    other = load_scorer(out, device="cpu", max_length=200)
    assert np.abs(other.score(pairs[:1]) - expected[:1]).max() > 1e-6


def test_an_export_that_scores_otherwise_is_refused(model, rows, tmp_path, monkeypatch):
    from mmrag_recipes import export_reranker as module

    train_reranker(config_of(model, tmp_path / "run", rows, steps=1))
    original = module.save_model

    def broken(trained, source, target, dtype):
        original(trained, source, target, dtype)
        weights = load_file(target / "model.safetensors")
        name = next(name for name in weights if "embed_tokens" in name)
        weights[name] = weights[name].roll(1, 0)
        save_file(weights, target / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(module, "save_model", broken)
    with pytest.raises(ModelError, match="reloaded scores differ"):
        export_reranker(tmp_path / "run", tmp_path / "out")


def test_the_published_reranker_trains_too(rows, tmp_path):
    folder = save_qwen3_vl(tmp_path / "Qwen3-VL-Reranker-2B", words=("yes", "no"))
    shipped = build(TrainRerankerConfig, read_file(find_config("reranker")), "reranker")
    changes = {"limits": {}, "steps": 2, "batch_size": 2, "chunk": 2, "hard_negatives": 1}
    changes |= {"data": (str(rows),), "device": "cpu", "model": str(folder)}
    train_reranker(shipped.replace(out=str(tmp_path / "run"), **changes))
    assert all("lora_" in name and "visual" not in name for name in weights_of(tmp_path / "run"))
    out = export_reranker(tmp_path / "run", tmp_path / "mine", dtype="float32")
    assert json.loads((out / "mmrag.json").read_text())["family"] == "qwen3_vl_reranker"


def test_resuming_gives_the_run_that_was_never_stopped(model, rows, tmp_path):
    whole = config_of(model, tmp_path / "whole", rows, lora=LoraConfig(r=2, dropout=0.2))
    train_reranker(whole)
    broken = whole.replace(out=str(tmp_path / "broken"))
    with killed_at(3):
        train_reranker(broken)
    train_reranker(broken)
    losses = [[record["loss"] for record in log_of(c.out)] for c in (whole, broken)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    with pytest.raises(ConfigError, match="loss='listwise', now 'pointwise'"):
        train_reranker(whole.replace(loss="pointwise"))


MOVES = {"loss": "pointwise", "temperature": 3.0, "hard_negatives": 1, "batch_size": 4}


@pytest.mark.parametrize("name", MOVES)
def test_options_move_the_weights(model, rows, tmp_path, name):
    own = TrainRerankerConfig.model_fields.keys() - RunConfig.model_fields.keys()
    assert own == {"kind", "prompt", "loss", "temperature"}  # kind and prompt: tested above
    for out, changes in (("a", {}), ("b", {name: MOVES[name]})):
        train_reranker(config_of(model, tmp_path / out, rows, steps=2, **changes))
    assert not same(weights_of(tmp_path / "a"), weights_of(tmp_path / "b"))


def test_chunks_give_the_gradient_of_the_whole(model, rows, tmp_path):
    gradients = []
    for chunk in (0, 2):
        config = config_of(model, tmp_path, rows, chunk=chunk)
        task = RerankerTask(config, load_asker(config))
        (dataset,) = load_datasets(config, task.planner)
        ((_, step),) = task.steps([dataset], [Batch(0, (0, 1, 2, 3), 0)])
        optimizer = torch.optim.SGD(task.model.parameters(), lr=0.0)
        optimizer.param_groups[0]["scale"] = 1.0
        loop_module.train_step(task, optimizer, step, config.replace(clip=1e9), 0)
        named = task.model.named_parameters()
        gradients.append({name: p.grad for name, p in named if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        scale = gradient.abs().max().clamp(min=1e-6)
        assert (gradients[1][name] - gradient).abs().max() / scale < 2e-3, name


def test_a_broken_image_costs_its_negative_or_its_row(model, tmp_path):
    path = make_rows(tmp_path, 4, negatives=1)
    store, (text, image, *_) = store_of(path), read_rows(path)
    rows = [
        text.model_copy(update={"negatives": [image.positives[0], *text.negatives]}),
        image.model_copy(update={"id": "lost"}),
    ]
    write_rows(path, rows)
    config = config_of(model, tmp_path / "run", path, steps=1)
    task = RerankerTask(config, load_asker(config))
    datasets = load_datasets(config, task.planner)
    file = store.path(image.positives[0].image)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    ((_, step),) = task.steps(datasets, [Batch(0, (0, 1), 0)])
    assert step.counts == [2]
    assert [problem.row for problem in step.skipped] == [text.id, "lost"]


def test_adapters_on_four_bits_are_merged_into_the_weights_as_published(model, rows, tmp_path):
    pytest.importorskip("bitsandbytes")
    lora = LoraConfig(r=2, quantize="4bit-double")
    train_reranker(config_of(model, tmp_path, rows, steps=2, lora=lora))
    asker, _ = load_trained_reranker(tmp_path)
    assert {p.dtype for p in asker.model.parameters()} == {torch.float32}


def test_the_dry_run_shows_sides_and_memory_and_writes_nothing(model, rows, tmp_path, capsys):
    config_of(model, tmp_path / "out", rows, lora=LoraConfig(r=2)).save(tmp_path / "c.json")
    main(["train_reranker", "--config", str(tmp_path / "c.json"), "--dry-run"])
    shown = capsys.readouterr().out
    assert "8 rows" in shown
    assert "tokens per row" in shown
    assert "GiB" in shown
    query = next(line for line in shown.splitlines() if "query:" in line)
    asker = load_asker(config_of(model, tmp_path / "out", rows))
    row = read_rows(rows)[0]
    expected = asker.plan((Content(row.query.text), None), row.instruction).n_tokens
    assert query.endswith(f", {expected} tokens")
    assert not (tmp_path / "out").exists()


def test_the_planner_can_be_sent_to_processes(model, rows, tmp_path):
    config = config_of(model, tmp_path, rows)
    planner = pickle.loads(pickle.dumps(RerankerTask(config, load_asker(config)).planner))
    assert isinstance(planner, PairPlanner)
    assert planner.plan(Content("a question"), None).n_tokens > 10


def test_what_cannot_be_trained_is_said(model, rows, tmp_path):
    bare = make_rows(tmp_path / "bare", 4, negatives=0)
    with pytest.raises(ContentError, match="run mine first"):
        train_reranker(config_of(model, tmp_path / "a", bare))
    llava = save_llava(tmp_path / "llava")
    with pytest.raises(ConfigError, match="train_reranker takes Qwen3-VL-Reranker and chat models"):
        train_reranker(config_of(llava, tmp_path / "b", rows))
    with pytest.raises(ModelError, match="no final weights"):
        export_reranker(tmp_path / "none", tmp_path / "out")


def test_evaluation_puts_ties_last_and_leaves_out_rows_without_negatives(tmp_path, capsys):
    class Same:
        name = "same"

        def judge(self, pairs, instruction=None):
            return [0.5 if "odd" not in d.text else ContentError("odd") for _, d in pairs]

    row = Row(id="a", query=Item(text="q"), positives=[Item(text="p")], negatives=[Item(text="n")])
    odd = row.model_copy(update={"negatives": [Item(text="odd")]})
    bare = row.model_copy(update={"negatives": []})
    found = evaluate_scorer(Same(), [row, odd, bare], store_of(tmp_path / "rows.jsonl"))
    assert found["all"]["n"] == 2
    assert found["text->text"]["mrr@10"] == pytest.approx((1 / 2 + 1) / 2)


def test_the_commands(model, rows, tmp_path, capsys):
    out = tmp_path / "run"
    words = ["--model", str(model), "--out", str(out), "--steps", "1", "--batch-size", "2"]
    config = tmp_path / "c.toml"
    config.write_text(f'[[data]]\nrows = "{rows}"\n')
    main(["train_reranker", "--config", str(config), *words, "--device", "cpu", "--lora.r", "2"])
    main(["export_reranker", str(out), "--out", str(tmp_path / "mine")])
    main(["evaluate_reranker", str(rows), "--model", str(tmp_path / "mine")])
    shown = capsys.readouterr().out
    assert "trained weights" in shown
    assert "exported" in shown
    assert "| all | 8 |" in shown
