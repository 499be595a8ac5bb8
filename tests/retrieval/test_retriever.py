import asyncio
import dataclasses
import threading
import time

import numpy as np
import pytest
from fakes import FakeEmbedder, make_image, make_node
from llama_index.core.callbacks import CallbackManager, LlamaDebugHandler
from llama_index.core.callbacks.schema import CBEventType
from llama_index.core.evaluation import RetrieverEvaluator
from llama_index.core.llms import MockLLM
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.retrievers import QueryFusionRetriever
from llama_index.core.schema import QueryBundle
from llama_index.core.vector_stores.types import (
    FilterCondition,
    FilterOperator,
    MetadataFilter,
    MetadataFilters,
)
from PIL import Image

from mmrag.embedders import Calibration
from mmrag.errors import ConfigError
from mmrag.queries import Where
from mmrag.rerankers.postprocessor import MLLMReranker
from mmrag.retrieval.fusion import DEFAULT_WEIGHTS, PAGE_FIELDS, ZEROS, fuse, page_key, scaled
from mmrag.retrieval.retriever import UniversalRetriever
from mmrag.store.collection import Collection, CollectionSettings
from mmrag.store.engine import Scored

TEXTS = {
    ("plans.pdf", 1): "vision exams are covered by the gold plan",
    ("plans.pdf", 2): "dental cleaning is covered twice a year",
    ("plans.pdf", 3): "the deductible of the silver plan is high",
    ("report.pdf", 1): "revenue grew in the northern region",
    ("report.pdf", 2): "the boiler exploded near the harbour",
}
COLOURS = ("red", "green", "blue", "yellow", "purple")


@pytest.fixture(scope="module")
def embedder():
    return FakeEmbedder(dim=64)


@pytest.fixture(scope="module")
def collection(embedder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("library")
    settings = CollectionSettings(
        embedder.name, embedder.fingerprint, embedder.dim, views=("image", "text")
    )
    with Collection.open(folder / "c", settings=settings) as opened:
        nodes, vectors = [], []
        for ((file, page), text), colour in zip(TEXTS.items(), COLOURS, strict=True):
            image = make_image(folder / f"{colour}.png", colour)
            sha = ("1" if file == "plans.pdf" else "2") * 64
            page_node = make_node(text, file=file, page=page, sha256=sha, image=image)
            passage = make_node(text, file=file, page=page, sha256=sha, kind="passage")
            nodes += [page_node, passage]
            seen, read = embedder.encode([{"image": image}, {"text": text}])
            vectors += [{"image": seen, "text": read}, {"text": read}]
        note = make_node(
            "plain notes on the vision of the founder",
            file="n.txt",
            page=None,
            kind="text",
            sha256="3" * 64,
            topic="history",
        )
        nodes.append(note)
        vectors.append({"text": embedder.encode([note.text])[0]})
        opened.write(nodes, vectors)
        yield opened


@pytest.fixture
def retriever(collection, embedder):
    return UniversalRetriever(collection, embedder, similarity_top_k=3)


def place(hit):
    return hit.node.metadata["file"], hit.node.metadata.get("page")


def test_a_text_finds_its_page_once_though_two_nodes_of_it_match(retriever):
    hits = retriever.retrieve("dental cleaning")
    assert place(hits[0]) == ("plans.pdf", 2)
    assert len({place(hit) for hit in hits}) == len(hits) == 3
    ranks = hits[0].ranks
    assert ranks["text"] == ranks["bm25"] == 1
    assert hits[0].score == hits[0].retrieval_score <= 1
    assert hits[0].view_scores["text"] == pytest.approx(0.7, abs=0.3)


def test_all_nodes_of_a_page_are_its_evidence(retriever):
    (hit, *_) = retriever.search("dental cleaning")
    assert [node.kind for node in hit.evidence] in (["page", "passage"], ["passage", "page"])
    assert hit.node_id in {node.node_id for node in hit.evidence}
    assert hit.explanation is None


def test_an_explanation_adds_up_to_the_score(collection, embedder):
    retriever = UniversalRetriever(collection, embedder, 3, explain=True)
    for hit in retriever.search("dental cleaning"):
        assert {name: part.rank for name, part in hit.explanation.items()} == hit.ranks
        assert {name: part.score for name, part in hit.explanation.items()} == hit.view_scores
        assert sum(part.credit for part in hit.explanation.values()) == pytest.approx(hit.score)


def test_weights_come_from_the_user_the_collection_and_the_embedder(tmp_path, embedder):
    settings = CollectionSettings(embedder.name, embedder.fingerprint, 64, views=("text",))
    with Collection.open(tmp_path / "c", settings=settings) as library:
        assert UniversalRetriever(library, embedder).weights == DEFAULT_WEIGHTS
        measured = FakeEmbedder(dim=64)
        measured.calibration = Calibration({"bm25": 7.0, "text": 2.0}, {"text": 0.2})
        retriever = UniversalRetriever(library, measured)
        found = retriever.weights
        assert (found["bm25"], found["text"], found["image"]) == (7, 2, 1)
        assert retriever.zeros == {"bm25": 0, "reference": 0, "text": 0.2}
        library.save_weights({"bm25": 5.0})
        assert UniversalRetriever(library, measured).weights["bm25"] == 5
        assert UniversalRetriever(library, measured).weights["text"] == 2
        assert UniversalRetriever(library, measured, weights={"bm25": 4}).weights["bm25"] == 4
    with Collection.open(tmp_path / "c") as library:
        assert library.weights == {"bm25": 5.0}
        library.save_weights({})
        assert library.weights == {}


def test_ranks_can_be_fused_in_place_of_scores(collection, embedder):
    by_ranks = UniversalRetriever(collection, embedder, 3, fuse_by="ranks")
    rankings = by_ranks.rankings("dental cleaning")
    expected = [entry.score for entry in fuse(rankings, by_ranks.weights, by="ranks")[:3]]
    assert [hit.score for hit in by_ranks.search("dental cleaning")] == expected


def test_scores_fall_and_say_first_everywhere_by_one(collection, embedder):
    words_only = UniversalRetriever(collection, embedder, 5, weights={"image": 0})
    hits = words_only.retrieve("boiler exploded near harbour")
    assert hits[0].score == pytest.approx(1.0)
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)


