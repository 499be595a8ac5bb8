"""What only a card shows: its vectors are the CPU's, alone, recorded, compiled and side by side."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from tiny import save_qwen2_vl
from tiny_chat import save_llava
from tiny_qwen3 import QWEN_FAMILIES, save_qwen3_vl

from mmrag.content import Content
from mmrag.embedders import load_embedder
from mmrag.embedders.parallel import ParallelEmbedder
from mmrag.modeling import compiling
from mmrag.modeling.attention import PLANLESS, attend
from mmrag.modeling.image_rule import ImageRule
from mmrag.modeling.qwen_images import cut_patches
from mmrag.rerankers import load_scorer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

TEXTS = ["wind " * n for n in (1, 3, 40, 3, 90, 300, 1)]


def pages(count, seed=0):
    """Images of noise, half of them of one size."""
    chance = np.random.default_rng(seed)
    sizes = [(112, 168) if n % 2 else tuple(chance.integers(60, 250, 2)) for n in range(count)]
    return [Content(image=chance.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in sizes]


def on_both(folder, family, dtype="float32", **options):
    """An embedder on the card, and the same on the CPU in float32."""
    card = load_embedder(folder, family=family, device="cuda", dtype=dtype, **options)
    return card, load_embedder(folder, family=family, device="cpu", dtype="float32")


@pytest.mark.parametrize(("dtype", "least"), [("float32", 0.99999), ("bfloat16", 0.99)])
@pytest.mark.parametrize("family", QWEN_FAMILIES)
def test_vectors_are_those_of_the_cpu(family, dtype, least, tmp_path):
    card, cpu = on_both(QWEN_FAMILIES[family](tmp_path / "tiny"), family, dtype)
    contents = [*pages(9), *TEXTS, Content("a text", pages(1)[0].image)]
    expected = cpu.encode(contents)
    alone = np.concatenate([card.encode([content]) for content in contents])
    for vectors in (card.encode(contents), alone):
        assert (vectors * expected).sum(1).min() > least


@pytest.mark.parametrize("family", QWEN_FAMILIES)
def test_recorded_texts_have_the_vectors_of_the_cpu(family, tmp_path, caplog):
    card, cpu = on_both(QWEN_FAMILIES[family](tmp_path / "tiny"), family)
    for text in TEXTS:
        assert (card.encode([text]) * cpu.encode([text])).sum() > 0.99999
    # Runs that look both ways need a mask, and are not recorded.
    assert bool(card.backbone.model.short_runs._recorded) == (family != "moca")
    assert "recorded" not in caplog.text


@pytest.mark.parametrize("family", QWEN_FAMILIES)
def test_compiled_blocks_give_the_vectors_of_the_cpu(family, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(compiling, "LARGE", 64)
    card, cpu = on_both(QWEN_FAMILIES[family](tmp_path / "tiny"), family, compile=True)
    contents = [*pages(6), *TEXTS]
    assert (card.encode(contents) * cpu.encode(contents)).sum(1).min() > 0.99999
    assert card.blocks._compiled
    assert "compiled" not in caplog.text


def test_queries_beside_batches_have_their_own_vectors(tmp_path):
    card, cpu = on_both(save_qwen2_vl(tmp_path / "tiny"), "gme", token_budget=4096)
    images, questions = pages(40), [f"wind {n} " * (1 + n % 9) for n in range(60)]
    expected = cpu.encode(images), cpu.encode(questions)
    with ThreadPoolExecutor(4) as pool:
        batches = [pool.submit(card.encode, images) for _ in range(3)]
        asked = list(pool.map(lambda question: card.encode([question])[0], questions))
    for vectors in (future.result() for future in batches):
        assert (vectors * expected[0]).sum(1).min() > 0.99999
    assert (np.stack(asked) * expected[1]).sum(1).min() > 0.99999


def test_recorded_runs_of_two_models_may_run_at_once(tmp_path):
    pairs = [on_both(save_qwen2_vl(tmp_path / str(seed), seed), "gme") for seed in range(2)]
    texts = [f"wind {n} " * (200 + n) for n in range(40)]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda pair: [pair[0].encode([text])[0] for text in texts], pairs))
    for vectors, (_, cpu) in zip(found, pairs, strict=True):
        assert (np.stack(vectors) * cpu.encode(texts)).sum(1).min() > 0.99999


def test_several_threads_share_recorded_runs(tmp_path):
    card, cpu = on_both(save_qwen2_vl(tmp_path / "tiny"), "gme")
    questions = [f"wind {n} " * (1 + n % 30) for n in range(64)]
    start = threading.Barrier(8)

    def ask(part):
        start.wait()
        return [card.encode([question])[0] for question in part]

    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(ask, [questions[n::8] for n in range(8)]))
    expected = np.concatenate([cpu.encode(questions[n::8]) for n in range(8)])
    assert (np.concatenate(parts) * expected).sum(1).min() > 0.99999


@pytest.mark.parametrize("causal", [True, False])
def test_flash_attention_and_its_gradients_are_those_of_sdpa(causal):
    layer = torch.nn.Module()
    layer.num_key_value_groups, layer.is_causal = 3, causal
    torch.manual_seed(0)
    inputs = [torch.randn(2, 77, heads, 64, device="cuda") for heads in (6, 2, 2)]
    upstream = torch.randn(2, 77, 6, 64, device="cuda")
    found = []
    for dtype in (torch.float32, torch.bfloat16):  # SDPA, and flash attention
        q, k, v = (each.to(dtype, copy=True).requires_grad_() for each in inputs)
        attended, _ = attend(layer, *(each.transpose(1, 2) for each in (q, k, v)), None)
        attended.backward(upstream.to(dtype))
        found.append([attended, q.grad, k.grad, v.grad])
    for expected, ours in zip(*found, strict=True):
        assert torch.cosine_similarity(expected.flatten(), ours.float().flatten(), 0) > 0.9995


def test_decoders_in_half_precision_leave_cudnn_out(tmp_path):
    folder = save_qwen2_vl(tmp_path / "tiny")
    embedder = load_embedder(folder, family="gme", device="cuda", compile=False)
    with torch.profiler.profile() as profile:
        embedder.encode([*TEXTS, *pages(3)])
    names = {event.key for event in profile.key_averages()}
    assert "aten::_scaled_dot_product_flash_attention" in names
    decoder = embedder.backbone.model.language_model
    assert decoder.config._attn_implementation == PLANLESS


def test_patches_are_cut_to_the_same_bits():
    rule = ImageRule(4 * 28 * 28, 1280 * 28 * 28)
    pixels = torch.randint(0, 256, (3, 112, 168, 3), dtype=torch.uint8)
    assert torch.equal(cut_patches(pixels.cuda(), rule).cpu(), cut_patches(pixels, rule))


@pytest.mark.parametrize("way", ["8bit", "4bit", "4bit-double"])
def test_quantised_models_load_and_stay_near(way, tmp_path):
    pytest.importorskip("bitsandbytes")
    card, cpu = on_both(save_qwen2_vl(tmp_path / "tiny"), "gme", "bfloat16", quantize=way)
    contents = [*pages(3), *TEXTS]
    assert (card.encode(contents) * cpu.encode(contents)).sum(1).min() > 0.9


def test_device_map_finds_the_card(tmp_path):
    folder = save_qwen2_vl(tmp_path / "tiny")
    spread = load_embedder(folder, family="gme", dtype="float32", device_map="auto")
    cpu = load_embedder(folder, family="gme", dtype="float32", device="cpu")
    assert next(spread.backbone.model.parameters()).is_cuda
    contents = [*pages(3), *TEXTS]
    assert (spread.encode(contents) * cpu.encode(contents)).sum(1).min() > 0.99999


def test_two_processes_on_one_card_give_the_same_vectors(tmp_path):
    folder = save_qwen2_vl(tmp_path / "tiny")
    cpu = load_embedder(folder, family="gme", dtype="float32", device="cpu")
    contents = [*pages(8), *TEXTS]
    two = load_embedder(folder, family="gme", dtype="float32", device="cuda:0,cuda:0")
    assert isinstance(two, ParallelEmbedder)
    try:
        assert (two.encode(contents) * cpu.encode(contents)).sum(1).min() > 0.99999
    finally:
        two.close()


def test_rerankers_score_as_on_the_cpu(tmp_path):
    for folder in (
        save_qwen3_vl(tmp_path / "Qwen3-VL-Reranker-2B", words=("yes", "no", "assistant")),
        save_llava(tmp_path / "llava"),
    ):
        card = load_scorer(folder, device="cuda", dtype="float32")
        cpu = load_scorer(folder, device="cpu", dtype="float32")
        pairs = [(Content("which wind?"), document) for document in map(Content, TEXTS)]
        pairs += [(Content("which wind?"), page) for page in pages(3)]
        together, alone = card.score(pairs), [card.score([pair])[0] for pair in pairs]
        np.testing.assert_allclose(together, cpu.score(pairs), atol=1e-4)
        np.testing.assert_allclose(alone, together, atol=1e-4)
