"""Flash attention in place of SDPA where a card has it: the same results, and no mask lost."""

import numpy as np
import pytest
import torch
from tiny_llava import save_llava, save_mm_embed, save_phi3v
from tiny_nano import save_nano
from tiny_qwen3 import QWEN_FAMILIES, save_qwen3_vl
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from mmrag.content import Content
from mmrag.embedders import load_embedder
from mmrag.modeling import attention, loading
from mmrag.modeling.attention import PLANLESS, attend, planless
from mmrag.modeling.loading import has_flash
from mmrag.rerankers import load_scorer

CHANCE = np.random.default_rng(5)
IMAGES = [CHANCE.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in ((60, 90), (112, 56))]
TEXTS = ["wind " * n for n in (1, 3, 40, 3)]
CONTENTS = [*TEXTS, *(Content(image=image) for image in IMAGES), Content("a text", IMAGES[0])]
SAVED = {
    **QWEN_FAMILIES,
    "vlm2vec_llava_next": save_llava,
    "vlm2vec_phi3v": save_phi3v,
    "mm_embed": save_mm_embed,
    "nano": save_nano,
}


@pytest.fixture
def on_cpu(monkeypatch):
    """Flash attention as a card has it, computed here. Gives the causal flag of each call."""
    calls = []

    def flash(query, key, value, dropout, causal, *, scale):
        calls.append(causal)
        length, repeats = query.shape[2], query.shape[1] // key.shape[1]
        keys, values = (each.repeat_interleave(repeats, 1) for each in (key, value))
        scores = query @ keys.transpose(2, 3) * (scale or query.shape[3] ** -0.5)
        if causal:
            scores += torch.full((length, length), -torch.inf).triu(1)
        return (scores.softmax(3) @ values,)

    monkeypatch.setattr(loading, "has_flash", lambda device: True)
    monkeypatch.setattr(attention, "_has_kernel", lambda query: True)
    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_flash_attention", flash)
    return calls


@pytest.mark.parametrize("family", SAVED)
def test_vectors_are_those_of_sdpa(family, tmp_path, request):
    folder = SAVED[family](tmp_path / "tiny")
    expected = load_embedder(folder, family=family).encode(CONTENTS)
    calls = request.getfixturevalue("on_cpu")
    vectors = load_embedder(folder, family=family).encode(CONTENTS)
    np.testing.assert_allclose(vectors, expected, atol=1e-5)
    # Decoders that look at all tokens need a mask, and so does BERT.
    assert (True in calls) == (family not in ("moca", "mm_embed", "nano"))
    # Towers of Qwen-VL attend by a rule of their own.
    assert (False in calls) == (family in ("vlm2vec_llava_next", "vlm2vec_phi3v", "mm_embed"))


def test_scores_are_those_of_sdpa(tmp_path, request):
    """Pairs share what their prompts begin with, so that keys are more than queries."""
    words = ("yes", "no", "assistant")
    folder = save_qwen3_vl(tmp_path / "Qwen3-VL-Reranker-2B", words=words)
    pairs = [(Content("which wind?"), Content(text)) for text in TEXTS]
    expected = load_scorer(folder).score(pairs)
    calls = request.getfixturevalue("on_cpu")
    np.testing.assert_allclose(load_scorer(folder).score(pairs), expected, atol=1e-5)
    assert any(calls)


@pytest.mark.parametrize("options", [{}, {"is_causal": False}, {"scaling": 0.3}])
def test_options_mean_what_they_do_for_sdpa(options, on_cpu):
    layer = torch.nn.Module()
    layer.num_key_value_groups = 3
    query, key, value = (torch.randn(2, heads, 5, 8) for heads in (6, 2, 2))
    expected, _ = sdpa_attention_forward(layer, query, key, value, None, **options)
    attended, _ = attend(layer, query, key, value, None, **options)
    torch.testing.assert_close(attended, expected)
    assert len(on_cpu) == 1


@pytest.mark.parametrize(
    ("dtype", "dim", "masked", "flash"),
    [
        (torch.bfloat16, 128, False, True),
        (torch.float16, 64, False, True),
        (torch.float32, 64, False, False),
        (torch.bfloat16, 68, False, False),
        (torch.bfloat16, 264, False, False),
        (torch.bfloat16, 128, True, False),
    ],
)
def test_what_flash_attention_takes(dtype, dim, masked, flash, monkeypatch):
    """With tensors that say they are on a card and hold nothing."""
    monkeypatch.setattr(attention, "sdpa_attention_forward", lambda *_, **__: ("sdpa", None))
    with FakeTensorMode():
        query, key = (
            torch.empty(2, 5, heads, dim, dtype=dtype, device="cuda").transpose(1, 2)
            for heads in (6, 2)
        )
        mask = torch.ones(2, 1, 5, 5, dtype=torch.bool, device="cuda") if masked else None
        attended, _ = attend(torch.nn.Module(), query, key, key, mask)
        queries = torch.empty(2, 6, 3, dim, dtype=dtype, device="cuda")
        late = attend(torch.nn.Module(), queries, key, key, mask)
    assert late == ("sdpa", None)  # torch would take the queries for the first ones
    assert (tuple(attended.shape) == (2, 5, 6, dim)) if flash else (attended == "sdpa")


def test_only_cards_have_it(monkeypatch):
    assert not has_flash(torch.device("cpu"))
    assert loading.place("cpu").attention == "sdpa"
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    for generation, expected in (((7, 5), False), ((8, 0), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, g=generation: g)
        assert has_flash(torch.device("cuda")) == expected
    monkeypatch.setattr(loading, "has_flash", lambda device: True)
    assert loading.place("cpu").attention == PLANLESS


def test_a_mask_keeps_cudnn_out(monkeypatch):
    """No plan for the shapes of batches that are padded: PyTorch has one setting for a process."""
    seen = []

    def spy(*_, **__):
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        return torch.zeros(1), None

    monkeypatch.setattr(attention, "sdpa_attention_forward", spy)
    with FakeTensorMode():
        query = torch.empty(2, 6, 5, 8, dtype=torch.float16, device="cuda")
        attend(torch.nn.Module(), query, query, query, torch.ones(2, 1, 5, 5, device="cuda"))
    attend(torch.nn.Module(), *(torch.zeros(2, 6, 5, 8),) * 3, None)  # on the CPU
    assert seen == [False, True]


def test_cudnn_is_back_when_no_thread_wants_it_out():
    card = torch.device("cuda")
    enabled = torch.backends.cuda.cudnn_sdp_enabled
    first, second = planless(card), planless(card)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not enabled()
    second.__exit__(None, None, None)
    assert enabled()
    with pytest.raises(KeyError), planless(card):
        raise KeyError
    assert enabled()
    with sdpa_kernel(SDPBackend.MATH):
        with planless(card):
            assert not enabled()
        assert not enabled()  # the user does not want it
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION), planless(card):
        assert enabled()  # nothing else is left
