"""LlamaIndex's silent failures with images, and what mmrag does about each.

Most fail inside LlamaIndex, so what is tested is the way around them that docs/llamaindex.md
gives. Rows are lettered as there. J at answer time is tested in test_context.py.
"""

import asyncio

import numpy as np
import pytest
from fakes import FakeEmbedder, make_image, make_node
from llama_index.core import VectorStoreIndex
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.schema import (
    ImageDocument,
    ImageNode,
    MediaResource,
    Node,
    QueryBundle,
    TextNode,
)
from llama_index.core.vector_stores.types import FilterOperator, MetadataFilter, MetadataFilters
from llama_index.vector_stores.qdrant import QdrantVectorStore
from qdrant_client import QdrantClient

from mmrag.embedding import UniversalEmbedding
from mmrag.errors import ContentError
from mmrag.index import UniversalIndex
from mmrag.retrieval.retriever import UniversalRetriever
from mmrag.store.collection import Collection, CollectionSettings

pytestmark = pytest.mark.filterwarnings("ignore:Payload indexes have no effect")
COLOURS = ("red", "green", "blue")


@pytest.fixture
def model():
    return UniversalEmbedding(embedder=FakeEmbedder())


@pytest.fixture
def store():
    return QdrantVectorStore("nodes", client=QdrantClient(":memory:"))


@pytest.fixture
def images(tmp_path):
    return [make_image(tmp_path / f"{colour}.png", colour) for colour in COLOURS]


@pytest.fixture
def pages(images):
    """Three pages without a text layer, as a scan gives."""
    return [make_node("", page=page, image=path) for page, path in enumerate(images, 1)]


def stored_through_the_pipeline(model, store, nodes):
    IngestionPipeline(transformations=[model], vector_store=store, disable_cache=True).run(
        nodes=nodes
    )
    return VectorStoreIndex.from_vector_store(store, embed_model=model)


def in_a_collection(tmp_path, model, nodes, place=None):
    embedder = model.embedder
    settings = CollectionSettings(
        embedder.name, embedder.fingerprint, embedder.dim, views=("image", "text")
    )
    place = place or QdrantClient(":memory:")
    collection = Collection.open(place, settings=settings, images_dir=tmp_path / "images")
    model(nodes)
    collection.write(nodes, [{"text": np.array(node.embedding)} for node in nodes])
    return collection


def test_a_mixed_nodes_are_all_found_in_the_session_that_stored_them(model, store, pages):
    """``as_retriever`` keeps to the ids of ImageNode and IndexNode; mmrag's kinds are neither."""
    nodes = [*pages, TextNode(text="words")]
    index = VectorStoreIndex(
        [], storage_context=_storage(store), embed_model=model, show_progress=False
    )
    index.insert_nodes(model(nodes))
    found = index.as_retriever(similarity_top_k=9).retrieve("words")
    assert {hit.node.node_id for hit in found} == {node.node_id for node in nodes}


def test_an_image_nodes_are_found_beside_others_once_the_index_is_opened_anew(model, store, pages):
    nodes = [*pages, TextNode(text="words"), ImageNode(image_path=str(_path(pages[0])))]
    index = stored_through_the_pipeline(model, store, nodes)
    found = index.as_retriever(similarity_top_k=9).retrieve("words")
    assert {hit.node.node_id for hit in found} == {node.node_id for node in nodes}


def test_b_pages_without_text_are_stored(model, store, pages):
    """``VectorStoreIndex(nodes)`` drops nodes without text; a pipeline, insert_nodes and a
    Collection keep them."""
    stored_through_the_pipeline(model, store, pages)
    assert {node.node_id for node in store.get_nodes()} == {node.node_id for node in pages}


def test_b_images_inserted_after_the_model_have_vectors_of_their_own(model, store, pages, images):
    """``insert_nodes(nodes)`` alone would embed the text, which is empty."""
    index = VectorStoreIndex([], storage_context=_storage(store), embed_model=model)
    index.insert_nodes(model(pages))
    vector = model.get_image_embedding(str(images[1]))
    (best, *_) = index.as_retriever().retrieve(QueryBundle("", embedding=vector))
    assert best.node.node_id == pages[1].node_id
    assert best.score == pytest.approx(1)