def test_nodes_come_back_as_they_were_stored(retriever, collection):
    one, other = (retriever.retrieve(query) for query in ("dental cleaning", "the gold plan"))
    ids = {hit.node_id: hit.node.hash for hit in one}
    both = [hit for hit in other if hit.node_id in ids]
    assert both
    assert all(hit.node.hash == ids[hit.node_id] for hit in both)
    assert set(one[0].metadata) == {"file", "file_path", "sha256", "page", "kind"}


def test_fusion_of_queries_by_llama_index_counts_a_page_once(collection, embedder):
    """A page found for two queries is one result, with the credit of both."""
    retrievers = [
        UniversalRetriever(collection, embedder, 5, weights=weights)
        for weights in ({"image": 0}, {"image": 0, "bm25": 0})
    ]
    fusion = QueryFusionRetriever(
        retrievers, llm=MockLLM(), num_queries=1, similarity_top_k=5, mode="reciprocal_rerank"
    )
    hits = fusion.retrieve("dental cleaning is covered")
    assert len({place(hit) for hit in hits}) == len(hits) == 5
    assert place(hits[0]) == ("plans.pdf", 2)
    assert hits[0].score == pytest.approx(2 / 60)


def test_llama_index_evaluates_retrieval_of_mixed_nodes(collection, embedder):
    retriever = UniversalRetriever(collection, embedder, 5, collapse=False)
    hits = retriever.retrieve("dental cleaning")
    assert {type(hit.node).__name__ for hit in hits} == {"Node", "TextNode"}
    assert all(hit.text == hit.get_text() != "" for hit in hits)
    evaluator = RetrieverEvaluator.from_metric_names(
        ["hit_rate", "mrr"],
        retriever=retriever,
        node_postprocessors=[MLLMReranker(scorer=Even(), top_n=None)],
    )
    found = evaluator.evaluate("dental cleaning", expected_ids=[hits[0].node_id])
    assert found.metric_vals_dict == {"hit_rate": 1.0, "mrr": 1.0}
    assert found.retrieved_texts[0] == TEXTS["plans.pdf", 2]


