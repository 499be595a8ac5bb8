"""The engine: planning, out-of-memory, errors that name the item, loading that is exact."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from mmrag.content import Clip, Content
from mmrag.embedders import Calibration, load_embedder
from mmrag.errors import ConfigError, ContentError, ModelError
from mmrag.modeling.batching import TokenBudget, default_workers, iter_batches, pad, run_halving
from mmrag.modeling.checkpoints import SHIPPED


def test_batches_hold_every_item_once_and_keep_the_budget():
    costs = [5, 300, 7, 7, 90, 4000, 12, 1, 64, 300]
    batches = list(iter_batches(costs, lambda: 600))
    assert sorted(i for batch in batches for i in batch) == list(range(len(costs)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(costs[i] for i in batch) <= 600
    assert len(batches) < len(costs) / 2 + 1


def test_a_fallen_limit_holds_for_what_is_left():
    limits = iter([100, 20, 20, 20, 20, 20])
    sizes = [len(batch) for batch in iter_batches([10] * 17, lambda: next(limits))]
    assert sizes == [10, 2, 2, 2, 1]


def test_padding():
    rows = [torch.tensor([1, 2, 3]), torch.tensor([4])]
    ids, mask = pad(rows, 0)
    assert ids.tolist() == [[1, 2, 3], [4, 0, 0]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]


def test_batches_keep_the_token_budget_visual_tokens_included(gme, monkeypatch):
    seen = []
    forward = gme.backbone.forward

    def spy(batch):
        seen.append((len(batch), max(item.n_tokens for item in batch)))
        return forward(batch)

    monkeypatch.setattr(gme.backbone, "forward", spy)
    contents = [Image.new("RGB", (28 * n, 28 * 6)) for n in range(1, 9)] + ["short"] * 9
    gme.encode(contents)
    assert all(n == 1 or n * longest <= gme.budget.full for n, longest in seen)
    assert sum(n for n, _ in seen) == len(contents)
    assert len(seen) < len(contents)


class Item:
    """An input of so many tokens, whose result is their number."""

    def __init__(self, n_tokens):
        self.n_tokens = n_tokens


def device(most):
    """A forward that runs out of memory beyond ``most`` tokens, and the sizes that it saw."""
    seen = []

    def forward(batch):
        tokens = len(batch) * max(item.n_tokens for item in batch)
        seen.append(tokens)
        if tokens > most():
            raise torch.OutOfMemoryError("no memory")
        return np.array([item.n_tokens for item in batch], dtype=np.float32)

    return forward, seen


def test_out_of_memory_halves_the_batch_and_keeps_the_order():
    forward, seen = device(lambda: 20)
    items = [Item(n) for n in (9, 8, 7, 6, 5)]
    result = run_halving(forward, items, TokenBudget(1000), "m")
    assert result.tolist() == [9, 8, 7, 6, 5]
    assert seen[0] == 45 and max(seen[1:]) <= 22


def test_a_short_lack_of_memory_is_forgotten():
    """One small batch that fails must not make all that follow small for good."""
    lack = iter([0])
    forward, _ = device(lambda: next(lack, 10**9))
    budget = TokenBudget(32768)
    run_halving(forward, [Item(11)] * 4, budget, "m")
    assert budget.limit == 22
    for _ in range(400):
        run_halving(forward, [Item(budget.limit)], budget, "m")
        if budget.limit == budget.full:
            break
    assert budget.limit == 32768


def test_a_lasting_lack_of_memory_is_tried_ever_more_rarely_and_said_once(caplog):
    forward, seen = device(lambda: 1000)
    budget = TokenBudget(2000)
    failures = []
    for step in range(300):
        size = max(1, budget.limit // 10)
        before = len(seen)
        run_halving(forward, [Item(10)] * size, budget, "m")
        if seen[before] > 1000:
            failures.append(step)
    assert sum("Out of memory" in record.message for record in caplog.records) == 1
    gaps = np.diff(failures)
    assert len(failures) < 9
    assert (gaps[1:] > gaps[:-1]).all()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("no memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError(),
    ],
)
def test_out_of_memory_on_any_device_is_halved(gme, monkeypatch, error):
    texts = ["one", "two two", "three", "four four four", "five"]
    expected = gme.encode(texts)
    forward = gme.backbone.forward

    def small(batch):
        if len(batch) > 2:
            raise error
        return forward(batch)

    monkeypatch.setattr(gme.backbone, "forward", small)
    monkeypatch.setattr(gme, "budget", TokenBudget(1500))
    np.testing.assert_allclose(gme.encode(texts), expected, atol=1e-5)


def test_what_is_left_of_a_call_is_planned_anew(gme, monkeypatch):
    texts = [f"text {n}" for n in range(200)]
    costs = [gme.backbone.plan(Content(text), None).n_tokens for text in texts]
    budget = TokenBudget(20 * max(costs))
    monkeypatch.setattr(gme, "budget", budget)
    forward, sizes = gme.backbone.forward, []

    def small(batch):
        sizes.append(len(batch))
        if len(sizes) == 1:
            raise torch.OutOfMemoryError("no memory")
        return forward(batch)

    monkeypatch.setattr(gme.backbone, "forward", small)
    assert np.isfinite(gme.encode(texts)).all()
    assert sizes[:3] == [20, 10, 10]
    assert 10 in sizes[5:] or 11 in sizes[5:]  # batches planned after the failure
    assert max(sizes[-3:]) > 11  # and raised again once some have fitted


def test_one_item_without_memory_is_an_error_that_says_what_to_do(gme, monkeypatch):
    def never(batch):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(gme.backbone, "forward", never)
    monkeypatch.setattr(gme, "budget", TokenBudget(1500))
    with pytest.raises(ModelError, match="max_image_tokens"):
        gme.encode(["one"])


def test_other_errors_of_the_model_are_not_taken_for_memory(gme, monkeypatch):
    def broken(batch):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(gme.backbone, "forward", broken)
    with pytest.raises(RuntimeError, match="shapes differ"):
        gme.encode(["one", "two"])


def test_vectors_that_are_not_finite_are_refused(gme, monkeypatch):
    forward = gme.backbone.forward
    monkeypatch.setattr(gme.backbone, "forward", lambda batch: forward(batch) * float("nan"))
    with pytest.raises(ModelError, match="not finite"):
        gme.encode(["one"])


@pytest.mark.parametrize(
    "one", ["text", b"bytes", Content("x"), {"text": "x"}, Image.new("RGB", (8, 8)), 3]
)
def test_one_content_in_place_of_several_is_refused(gme, one):
    with pytest.raises(ContentError, match="put it in a list"):
        gme.encode(one)


def test_one_image_object_may_be_used_many_times(gme, tmp_path):
    """Two threads that decode one lazily opened file break each other's reading."""
    path = tmp_path / "noise.png"
    Image.effect_noise((600, 600), 80).save(path)
    expected = gme.encode([path])[0]
    for _ in range(5):
        image = Image.open(path)
        vectors = gme.encode([image, Content("x", image), image, image])
        np.testing.assert_allclose(vectors[[0, 2, 3]], [expected] * 3, atol=1e-5)