def test_b_an_index_of_ours_embeds_the_images_of_pages_without_text(model, pages, images, tmp_path):
    with UniversalIndex(tmp_path / "library", model) as index:
        index.insert_nodes(pages)
        for page, image in zip(pages, images, strict=True):
            (best,) = index.as_retriever(similarity_top_k=1).search(image=image)
            assert best.node.node_id == page.node_id
            assert best.view_scores["image"] == pytest.approx(1, abs=1e-5)


def test_b_a_collection_keeps_pages_without_text(model, pages, tmp_path):
    with in_a_collection(tmp_path, model, pages) as collection:
        assert collection.existing([node.node_id for node in pages]) == {
            node.node_id for node in pages
        }


def test_c_each_image_gets_a_vector_of_its_own_in_a_pipeline(model, store, pages, images):
    stored_through_the_pipeline(model, store, pages)
    for node, image in zip(pages, images, strict=True):
        np.testing.assert_allclose(node.embedding, model.get_image_embedding(str(image)))
    assert len({tuple(node.embedding) for node in pages}) == 3


def test_c_an_index_takes_the_vectors_that_the_model_has_set(model, store, images):
    nodes = [make_node(f"page {n}", page=n, image=path) for n, path in enumerate(images, 1)]
    index = VectorStoreIndex(model(nodes), storage_context=_storage(store), embed_model=model)
    vector = model.get_fused_embedding("page 2", images[1])
    (best, *_) = index.as_retriever().retrieve(QueryBundle("", embedding=vector))
    assert best.node.node_id == nodes[1].node_id
    assert best.score == pytest.approx(1)


def test_d_pages_that_mmrag_reads_are_told_apart_by_the_cache(model, images):
    """Its key is text and metadata: mmrag's nodes carry hash, page and kind there."""
    pipeline = IngestionPipeline(transformations=[model])
    for page, image in enumerate(images, 1):
        (node,) = pipeline.run(nodes=[make_node("", page=page, image=image)])
        assert _path(node) == image
        np.testing.assert_allclose(node.embedding, model.get_image_embedding(str(image)))


def test_d_bare_images_need_the_cache_off(model, images):
    pipeline = IngestionPipeline(transformations=[model], disable_cache=True)
    for image in images:
        node = Node(image_resource=MediaResource(path=image))
        (done,) = pipeline.run(nodes=[node])
        np.testing.assert_allclose(done.embedding, model.get_image_embedding(str(image)))


def test_d_cache_does_not_outlive_the_weights(images):
    """LlamaIndex keys the cache by settings; ours include the fingerprint of the weights."""
    first, second = (UniversalEmbedding(embedder=FakeEmbedder(version=v)) for v in "12")
    pipeline = IngestionPipeline(transformations=[first])
    pipeline.run(nodes=[make_node("words", page=1)])
    again = IngestionPipeline(transformations=[second], cache=pipeline.cache)
    again.run(nodes=[make_node("words", page=1)])
    assert second.embedder.encoded == 1


def test_e_text_and_image_survive_storage_in_the_nodes_that_mmrag_makes(model, store, images):
    nodes = [make_node("both", page=1, image=images[0]), make_node("words", page=2)]
    index = stored_through_the_pipeline(model, store, nodes)
    found = {hit.node.node_id: hit.node for hit in index.as_retriever().retrieve("both")}
    page, passage = (found[node.node_id] for node in nodes)
    assert type(page) is Node and type(passage) is TextNode
    assert page.text_resource.text == "both"
    assert _path(page) == images[0]
    assert page.metadata["page"] == 1


def test_e_an_image_document_survives_as_a_node(model, store, images):
    document = ImageDocument(image_path=str(images[0]), text="both", metadata={"page": 3})
    node = Node(
        text_resource=document.text_resource,
        image_resource=document.image_resource,
        metadata=document.metadata,
    )
    stored_through_the_pipeline(model, store, [node])
    (back,) = store.get_nodes()
    assert _path(back) == images[0]
    assert back.get_content() == "both"


def test_e_what_would_lose_its_image_is_refused_in_a_pipeline(model, store, images):
    document = ImageDocument(image_path=str(images[0]), text="both")
    with pytest.raises(ContentError, match=r"a ImageDocument comes back .* Node\(text_resource"):
        stored_through_the_pipeline(model, store, [document])


