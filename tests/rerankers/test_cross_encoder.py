"""Cross-encoders of sentence-transformers, against its own predict and against transformers."""

import logging

import numpy as np
import pytest
import torch
from fakes import make_image, make_node, spy_on_planless
from llama_index.core.schema import NodeWithScore
from PIL import Image
from tiny_cross import save_bert, save_qwen3
from transformers import AutoTokenizer, Qwen3ForCausalLM

from mmrag import MLLMReranker
from mmrag.content import Content
from mmrag.errors import ConfigError, ContentError, ModelError
from mmrag.rerankers import cross_encoder, load_scorer

st = pytest.importorskip("sentence_transformers")

QUERY = "which turbine makes power"
DOCUMENTS = [
    "wind",
    "solar cells make power from light",
    "turbine power " * 60,  # cut: the classifier reads 64 tokens
    "",
    "all day and all the light of the wind",
]
QWEN3_PROMPT = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and "
    'the Instruct provided. Note that the answer can only be "yes" or "no".<|im_end|>\n'
    "<|im_start|>user\n<Instruct>: {task}\n<Query>: {query}\n<Document>: {document}<|im_end|>\n"
    "<|im_start|>assistant\n<think>\n\n</think>\n\n"
)
WEB_SEARCH = "Given a web search query, retrieve relevant passages that answer the query"


def pairs(documents=DOCUMENTS, query=QUERY):
    return [(Content(query), Content(document)) for document in documents]


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return save_bert(tmp_path_factory.mktemp("bert") / "tiny")


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    return save_qwen3(tmp_path_factory.mktemp("qwen3") / "tiny-qwen3-reranker")


def test_scores_are_those_of_predict(bert):
    texts = [document for document in DOCUMENTS if document]
    expected = st.CrossEncoder(str(bert), device="cpu").predict([(QUERY, text) for text in texts])
    assert np.ptp(expected) > 0.05  # a model that says the same of all would prove nothing
    scorer = load_scorer(bert, device="cpu")
    assert scorer.judge(pairs(texts)) == pytest.approx(expected.tolist(), abs=1e-6)


@pytest.mark.parametrize("token_budget", [1, 100, 10000])
def test_a_batch_moves_no_score(bert, token_budget):
    texts = [document for document in DOCUMENTS if document] * 3
    scorer = load_scorer(bert, device="cpu", token_budget=token_budget)
    alone = [scorer.judge([pair])[0] for pair in pairs(texts)]
    assert scorer.judge(pairs(texts)) == pytest.approx(alone, abs=1e-6)


def test_no_plans_are_built_for_the_shapes_of_batches(bert, monkeypatch):
    entered = spy_on_planless(monkeypatch, cross_encoder)
    load_scorer(bert).judge(pairs())
    assert entered == ["cpu"]


def test_a_model_saved_by_sentence_transformers_with_another_activation(bert, tmp_path):
    """MiniLM's rerankers give logits: the score is their sigmoid, the order is the same."""
    model = st.CrossEncoder(str(bert), device="cpu", activation_fn=torch.nn.Identity())
    model.save_pretrained(str(tmp_path / "saved"))
    texts = [document for document in DOCUMENTS if document]
    logits = model.predict([(QUERY, text) for text in texts])
    expected = 1 / (1 + np.exp(-logits))
    scorer = load_scorer(tmp_path / "saved", device="cpu")
    assert scorer.judge(pairs(texts)) == pytest.approx(expected.tolist(), abs=1e-6)


def reference(folder, prompt, max_length=None):
    """Probability of yes against no after a literal prompt, by transformers alone."""
    model = Qwen3ForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
    if max_length is not None and ids.shape[1] > max_length:
        ending = tokenizer(prompt[prompt.rindex("<|im_end|>\n<|im_start|>assistant") :])
        end = torch.tensor([ending["input_ids"]])
        ids = torch.cat([ids[:, : max_length - end.shape[1]], end], dim=1)
    with torch.inference_mode():
        logits = model(ids).logits[0, -1]
    yes, no = tokenizer.convert_tokens_to_ids(["yes", "no"])
    return float(torch.sigmoid(logits[yes] - logits[no]))


@pytest.mark.parametrize("task", [None, "Find the page about wind."])
def test_qwen3_reranker_is_asked_as_published(qwen3, task):
    texts = [document for document in DOCUMENTS if document]
    expected = [
        reference(qwen3, QWEN3_PROMPT.format(task=task or WEB_SEARCH, query=QUERY, document=text))
        for text in texts
    ]
    assert np.ptp(expected) > 0.05
    scorer = load_scorer(qwen3, device="cpu")
    assert scorer.judge(pairs(texts), task) == pytest.approx(expected, abs=1e-5)