def test_an_image_placeholder_in_an_instruction_is_text(gme):
    told = gme.encode([Image.new("RGB", (56, 56))], "Find <|image_pad|> here")
    assert np.isfinite(told).all()
    plan = gme.backbone.plan(Content("x"), "Find <|image_pad|> here")
    assert gme.backbone._image_id not in plan.ids


def test_dimensions_that_the_model_was_not_trained_for_are_refused(qwen2_vl_folder, tmp_path):
    folder = shutil.copytree(qwen2_vl_folder, tmp_path / "mrl")
    (folder / "mmrag.json").write_text('{"family": "gme", "matryoshka_dims": [8, 16]}')
    embedder = load_embedder(folder, device="cpu")
    assert embedder.encode(["x"], dim=16).shape == (1, 16)
    assert embedder.encode(["x"], dim=32).shape == (1, 32)
    with pytest.raises(ConfigError, match="trained for 8, 16, 32"):
        embedder.encode(["x"], dim=20)
    with pytest.raises(ConfigError, match="32 dimensions"):
        embedder.encode(["x"], dim=33)


def test_calibration_comes_from_the_marker_or_the_table(qwen2_vl_folder, tmp_path):
    marker = json.loads((SHIPPED / "mmrag-nano" / "mmrag.json").read_text())["calibration"]
    assert load_embedder("mmrag-nano").calibration == Calibration(**marker)
    folder = shutil.copytree(qwen2_vl_folder, tmp_path / "own")
    assert load_embedder(folder, family="gme", device="cpu").calibration is None
    marker = {
        "family": "gme",
        "calibration": {
            "support_cosine": 0.3,
            "fusion_weights": {"bm25": 2},
            "zero_cosine": {"text": 0.1},
        },
    }
    (folder / "mmrag.json").write_text(json.dumps(marker))
    own = load_embedder(folder, device="cpu").calibration
    assert own == Calibration({"bm25": 2}, {"text": 0.1}, 0.3)
    # Of a known checkpoint, what its own folder does not say stands in the table.
    known = shutil.copytree(folder, tmp_path / "gme-Qwen2-VL-2B-Instruct")
    found = load_embedder(known, device="cpu").calibration
    assert found == Calibration(
        {"image": 3, "fused": 3, "tokens": 7, "bm25": 2}, {"text": 0.1}, 0.3
    )
    for bad, says in (
        ('{"fond": 1}', "fond"),
        ('{"zero_cosine": 0.2}', "name of the ranking"),
        ('{"zero_cosine": {"text": "low"}}', "numbers"),
        ('{"support_cosine": "high"}', "numbers"),
    ):
        (folder / "mmrag.json").write_text(f'{{"family": "gme", "calibration": {bad}}}')
        with pytest.raises(ConfigError, match=says):
            load_embedder(folder, device="cpu")