class Even:
    """A scorer to which all documents are equal, so that their order stays."""

    name = "even"

    def judge(self, pairs, instruction=None):
        return [0.5] * len(pairs)


def test_without_collapse_every_node_stands_for_itself(collection, embedder):
    loose = UniversalRetriever(collection, embedder, 4, collapse=False)
    places = [place(hit) for hit in loose.retrieve("dental cleaning")]
    assert places[:2] == [("plans.pdf", 2)] * 2


@pytest.fixture
def looker(collection, embedder):
    """Looks at images only: the fake embedder ranks texts by chance for an image."""
    return UniversalRetriever(collection, embedder, 3, weights={"text": 0})


def test_an_image_finds_the_page_that_shows_it_and_skips_bm25(looker):
    hits = looker.search(image=Image.new("RGB", (8, 8), "blue"))
    assert place(hits[0]) == ("plans.pdf", 3)
    assert hits[0].ranks == {"image": 1}


def test_an_image_file_in_the_bundle_is_used(looker, tmp_path):
    path = make_image(tmp_path / "q.png", "yellow")
    hits = looker.retrieve(QueryBundle("", image_path=str(path)))
    assert place(hits[0]) == ("report.pdf", 1)


def test_text_and_image_together_are_one_query(retriever, embedder, tmp_path):
    embedder.calls.clear()
    hits = retriever.search("revenue grew", make_image(tmp_path / "q.png", "yellow"))
    (call,) = embedder.calls
    assert [content.modality for content in call] == ["fused"]
    assert place(hits[0]) == ("report.pdf", 1)
    assert set(hits[0].ranks) == {"image", "text", "bm25"}


def test_an_image_for_an_embedder_of_texts_is_a_clear_error(collection):
    reader = FakeEmbedder(dim=64, modalities=("text",))
    with pytest.raises(ConfigError, match="cannot embed a query of kind 'image'"):
        UniversalRetriever(collection, reader).search(image=Image.new("RGB", (4, 4)))


@pytest.mark.parametrize("query", ["", "  \n"])
def test_an_empty_query_is_refused(retriever, query):
    with pytest.raises(ConfigError, match="empty"):
        retriever.retrieve(query)


def test_the_instruction_fits_the_query(collection, tmp_path):
    class Spy(FakeEmbedder):
        def encode(self, contents, instruction=None, dim=None, progress=False):
            self.instruction = instruction
            return super().encode(contents, instruction, dim, progress)

    spy = Spy(dim=64)
    image = make_image(tmp_path / "q.png")
    UniversalRetriever(collection, spy).search("a")
    assert spy.instruction == "page_for_question"
    UniversalRetriever(collection, spy).search(image=image)
    assert spy.instruction == "page_for_image"
    UniversalRetriever(collection, spy, instruction="Find it.").search("a", image)
    assert spy.instruction == "Find it."


def test_several_strings_to_embed_are_averaged(collection, embedder):
    dense = UniversalRetriever(collection, embedder, 2, weights={"bm25": 0, "image": 0})
    texts = [TEXTS["plans.pdf", 2], TEXTS["report.pdf", 1]]
    bundle = QueryBundle("anything", custom_embedding_strs=texts)
    assert {place(hit) for hit in dense.retrieve(bundle)} == {("plans.pdf", 2), ("report.pdf", 1)}


def test_rankings_of_no_weight_are_not_asked_for(collection, embedder):
    for weights, names in (
        ({"bm25": 0}, {"image", "text"}),
        ({"image": 0, "text": 0}, {"bm25"}),
    ):
        retriever = UniversalRetriever(collection, embedder, 2, weights=weights)
        assert set(retriever.rankings("dental cleaning")) == names


def test_a_given_embedding_is_used_as_it_is(collection, embedder):
    dense = UniversalRetriever(collection, embedder, 1, weights={"bm25": 0, "image": 0})
    vector = embedder.encode([TEXTS["report.pdf", 2]])[0].tolist()
    embedder.calls.clear()
    (hit,) = dense.retrieve(QueryBundle("other words", embedding=vector))
    assert place(hit) == ("report.pdf", 2)
    assert not embedder.calls


