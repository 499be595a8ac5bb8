"""Qwen3-VL-Reranker scores against the reference code and an independent computation."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import seen
from tiny_qwen3 import reference_inputs, save_qwen3_vl
from transformers import AutoTokenizer, Qwen3VLForConditionalGeneration

from mmrag.content import Clip, Content
from mmrag.errors import ContentError, ModelError
from mmrag.modeling.loading import place
from mmrag.rerankers import load_scorer
from mmrag.rerankers.local import Group
from mmrag.rerankers.qwen3_vl import load_qwen3_vl_scorer, rerank_prompt

IMAGE_BLOCK = "<|vision_start|><|image_pad|><|vision_end|>"
PROMPT = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and "
    'the Instruct provided. Note that the answer can only be "yes" or "no".<|im_end|>\n'
    "<|im_start|>user\n<Instruct>: {}<Query>:{}\n<Document>:{}<|im_end|>\n<|im_start|>assistant\n"
)
DEFAULT = "Given a search query, retrieve relevant candidates that answer the query."


def load(folder, **options):
    return load_qwen3_vl_scorer(folder, place("cpu", "float32"), name="tiny", **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_qwen3_vl(
        tmp_path_factory.mktemp("reranker") / "tiny", words=("yes", "no", "assistant")
    )


@pytest.fixture(scope="module")
def scorer(folder):
    return load(folder)


@pytest.fixture(scope="module")
def reference(golden):
    root = golden / "qwen3_vl_reranker"

    def side(given):
        image = root / "images" / given["image"] if given.get("image") else None
        return Content(given.get("text"), image) if given else None

    by_length = {}
    for case in json.loads((root / "expected.json").read_text())["cases"]:
        query = side(case["query"])
        asked = Content(query.text, query.image, case["instruction"])
        by_length.setdefault(case["max_length"], []).append((case, (asked, side(case["document"]))))
    return [
        (load(root / "checkpoint", max_length=length), pairs) for length, pairs in by_length.items()
    ]


def test_scores_equal_those_of_the_reference_code(reference):
    for scorer, cases in reference:
        pairs = [pair for _, pair in cases]
        together = scorer.score(pairs)
        np.testing.assert_allclose(together, [case["score"] for case, _ in cases], atol=1e-4)
        short = [i for i, (case, _) in enumerate(cases) if case["n_tokens"] < 1000]
        alone = [scorer.score([pairs[i]])[0] for i in short]
        np.testing.assert_allclose(alone, together[short], atol=1e-5)
        logits = scorer.logits([pairs[i] for i in short])
        np.testing.assert_allclose(logits, [cases[i][0]["logit"] for i in short], atol=1e-3)


def test_ids_and_grids_equal_those_of_the_reference_code(reference):
    for scorer, cases in reference:
        for case, pair in cases:
            plan = scorer.asker.plan(pair, case["instruction"])
            item = scorer.asker.prepare(plan, Group([0]))
            ids = item.ids.tolist()
            assert len(ids) == case["n_tokens"]
            assert ids[: len(case["head_ids"])] == case["head_ids"]
            assert ids[-len(case["tail_ids"]) :] == case["tail_ids"]
            assert str(rerank_prompt(*pair, case["instruction"])) == case["prompt"]
            if case["grid_thw"]:
                grids, patches = seen(item, scorer.asker.rule)
                assert grids == case["grid_thw"]
                assert abs(patches.mean().item() - case["pixel_mean"]) < 1e-4


def independent_logit(folder, prompt: str, images: list[Image.Image]) -> float:
    """The difference of the two logits of one pair, by transformers' whole model."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    inputs = reference_inputs(folder, prompt, images)
    last = model(**inputs).logits[0, -1]
    yes, no = tokenizer.convert_tokens_to_ids(["yes", "no"])
    return float(last[yes] - last[no])


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_logits_equal_an_independent_computation(tmp_path, tied):
    folder = save_qwen3_vl(tmp_path / "tiny", tied=tied, words=("yes", "no"))
    scorer = load(folder)
    noise = np.random.default_rng(0).integers(0, 255, (131, 217, 3), dtype=np.uint8)
    wide, small = Image.fromarray(noise), Image.fromarray(noise[:64, :96])
    sized = wide.resize((224, 128), Image.Resampling.BICUBIC)  # 6.8 and 4.1 times 32, rounded
    task = "Find a page"
    cases = [
        ((Content("q"), Content("d")), PROMPT.format(DEFAULT, "q", "d"), []),
        ((Content("q"), None), PROMPT.format(DEFAULT, "q", "NULL"), []),
        ((Content(image=small), Content("")), PROMPT.format(DEFAULT, IMAGE_BLOCK, ""), [small]),
        (
            (Content("q", small, task), Content("d", wide)),
            PROMPT.format(task, IMAGE_BLOCK + "q", IMAGE_BLOCK + "d"),
            [small, sized],
        ),
    ]
    together = scorer.logits([pair for pair, _, _ in cases])
    for logit, (pair, prompt, images) in zip(together, cases, strict=True):
        expected = independent_logit(folder, prompt, images)
        assert logit == pytest.approx(expected, abs=1e-4)
        assert scorer.logits([pair])[0] == pytest.approx(expected, abs=1e-4)
        assert scorer.score([pair])[0] == pytest.approx(1 / (1 + np.exp(-expected)), abs=1e-5)