def test_f_images_are_kept_by_path_and_no_bytes_are_stored(model, store, pages, tmp_path):
    stored_through_the_pipeline(model, store, pages)
    with in_a_collection(tmp_path, model, pages) as collection:
        ours = [hit.payload for hit in collection.search("text", np.ones(32, np.float32), 9)]
    theirs = [point.payload for point in store.client.scroll("nodes", limit=9)[0]]
    for payload in ours + theirs:
        assert "base64" not in str(payload)
        assert len(str(payload)) < 4000


def test_f_images_held_as_bytes_are_embedded(model, images):
    node = Node(image_resource=MediaResource(data=images[0].read_bytes()))
    (done,) = model([node])
    np.testing.assert_allclose(done.embedding, model.get_image_embedding(str(images[0])))


def test_g_an_image_alone_finds_its_page(model, store, pages, images, tmp_path):
    """LlamaIndex's retriever embeds no image: give the bundle its vector, or use ours."""
    index = stored_through_the_pipeline(model, store, pages)
    bundle = QueryBundle("", image_path=str(images[2]))
    bundle.embedding = model.get_query_embedding(bundle)
    (best, *_) = index.as_retriever().retrieve(bundle)
    assert best.node.node_id == pages[2].node_id

    with in_a_collection(tmp_path, model, pages) as collection:
        retriever = UniversalRetriever(collection, model.embedder)
        (best, *_) = retriever.retrieve(QueryBundle("", image_path=str(images[2])))
    assert best.node.node_id == pages[2].node_id


def test_h_node_ids_are_ones_that_qdrant_takes(model, store, tmp_path):
    nodes = [make_node("words", file="doc.pdf", page=page, index=page) for page in (1, 2)]
    stored_through_the_pipeline(model, store, nodes)
    assert len(store.get_nodes()) == 2
    with in_a_collection(tmp_path, model, nodes) as collection:
        assert len(collection.existing([node.node_id for node in nodes])) == 2


def test_i_async_works_over_a_folder(model, pages, images, tmp_path):
    with in_a_collection(tmp_path, model, pages, tmp_path / "library") as collection:
        retriever = UniversalRetriever(collection, model.embedder)
        bundle = QueryBundle("", image_path=str(images[1]))
        hits = asyncio.run(retriever.aretrieve(bundle))
    assert hits[0].node.node_id == pages[1].node_id


def test_j_a_missing_image_is_named_when_it_is_embedded(model, pages, images):
    images[1].unlink()
    with pytest.raises(ContentError, match=r"green\.png"):
        model(pages)


def test_j_a_missing_image_does_not_hinder_retrieval(model, pages, images, tmp_path):
    with in_a_collection(tmp_path, model, pages) as collection:
        vector = model.get_image_embedding(str(images[0]))
        images[0].unlink()
        retriever = UniversalRetriever(collection, model.embedder)
        (best, *_) = retriever.retrieve(QueryBundle("", embedding=vector, image_path="gone.png"))
    assert best.node.node_id == pages[0].node_id


def test_k_filters_over_lists_of_values(model, tmp_path):
    topics = {1: ["costs", "plans"], 2: ["history"], 3: ["rules", "costs"]}
    nodes = [make_node("words", page=page, topic=topic) for page, topic in topics.items()]
    cases = {
        FilterOperator.CONTAINS: ("costs", {1, 3}),
        FilterOperator.ANY: (["plans", "history"], {1, 2}),
        FilterOperator.ALL: (["costs", "rules"], {3}),
    }
    with in_a_collection(tmp_path, model, nodes) as collection:
        for operator, (value, pages) in cases.items():
            filters = MetadataFilters(
                filters=[MetadataFilter(key="topic", value=value, operator=operator)]
            )
            retriever = UniversalRetriever(collection, model.embedder, filters=filters)
            assert {hit.node.metadata["page"] for hit in retriever.retrieve("words")} == pages


def test_l_metadata_named_doc_id_comes_back_unchanged(model, tmp_path):
    nodes = [make_node("words", page=1, doc_id="contract 17")]
    with in_a_collection(tmp_path, model, nodes) as collection:
        (hit,) = UniversalRetriever(collection, model.embedder).retrieve("words")
    assert hit.node.metadata["doc_id"] == "contract 17"


def _storage(store):
    from llama_index.core import StorageContext

    return StorageContext.from_defaults(vector_store=store)


def _path(node):
    return node.image_resource.path