def test_workers_can_be_set(qwen2_vl_folder):
    assert load_embedder(qwen2_vl_folder, family="gme", workers=3).workers == 3
    assert 1 <= default_workers(None) <= 16
    with pytest.raises(ConfigError, match="workers=0"):
        load_embedder(qwen2_vl_folder, family="gme", workers=0)


def test_every_item_is_tokenised_once(gme, monkeypatch):
    """Tokenising twice, to know the length and then the ids, took half of the time of texts."""
    calls = []
    tokenizer = type(gme.backbone.tokenizer)
    call = tokenizer.__call__

    def counted(self, text, *args, **kwargs):
        calls.append(text)
        return call(self, text, *args, **kwargs)

    monkeypatch.setattr(tokenizer, "__call__", counted)
    texts = [f"text number {n}" for n in range(20)]
    images = [Content(image=Image.new("RGB", (60 + n, 60))) for n in range(3)]
    both = [Content("words", Image.new("RGB", (60, 60)))]
    gme.encode([*texts, *images, *both], instruction="Find a page.")
    assert len(calls) == 24


def test_a_bad_item_is_named(gme, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\nnot an image")
    with pytest.raises(ContentError, match="item 2"):
        gme.encode(["a", "b", broken])
    with pytest.raises(ContentError, match="item 0"):
        gme.encode([3.5])


def test_instruction_of_the_call_and_of_the_item(gme):
    plain, told = gme.encode(["x"]), gme.encode(["x"], instruction="Find a page.")
    own = gme.encode([Content("x", None, "Find a page.")])
    assert not np.allclose(plain, told, atol=1e-3)
    np.testing.assert_allclose(told, own, atol=1e-6)


def test_families_without_clips_refuse_them(gme):
    clip = Clip([Image.new("RGB", (30, 30))] * 2, [0, 1])
    with pytest.raises(ContentError, match=r"item 1: .* cannot embed clip.*frames as images"):
        gme.encode(["x", Content("words", clip=clip)])


def test_modalities_of_the_marker_are_kept(qwen2_vl_folder, tmp_path):
    folder = shutil.copytree(qwen2_vl_folder, tmp_path / "text-only")
    marker = {"family": "gme", "modalities": ["text"], "max_length": 64}
    (folder / "mmrag.json").write_text(json.dumps(marker))
    embedder = load_embedder(folder, device="cpu")
    assert embedder.modalities == {"text"}
    assert embedder.backbone.recipe.max_length == 64
    with pytest.raises(ContentError, match="cannot embed image, only text"):
        embedder.encode([Image.new("RGB", (30, 30))])


def test_names_that_lead_nowhere(tmp_path, qwen2_vl_folder):
    with pytest.raises(ModelError, match="no such folder"):
        load_embedder("not a name at all")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ModelError, match="family="):
        load_embedder(tmp_path)
    with pytest.raises(ConfigError, match="family='gmee'"):
        load_embedder(qwen2_vl_folder, family="gmee")
    with pytest.raises(ConfigError, match="max_len: unknown to family 'gme'"):
        load_embedder(qwen2_vl_folder, family="gme", max_len=3)
    with pytest.raises(ConfigError, match="device="):
        load_embedder(qwen2_vl_folder, family="gme", device="tpu9")
    with pytest.raises(ConfigError, match="dtype="):
        load_embedder(qwen2_vl_folder, family="gme", dtype="float8")


def test_loading_is_quiet(qwen2_vl_folder, capfd):
    load_embedder(qwen2_vl_folder, family="gme")
    assert capfd.readouterr().err == ""