def test_filters_narrow_the_search(collection, embedder):
    everywhere = UniversalRetriever(collection, embedder, 10)
    only = UniversalRetriever(collection, embedder, 10, where=Where(files=("report.pdf",)))
    assert {place(hit)[0] for hit in only.retrieve("vision plan")} == {"report.pdf"}
    pages = everywhere.search("vision plan", where=Where(pages=(2, 3)))
    assert {place(hit)[1] for hit in pages} == {2, 3}
    assert place(everywhere.search("vision", where=Where(kinds=("text",)))[0]) == ("n.txt", None)
    # A filter of one query takes the place of the retriever's own.
    assert place(only.search("dental", where=Where(files=("plans.pdf",)))[0]) == ("plans.pdf", 2)


def test_llama_index_filters_reach_the_collection(collection, embedder):
    filters = MetadataFilters(filters=[MetadataFilter(key="topic", value="history")])
    found = UniversalRetriever(collection, embedder, where=filters).retrieve("vision")
    assert [place(hit) for hit in found] == [("n.txt", None)]


def test_llama_index_filters_and_a_where_hold_together(collection, embedder):
    operators = {"file": ("*.pdf", FilterOperator.NE), "page": (2, FilterOperator.GTE)}
    either = MetadataFilters(
        filters=[MetadataFilter(key=k, value=v, operator=op) for k, (v, op) in operators.items()],
        condition=FilterCondition.OR,
    )
    retriever = UniversalRetriever(
        collection, embedder, 10, where=Where(kinds=("page", "text")), filters=either
    )
    places = {place(hit) for hit in retriever.retrieve("vision plan dental")}
    assert places == {("n.txt", None), ("report.pdf", 2), ("plans.pdf", 2), ("plans.pdf", 3)}


@pytest.mark.parametrize(
    "weights", [{"words": 1}, {"text": -1}, {"text": 0, "image": 0, "bm25": 0}]
)
def test_useless_weights_are_refused(collection, embedder, weights):
    with pytest.raises(ConfigError):
        UniversalRetriever(collection, embedder, weights=weights)


def test_top_k_of_one_query(retriever):
    assert len(retriever.search("plan", top_k=1)) == 1


def test_a_pattern_that_matches_no_file_is_said_once(retriever, caplog):
    assert retriever.search("vision plan", where=Where(files=("nope*",))) == []
    assert caplog.text.count("No indexed file matches nope*") == 1


def test_as_many_pages_come_back_as_are_wanted(collection, embedder):
    few = UniversalRetriever(collection, embedder, depth=1)
    assert len(few.search("plan", top_k=5)) == 5


def scored(id_, score, page=None, sha="a"):
    return Scored(id_, score, {"sha256": sha, "page": page})


def test_fusion_is_weighted_reciprocal_rank_by_page():
    rankings = {
        "text": [scored("p1", 0.9, 1), scored("p1b", 0.8, 1), scored("p2", 0.7, 2)],
        "bm25": [scored("p2", 12.0, 2), scored("p1", 3.0, 1)],
    }
    first, second = fuse(rankings, {"text": 1.0, "bm25": 3.0}, by="ranks", k=60)
    best = 4 / 61
    assert first.key == ("a", 2)
    assert first.score == pytest.approx((1 / 62 + 3 / 61) / best)
    # The second node of page 1 does not push page 2 down.
    assert first.ranks == {"text": 2, "bm25": 1}
    assert second.score == pytest.approx((1 / 61 + 3 / 62) / best)
    assert second.scores == {"text": 0.9, "bm25": 3.0}
    assert second.best.id == "p1"


def test_fusion_adds_scaled_scores():
    """Cosines from the last hit, BM25 from 0; one page has the credit of its best node."""
    rankings = {
        "text": [scored("p1", 0.9, 1), scored("p1b", 0.8, 1), scored("p2", 0.5, 2)],
        "bm25": [scored("p2", 12.0, 2), scored("p1b", 3.0, 1)],
    }
    first, second = fuse(rankings, {"text": 1.0, "bm25": 3.0})
    assert (first.key, second.key) == (("a", 2), ("a", 1))
    assert first.score == pytest.approx(3 / 4)
    assert second.credits == pytest.approx({"text": 1 / 4, "bm25": 3 / 4 * 3 / 12})
    assert second.score == pytest.approx(sum(second.credits.values()))
    assert second.scores == {"text": 0.9, "bm25": 3.0}
    # p1b has 3/4 of the text's share and all of BM25's; p1 has the text's alone.
    assert [hit.id for hit in second.nodes] == ["p1b", "p1"]