def test_the_end_of_the_prompt_outlives_a_long_document(qwen3):
    document = "wind " * 400
    prompt = QWEN3_PROMPT.format(task=WEB_SEARCH, query=QUERY, document=document)
    scorer = load_scorer(qwen3, device="cpu", max_length=420)
    (score,) = scorer.judge(pairs([document]))
    assert score == pytest.approx(reference(qwen3, prompt, max_length=420), abs=1e-5)


def test_an_instruction_of_the_query_goes_before_that_of_the_call(qwen3):
    scorer = load_scorer(qwen3, device="cpu")
    own = [(Content(QUERY, instruction="Find wind."), Content("wind"))]
    mixed = scorer.judge([*own, *pairs(["wind"])], "Find light.")
    assert mixed == pytest.approx(
        [scorer.judge(pairs(["wind"]), task)[0] for task in ("Find wind.", "Find light.")]
    )
    assert mixed[0] != pytest.approx(mixed[1], abs=1e-6)


def test_a_language_model_that_does_not_say_how_it_is_asked_is_refused(tmp_path):
    folder = save_qwen3(tmp_path / "some-chat-model")
    with pytest.raises(ModelError, match=r"how it is shown a pair.*CrossEncoder"):
        load_scorer(folder, device="cpu")


def test_a_head_that_is_not_in_the_file_is_refused(bert, tmp_path):
    model = st.CrossEncoder(str(bert), device="cpu").model
    model.bert.save_pretrained(tmp_path / "headless")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "headless" / name).write_bytes((bert / name).read_bytes())
    with pytest.raises(ModelError, match=r"not in the file: classifier\.bias"):
        load_scorer(tmp_path / "headless", kind="cross_encoder", device="cpu")


def test_what_a_cross_encoder_does_not_take_is_said(bert, tmp_path):
    with pytest.raises(ConfigError, match="classifier of 3 labels"):
        load_scorer(save_bert(tmp_path / "three", labels=3), device="cpu")
    with pytest.raises(ConfigError, match="leave out prompt"):
        load_scorer(bert, device="cpu", prompt="answer")
    with pytest.raises(ConfigError, match="max_image_tokens: unknown to this reranker"):
        load_scorer(bert, device="cpu", max_image_tokens=64)


def test_what_has_no_text_fails_alone_and_says_what_helps(bert):
    image = Image.new("RGB", (40, 30))
    given = [
        *pairs(["wind"]),
        (Content(QUERY), Content(image=image)),
        (Content(QUERY), Content("wind", image)),
        (Content(image=image), Content("wind")),
    ]
    text, unseen, both, unasked = load_scorer(bert, device="cpu").judge(given)
    assert both == pytest.approx(text)  # the image beside it is left out
    assert isinstance(unseen, ContentError) and "one that sees images" in str(unseen)
    assert isinstance(unasked, ContentError) and "query has no text" in str(unasked)


def test_a_cascade_lets_the_text_model_choose_what_the_next_one_sees(bert, tmp_path, caplog):
    """A page without text keeps its place in the first stage, and is judged in the second."""

    class Seeing:
        name = "seeing"

        def judge(self, pairs, instruction=None):
            self.seen = [document.text for _, document in pairs]
            return [0.9 if document.text is None else 0.1 for _, document in pairs]

    nodes = [make_node(text, page=n) for n, text in enumerate(DOCUMENTS[:3])]
    nodes.insert(1, make_node("", image=make_image(tmp_path / "scan.png"), page=9))
    hits = [NodeWithScore(node=node, score=1 / n) for n, node in enumerate(nodes, 1)]
    first, second = MLLMReranker(bert, top_n=3, device="cpu"), MLLMReranker(scorer=Seeing())
    with caplog.at_level(logging.WARNING):
        kept = first.postprocess_nodes(hits, query_str=QUERY)
    assert kept[1].node is nodes[1] and "no text to judge" in kept[1].rerank_error
    assert "could not judge 1 of 4 hits" in caplog.text
    ranked = second.postprocess_nodes(kept, query_str=QUERY)
    assert ranked[0].node is nodes[1] and ranked[0].rerank_error is None
    assert len(second.scorer.seen) == 3
