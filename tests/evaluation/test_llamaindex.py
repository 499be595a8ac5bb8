"""LlamaIndex's evaluators run over our retriever and engines, and agree with our metrics."""

import pytest
from chat_server import ChatServer
from fakes import make_image, make_node
from llama_index.core.evaluation import (
    AnswerRelevancyEvaluator,
    BatchEvalRunner,
    ContextRelevancyEvaluator,
    CorrectnessEvaluator,
    FaithfulnessEvaluator,
    MultiModalRetrieverEvaluator,
    RelevancyEvaluator,
    RetrieverEvaluator,
)
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import NodeWithScore

from mmrag.evaluation.llamaindex import PageRetriever
from mmrag.evaluation.questions import page_id
from mmrag.evaluation.results import System
from mmrag.evaluation.run import evaluate
from mmrag.llms.endpoint import open_llm
from mmrag.rerankers.postprocessor import MLLMReranker

METRICS = {"hit_rate": "hit@10", "mrr": "mrr@10", "recall": "recall@10", "ndcg": "ndcg@10"}


class Plain(BaseNodePostprocessor):
    """Makes results of its own, as rerankers of other packages do."""

    def _postprocess_nodes(self, nodes, query_bundle=None):
        return [NodeWithScore(node=hit.node, score=hit.score) for hit in nodes]


class Always:
    name = "always"

    def judge(self, pairs, instruction=None):
        return [0.5 for _ in pairs]


@pytest.mark.parametrize("post", [None, [Plain()], [MLLMReranker(scorer=Always(), top_n=10)]])
def test_the_retriever_evaluator_agrees_with_our_metrics(library, questions, post):
    retriever = PageRetriever(library.as_retriever(similarity_top_k=10))
    evaluator = RetrieverEvaluator.from_metric_names(
        [*METRICS], retriever=retriever, node_postprocessors=post
    )
    ours = evaluate(library, questions, scopes=("corpus",))
    for question in questions:
        expected = [page_id(page) for page in question.pages]
        theirs = evaluator.evaluate(question.text, expected_ids=expected).metric_vals_dict
        metrics = ours.metrics(System("fake", "fusion"), question)
        for name, our_name in METRICS.items():
            assert theirs[name] == pytest.approx(metrics[our_name], abs=1e-6), name


async def test_it_runs_where_an_event_loop_runs(library, questions):
    retriever = PageRetriever(library.as_retriever(similarity_top_k=10))
    evaluator = RetrieverEvaluator.from_metric_names(["hit_rate"], retriever=retriever)
    result = await evaluator.aevaluate(questions[0].text, expected_ids=["a.pdf#1"])
    assert result.metric_vals_dict == {"hit_rate": 1.0}


def test_results_of_the_plain_retriever_have_text_and_ids(library, questions):
    """As they are, nodes stand for pages by their own ids."""
    retriever = library.as_retriever(similarity_top_k=10)
    (first, *_) = retriever.retrieve(questions[0].text)
    evaluator = RetrieverEvaluator.from_metric_names(["mrr"], retriever=retriever)
    result = evaluator.evaluate(questions[0].text, expected_ids=[first.node.node_id])
    assert result.metric_vals_dict == {"mrr": 1.0}
    assert result.retrieved_texts[0] == first.text


def test_pages_are_seen_by_the_multimodal_evaluator(library, questions, tmp_path):
    pictured = make_node(
        "apple chart", file="a.pdf", page=1, kind="figure", image=make_image(tmp_path / "i.png")
    )
    library.collection.write([pictured], [{"text": library.embedder.encode(["apple chart"])[0]}])
    retriever = PageRetriever(library.as_retriever(similarity_top_k=10))
    evaluator = MultiModalRetrieverEvaluator.from_metric_names(["hit_rate"], retriever=retriever)
    result = evaluator.evaluate("apple chart", expected_ids=["a.pdf#1"])
    assert result.metric_vals_dict == {"hit_rate": 1.0}
    assert len(set(result.retrieved_ids)) == len(result.retrieved_ids)


@pytest.fixture
def chat():
    server = ChatServer("YES", models=[{"id": "judge", "max_model_len": 20_000}])
    yield server
    server.close()


def test_response_evaluators_are_given_the_answer_and_its_sources(library, questions, chat):
    engine, judge = library.as_query_engine(), open_llm("judge", chat.url)
    question = questions[0].text
    answer = engine.query(question)
    contexts = [source.node.get_content() for source in answer.source_nodes]
    assert contexts
    for kind in (FaithfulnessEvaluator, RelevancyEvaluator):
        result = kind(llm=judge).evaluate_response(query=question, response=answer)
        assert result.passing
        assert result.response == str(answer)
        assert result.contexts == contexts
    chat.answer = "5.0\nIt says the same."
    result = CorrectnessEvaluator(llm=judge).evaluate_response(
        query=question, response=answer, reference="apple report"
    )
    assert (result.passing, result.score) == (True, 5.0)
    for kind, reply in (
        (AnswerRelevancyEvaluator, "Both are so.\n\n[RESULT] 2"),
        (ContextRelevancyEvaluator, "They are.\n\n[RESULT] 4"),
    ):
        chat.answer = reply
        result = kind(llm=judge).evaluate_response(query=question, response=answer)
        assert result.score == 1.0


async def test_a_batch_of_questions_is_asked_and_judged(library, questions, chat):
    judge = open_llm("judge", chat.url)
    runner = BatchEvalRunner({"faithful": FaithfulnessEvaluator(llm=judge)}, workers=2)
    asked = [question.text for question in questions[:3]]
    results = await runner.aevaluate_queries(library.as_query_engine(), asked)
    assert [result.passing for result in results["faithful"]] == [True] * 3