def test_scores_are_scaled_over_the_first_hundred():
    hits = [scored(str(n), 1 - n / 200) for n in range(150)]
    values = scaled(hits)
    assert values[0] == 1
    assert values[49] == pytest.approx(1 - 49 / 99)
    assert values[99:] == [0] * 51
    assert scaled(hits[:1] * 2) == [1, 1]
    assert scaled([]) == []


def test_a_ranking_below_its_zero_breaks_ties_alone():
    """A picture as the question: its cosines with texts are low, and their order is chance."""
    rankings = {
        "image": [Scored("a", 0.9, {}), Scored("b", 0.9, {}), Scored("c", 0.2, {})],
        "text": [Scored("x", 0.2, {}), Scored("b", 0.15, {}), Scored("c", 0.1, {})],
    }
    weights = {"image": 0.3, "text": 1.0}
    found = fuse(rankings, weights, zeros={"text": 0.3})
    assert [each.key for each in found] == ["b", "a", "x", "c"]
    assert sum(each.credits["image"] for each in found if "image" in each.credits) > 1.9
    # With nothing else its order is all there is, and where it says something it counts.
    alone = fuse({"text": rankings["text"]}, weights, zeros={"text": 0.3})
    assert [each.key for each in alone] == ["x", "b", "c"]
    assert fuse(rankings, weights, zeros={"text": 0.1})[0].key == "x"


def test_scores_count_from_a_zero_that_is_known():
    """Where all pages are alike, none of them gets much more than another."""
    hits = [scored(str(n), 0.8 - n / 1000) for n in range(3)]
    assert scaled(hits, 0.3) == pytest.approx([1, 0.499 / 0.5, 0.498 / 0.5])
    # Nothing is cut off within the first hundred, so that they keep their order.
    assert scaled(hits, 0.799) == pytest.approx([1, 0.5, 0])
    assert scaled(hits, 0.9) == pytest.approx([1, 0.5, 0])
    rankings = {"text": hits, "bm25": [scored("1", 9.0), scored("0", 8.0)]}
    even = {"text": 1.0, "bm25": 1.0}
    assert fuse(rankings, even)[0].key == "0"
    assert fuse(rankings, even, zeros={**ZEROS, "text": 0.0})[0].key == "1"


def test_fusion_by_anything_else_is_refused():
    with pytest.raises(ConfigError, match=r"by='luck'.*scores, ranks"):
        fuse({}, by="luck")


def of_kind(id_, kind, page=1, score=1.0):
    return Scored(id_, score, {"sha256": "a", "page": page, "kind": kind})


def test_a_passage_is_shown_as_its_page_if_that_was_found():
    page, passage, figure = (of_kind(kind, kind) for kind in ("page", "passage", "figure"))
    for first, others, shown in (
        (passage, [figure, page], page),
        (passage, [figure], passage),
        (figure, [page], figure),
    ):
        others = [dataclasses.replace(hit, score=0.5) for hit in others]
        (entry,) = fuse({"text": [first, *others]}, {"text": 1.0})
        assert (entry.best, entry.shown.id) == (first, shown.id)


def test_pages_keep_apart_in_fusion_without_collapse():
    hits = [of_kind("x", "passage"), of_kind("y", "page", score=0.5)]
    loose = fuse({"text": hits}, {"text": 1.0}, key=id)
    assert [entry.shown.id for entry in loose] == ["x", "y"]


def test_ties_have_one_order_whatever_came_first():
    one = {"x": [scored("a", 1.0, 1)], "y": [scored("b", 1.0, 2)]}
    other = {"y": [scored("b", 1.0, 2)], "x": [scored("a", 1.0, 1)]}
    weights = {"x": 1.0, "y": 1.0}
    assert [entry.key for entry in fuse(one, weights)] == [
        entry.key for entry in fuse(other, weights)
    ]