def test_long_documents_lose_words_but_no_image_and_no_template(folder):
    whole = load(folder)
    short = load(folder, max_length=300)
    pair = (Content("q"), Content("word " * 400, Image.new("RGB", (96, 96))))
    full, cut = (s.asker.plan(pair, None).ids for s in (whole, short))
    assert len(cut) == 305
    assert cut[:300] == full[:300]
    assert cut[-5:] == full[-5:]
    after = (Content("q" * 400), Content(image=Image.new("RGB", (96, 96))))
    image_id = short.asker.model.config.image_token_id
    assert short.asker.plan(after, None).ids.count(image_id) == 9


def test_images_that_leave_no_room_are_refused(folder):
    scorer = load(folder, max_length=50)
    with pytest.raises(ContentError, match=r"pair 1: .*max_length=50"):
        scorer.score([(Content("a"), Content("b")), (Content("a"), _blank(320))])


def test_a_broken_image_is_named_by_its_pair(scorer, tmp_path):
    whole = tmp_path / "whole.png"
    Image.effect_noise((64, 64), 50).save(whole)
    cut = tmp_path / "cut.png"
    cut.write_bytes(whole.read_bytes()[:-1500])  # its header is fine, its pixels are not
    with pytest.raises(ContentError, match=r"pair 1: .*cut\.png"):
        scorer.score([(Content("a"), Content("b")), (Content("a"), Content(image=cut))])


def test_a_clip_is_refused_and_others_are_judged(scorer):
    clip = Clip([Image.new("RGB", (30, 30))] * 2, [0, 1])
    query = Content("x")
    refused, score = scorer.judge([(query, Content("words", clip=clip)), (query, Content("y"))])
    assert "Rerankers take no clips" in str(refused)
    assert isinstance(score, float)


def _blank(side: int) -> Content:
    return Content(image=Image.new("RGB", (side, side)))


def test_a_named_task_is_an_instruction(scorer):
    pair = (Content("q"), Content("d"))
    named = scorer.logits([pair], "page_for_question")
    spelt = scorer.logits([pair], "Find a document page that answers the question.")
    assert named == spelt
    assert named != scorer.logits([pair])


def test_nothing_gives_nothing(scorer):
    assert scorer.score([]).shape == (0,)


def test_a_checkpoint_without_its_head_is_refused(tmp_path):
    folder = save_qwen3_vl(tmp_path / "tiny", tied=False, words=("yes", "no"))
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lm_head\.weight"):
        load(folder)


def test_logits_can_be_differentiated(scorer):
    asker = scorer.asker
    item = asker.prepare(asker.plan((Content("q"), Content("d")), None), Group([0]))
    asker.forward([item, item], Group([0, 1]), None).sum().backward()
    weight = asker.model.model.language_model.layers[0].mlp.up_proj.weight
    assert weight.grad.abs().sum() > 0
    asker.model.zero_grad(set_to_none=True)


@pytest.mark.hub
def test_the_published_2b_tells_right_from_wrong():
    scorer = load_scorer("Qwen/Qwen3-VL-Reranker-2B")
    query = Content("What is the capital of China?")
    right, wrong = scorer.score(
        [
            (query, Content("The capital of China is Beijing.")),
            (query, Content("Gravity is a force that attracts two bodies towards each other.")),
        ]
    )
    assert right > 0.5 > wrong
