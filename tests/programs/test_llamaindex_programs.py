"""Small programs in the style of LlamaIndex's docs, over a collection of mixed nodes.

Each asserts what its user would see. All run offline, with a model that says what it is told.
"""

import asyncio
import json
import pickle

import pymupdf
import pytest
from fakes import FakeEmbedder, Scripted, make_image
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from fastapi.testclient import TestClient
from llama_index.core import Settings
from llama_index.core.agent.workflow import ReActAgent
from llama_index.core.bridge.pydantic import Field
from llama_index.core.chat_engine import CondensePlusContextChatEngine
from llama_index.core.evaluation import FaithfulnessEvaluator, RetrieverEvaluator
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.llms import MockLLM
from llama_index.core.memory import Memory
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.postprocessor import (
    LLMRerank,
    LongContextReorder,
    MetadataReplacementPostProcessor,
    SimilarityPostprocessor,
)
from llama_index.core.query_engine import (
    CitationQueryEngine,
    RetrieverQueryEngine,
    RouterQueryEngine,
    SubQuestionQueryEngine,
)
from llama_index.core.question_gen import LLMQuestionGenerator
from llama_index.core.retrievers import QueryFusionRetriever
from llama_index.core.schema import Document, ImageNode, MediaResource, Node, QueryBundle, TextNode
from llama_index.core.selectors import LLMSingleSelector
from llama_index.core.tools import QueryEngineTool
from llama_index.core.vector_stores.types import MetadataFilter, MetadataFilters
from llama_index_instrumentation import get_dispatcher
from llama_index_instrumentation.event_handlers import BaseEventHandler

from mmrag.embedding import UniversalEmbedding
from mmrag.index import UniversalIndex