@pytest.mark.parametrize("by", ["scores", "ranks"])
@pytest.mark.parametrize("limit", [1, 3, 7, 500])
def test_a_limit_gives_the_first_entries_of_all(by, limit):
    """Also where the last one wanted has the score of others, which come first by their keys."""
    chance = np.random.default_rng(limit)
    for _ in range(20):
        rankings = {}
        for name in ("image", "text", "bm25"):
            ids = chance.permutation(60)[:30]
            steps = chance.integers(0, 2, 30).cumsum()  # half of the scores are equal to the next
            rankings[name] = [
                scored(f"n{id_}", float(40 - step), int(id_) % 25)
                for id_, step in zip(ids, steps, strict=True)
            ]
        everything = fuse(rankings, by=by)
        assert fuse(rankings, by=by, limit=limit) == everything[:limit]
        assert len({entry.key for entry in everything}) == len(everything)


def test_nodes_without_a_page_stand_for_themselves():
    assert page_key(scored("a", 1.0)) != page_key(scored("b", 1.0))


def test_rankings_carry_what_fusion_needs_and_results_are_whole(retriever, collection):
    rankings = retriever.rankings("vision exams")
    stored = {id_: collection.payloads([id_])[id_] for id_ in (hit.id for hit in rankings["text"])}
    for hit in rankings["text"] + rankings["bm25"] + rankings["image"]:
        kept = {key: value for key, value in stored[hit.id].items() if key in PAGE_FIELDS}
        assert hit.payload == kept
    (best, *_) = retriever.search("vision exams")
    expected = collection.node(stored[best.node.node_id])
    assert best.node.to_dict() == expected.to_dict()
    assert best.node.get_content() == TEXTS["plans.pdf", 1]


def test_a_ranking_is_in_one_order_however_the_engine_gives_it(retriever, monkeypatch):
    hits = [Scored(id_, score, {}) for id_, score in (("b", 0.5), ("c", 0.7), ("a", 0.5))]

    def search_all(vectors, *args):
        return dict.fromkeys(vectors, hits), [hits[0], *hits[:0:-1]]

    monkeypatch.setattr(retriever.collection, "search_all", search_all)
    rankings = retriever.rankings("vision exams")
    assert len(rankings) == 3
    for ranking in rankings.values():
        assert [hit.id for hit in ranking] == ["c", "a", "b"]


def test_a_node_deleted_while_it_is_searched_is_left_out(retriever, monkeypatch):
    (first, second, *_) = retriever.search("vision exams")
    whole = retriever.collection.payloads

    def without_first(ids):
        return whole([id_ for id_ in ids if id_ != first.node.node_id])

    monkeypatch.setattr(retriever.collection, "payloads", without_first)
    assert retriever.search("vision exams")[0].node.node_id == second.node.node_id


def test_rankings_can_be_fused_again_with_other_weights(retriever):
    rankings = retriever.rankings("vision exams", limit=4)
    assert set(rankings) == {"image", "text", "bm25"}
    assert all(len(hits) <= 4 for hits in rankings.values())
    assert fuse(rankings, DEFAULT_WEIGHTS)[0].best.payload["page"] == 1


def test_callbacks_and_async_come_from_llama_index(collection, embedder):
    debug = LlamaDebugHandler(print_trace_on_end=False)
    traced = UniversalRetriever(collection, embedder, 2, callback_manager=CallbackManager([debug]))
    again = asyncio.run(traced.aretrieve("dental cleaning"))
    assert [place(hit) for hit in again] == [
        place(hit) for hit in traced.retrieve("dental cleaning")
    ]
    assert len(debug.get_event_pairs(CBEventType.RETRIEVE)) == 2


async def test_the_event_loop_stays_free(collection):
    class Slow(FakeEmbedder):
        def encode(self, *args, **kwargs):
            self.thread = threading.current_thread()
            time.sleep(0.2)
            return super().encode(*args, **kwargs)

    slow = Slow(dim=64)
    await UniversalRetriever(collection, slow).asearch("dental")
    assert slow.thread is not threading.main_thread()


def test_it_serves_llama_index_own_query_engine(retriever):
    from llama_index.core.llms import MockLLM

    response = RetrieverQueryEngine.from_args(retriever, llm=MockLLM()).query("dental cleaning")
    assert place(response.source_nodes[0]) == ("plans.pdf", 2)