EYES = "The gold plan covers one eye exam in two years."
TEETH = "The silver plan covers two dental cleanings a year."
BUDGET = "The board set the travel budget to nine thousand euros."
WIND = "The turbine hall was built in 1931 beside the river."
QUESTION = "Which plan covers an eye exam?"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A collection of pages that were read, and a text, an image and a page that were inserted."""
    folder = tmp_path_factory.mktemp("programs")
    with pymupdf.open() as document:
        for text in (EYES, TEETH):
            document.new_page().insert_textbox((72, 72, 500, 200), text)
        document.save(folder / "plans.pdf")
    image = make_image(folder / "hall.png", "blue")
    with UniversalIndex(folder / "library", FakeEmbedder()) as index:
        index.add(folder / "plans.pdf", metadata={"team": "benefits"})
        index.insert_nodes(
            [
                TextNode(id_="budget", text=BUDGET, metadata={"title": "Minutes", "team": "board"}),
                ImageNode(id_="photo", image_path=str(image), metadata={"file": "hall.png"}),
                Node(
                    id_="hall",
                    text_resource=MediaResource(text=WIND),
                    image_resource=MediaResource(path=image),
                    metadata={"file": "history.pdf", "page": 4},
                ),
            ]
        )
    return folder / "library"


@pytest.fixture
def index(place, monkeypatch):
    monkeypatch.setattr(Settings, "_llm", MockLLM())
    with UniversalIndex(place, FakeEmbedder()) as index:
        yield index


def tool(engine, name, description="answers"):
    return QueryEngineTool.from_defaults(engine, name=name, description=description)


def test_fusion_keeps_every_page_once(index):
    """Pages are told apart by their hash, which no score or rank of a query may change."""
    words = index.as_retriever(weights={"image": 0, "text": 0}, similarity_top_k=4)
    meaning = index.as_retriever(weights={"bm25": 0}, similarity_top_k=4)
    fusion = QueryFusionRetriever(
        [words, meaning],
        llm=MockLLM(),
        num_queries=1,
        mode="reciprocal_rerank",
        similarity_top_k=9,
        use_async=False,
    )
    hits = fusion.retrieve(QUESTION)
    alone = [retriever.retrieve(QUESTION) for retriever in (words, meaning)]
    expected = {hit.node.node_id for found in alone for hit in found}
    assert sorted(hit.node.node_id for hit in hits) == sorted(expected)
    assert hits[0].text.strip() == EYES
    assert hits[0].score == pytest.approx(2 / 60)  # the first of both
    hashes = [{hit.node.node_id: hit.node.hash for hit in found} for found in alone]
    both = hashes[0].keys() & hashes[1].keys()
    assert both and all(hashes[0][id_] == hashes[1][id_] for id_ in both)


def test_a_router_chooses_an_engine(index):
    def engine(team, reply):
        filters = MetadataFilters(filters=[MetadataFilter(key="team", value=team)])
        return index.as_query_engine(Scripted([reply]), filters=filters)

    router = RouterQueryEngine(
        selector=LLMSingleSelector.from_defaults(Scripted(['[{"choice": 2, "reason": "money"}]'])),
        query_engine_tools=[
            tool(engine("benefits", "From the plans [1]."), "plans", "health plans"),
            tool(engine("board", "Nine thousand euros [1]."), "board", "the board's decisions"),
        ],
    )
    response = router.query("How much may we spend on travel?")
    assert str(response) == "Nine thousand euros [1]."
    assert [hit.node.node_id for hit in response.source_nodes] == ["budget"]


def test_sub_questions_are_answered_from_pages(index):
    asked = ("What covers the eyes?", "What covers the teeth?")
    items = [{"sub_question": question, "tool_name": "documents"} for question in asked]
    plan = f"```json\n{json.dumps({'items': items})}\n```"
    answers = Scripted(["The gold plan [1].", "The silver plan [1]."])
    engine = SubQuestionQueryEngine.from_defaults(
        query_engine_tools=[tool(index.as_query_engine(answers), "documents")],
        question_gen=LLMQuestionGenerator.from_defaults(llm=Scripted([plan])),
        llm=Scripted(["Gold for eyes, silver for teeth."]),
        use_async=False,
        verbose=False,
    )
    response = engine.query("What covers eyes, and what teeth?")
    assert str(response) == "Gold for eyes, silver for teeth."
    told = " ".join(hit.text for hit in response.source_nodes)
    assert "The gold plan [1]." in told and TEETH in told


async def test_an_agent_uses_the_documents(index):
    thoughts = [
        'Thought: I look it up.\nAction: documents\nAction Input: {"input": "eye exam"}',
        "Thought: I can answer without using any more tools.\nAnswer: The gold plan.",
    ]
    documents = tool(index.as_query_engine(Scripted(["The gold plan [1]."])), "documents")
    agent = ReActAgent(tools=[documents], llm=Scripted(thoughts), streaming=False)
    result = await agent.run(QUESTION)
    assert result.response.content == "The gold plan."
    (call,) = result.tool_calls
    assert call.tool_output.content == "The gold plan [1]."
    assert call.tool_output.raw_output.sources[0].place.endswith("plans.pdf, page 1")


def test_the_citation_engine_of_llamaindex(index):
    llm = Scripted(["The gold plan [1]."])
    retriever = index.as_retriever(similarity_top_k=2)
    engine = CitationQueryEngine.from_args(None, llm=llm, retriever=retriever)
    response = engine.query(QUESTION)
    assert str(response) == "The gold plan [1]."
    assert response.source_nodes[0].text.startswith("Source 1:\n")
    assert EYES in response.source_nodes[0].text
    assert response.source_nodes[0].node.metadata["page"] == 1


def test_a_chat_remembers(index):
    llm = Scripted(["The gold plan [1].", "What about the teeth?", "The silver plan [1]."])
    memory = Memory.from_defaults(token_limit=4000)
    chat = index.as_chat_engine(llm=llm, memory=memory, similarity_top_k=1)
    assert str(chat.chat(QUESTION)) == "The gold plan [1]."
    turn = chat.chat("And the teeth?")
    assert turn.question == "What about the teeth?"
    assert turn.cited.sources[0].page == 2
    assert [message.content for message in memory.get_all()][::2] == [QUESTION, "And the teeth?"]
    chat.reset()
    assert chat.chat_history == []


def test_a_chat_engine_of_llamaindex_over_the_retriever(index):
    llm = Scripted(["Gold."])
    chat = CondensePlusContextChatEngine.from_defaults(
        index.as_retriever(similarity_top_k=1), llm=llm
    )
    response = chat.chat(QUESTION)
    assert str(response) == "Gold." and EYES in llm.asked[-1]
    assert [hit.text.strip() for hit in response.source_nodes] == [EYES]


def test_evaluators(index):
    retriever = index.as_retriever(similarity_top_k=3)
    right = retriever.retrieve(QUESTION)[0].node.node_id
    evaluator = RetrieverEvaluator.from_metric_names(["hit_rate", "mrr"], retriever=retriever)
    result = evaluator.evaluate(QUESTION, [right])
    assert result.metric_vals_dict == {"hit_rate": 1.0, "mrr": 1.0}
    assert EYES in result.retrieved_texts[0]
    assert evaluator.evaluate(QUESTION, ["another"]).metric_vals_dict["hit_rate"] == 0
    response = index.as_query_engine(Scripted(["The gold plan [1]."])).query(QUESTION)
    judge = FaithfulnessEvaluator(llm=Scripted(["YES"]))
    assert judge.evaluate_response(response=response).passing


def test_fastapi_streams_an_answer(index):
    app = FastAPI()
    engine = index.as_query_engine(Scripted(["The gold plan [1]."]), streaming=True)

    @app.get("/ask")
    async def ask(question: str):
        response = await engine.aquery(question)
        return StreamingResponse(response.async_response_gen(), media_type="text/plain")

    with TestClient(app).stream("GET", "/ask", params={"question": QUESTION}) as reply:
        assert "".join(reply.iter_text()) == "The gold plan [1]."


def test_what_is_stored_is_there_again(place):
    found = []
    for _ in range(2):
        with UniversalIndex(place, FakeEmbedder()) as index:
            hits = index.as_retriever(similarity_top_k=9).retrieve("turbine budget eye")
            found.append([(hit.node.node_id, hit.node.hash, hit.score) for hit in hits])
            names = {entry.path.name for entry in index.files()}
    assert found[0] == found[1] and len(found[0]) == 5
    assert names == {"plans.pdf", "Minutes", "hall.png", "history.pdf"}


def test_pickles(index):
    hits = index.as_retriever().retrieve(QUESTION)
    response = index.as_query_engine(Scripted(["The gold plan [1]."])).query(QUESTION)
    model = UniversalEmbedding(embedder=FakeEmbedder())
    again, answer, twin = pickle.loads(pickle.dumps((hits, response, model)))
    assert [(hit.text, hit.ranks) for hit in again] == [(hit.text, hit.ranks) for hit in hits]
    assert str(answer) == str(response) and answer.sources[0].place == response.sources[0].place
    assert twin.get_query_embedding("eyes") == model.get_query_embedding("eyes")


def test_an_ingestion_pipeline_feeds_the_index(tmp_path):
    splitter = SentenceSplitter(chunk_size=64, chunk_overlap=0)
    text = " ".join(f"Rule {n} is about travel." for n in range(40))
    documents = [Document(id_="rules", text=text, metadata={"file_name": "rules.md", "page": 2})]
    with UniversalIndex(tmp_path / "library", FakeEmbedder()) as index:
        index.insert_nodes(IngestionPipeline(transformations=[splitter]).run(documents=documents))
        (entry,) = index.files()
        assert (entry.file, entry.doc_id) == ("rules.md", "rules") and entry.nodes > 3
        response = index.as_query_engine(Scripted(["Rule 7 [1]."])).query("What is Rule 7 about?")
        assert response.sources[0].place == "rules.md, page 2"
        index.delete_ref_doc("rules")
        assert index.files() == []


def test_postprocessors_read_the_text(index):
    hits = index.as_retriever(similarity_top_k=5).retrieve(QUESTION)
    query = QueryBundle(QUESTION)
    assert all(isinstance(hit.text, str) for hit in hits)
    kept = SimilarityPostprocessor(similarity_cutoff=hits[0].score).postprocess_nodes(hits)
    assert [hit.text.strip() for hit in kept] == [EYES]
    assert len(LongContextReorder().postprocess_nodes(hits)) == len(hits)
    rerank = LLMRerank(llm=Scripted(["Doc: 2, Relevance: 9\nDoc: 1, Relevance: 3"]), top_n=2)
    ranked = rerank.postprocess_nodes(hits, query)
    assert [hit.node.node_id for hit in ranked] == [hits[1].node.node_id, hits[0].node.node_id]
    titles = MetadataReplacementPostProcessor(target_metadata_key="title")
    only_text = [hit for hit in hits if hit.node.node_id == "budget"]
    assert [hit.text for hit in titles.postprocess_nodes(only_text)] == ["Minutes"]


def test_an_engine_of_llamaindex_over_the_retriever(index):
    engine = RetrieverQueryEngine.from_args(index.as_retriever(similarity_top_k=1))
    response = asyncio.run(engine.aquery(QUESTION))
    assert EYES in str(response)  # MockLLM repeats its prompt
    assert response.source_nodes[0].node.metadata["team"] == "benefits"


def test_embedding_events_reach_tracing(tmp_path):
    class Seen(BaseEventHandler):
        names: list[str] = Field(default_factory=list)

        def handle(self, event, **_):
            self.names.append(event.class_name())

    handler = Seen()
    root = get_dispatcher()
    root.add_event_handler(handler)
    try:
        with UniversalIndex(tmp_path / "library", FakeEmbedder()) as index:
            index.insert_nodes([TextNode(text="words")])
            stored = list(handler.names)
            index.as_retriever().retrieve("words")
    finally:
        root.event_handlers.remove(handler)
    assert stored == ["EmbeddingStartEvent", "EmbeddingEndEvent"]
    searched = handler.names[len(stored) :]
    assert searched.count("EmbeddingStartEvent") == searched.count("EmbeddingEndEvent") == 1
    assert searched[0] == "RetrievalStartEvent" and searched[-1] == "RetrievalEndEvent"
