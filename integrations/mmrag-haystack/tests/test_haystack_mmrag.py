"""Haystack's contract of components: run, serialisation, pipelines; images and filters."""

import io
import json
import re
from copy import deepcopy

import numpy as np
import pytest

haystack = pytest.importorskip("haystack")

from haystack import Document, Pipeline
from haystack.components.retrievers.in_memory import InMemoryEmbeddingRetriever
from haystack.core.serialization import component_from_dict, component_to_dict
from haystack.dataclasses import ByteStream
from haystack.document_stores.in_memory import InMemoryDocumentStore
from haystack.errors import FilterError
from haystack.utils import Secret
from llama_index.core.schema import MediaResource, Node, TextNode
from PIL import Image

from haystack_integrations.components.embedders.mmrag import (
    MMRAGDocumentEmbedder,
    MMRAGTextEmbedder,
)
from haystack_integrations.components.retrievers.mmrag import MMRAGRetriever
from mmrag import Content, UniversalIndex
from mmrag.errors import ConfigError, ContentError, MissingCollectionError


class StubEmbedder:
    """A stand-in for a model: texts by their words, images by their mean colour."""

    name, family, dim, fingerprint = "stub", "stub", 64, "1"
    modalities = frozenset({"text", "image", "fused"})

    def encode(self, contents, instruction=None, dim=None, progress=False):
        rows = [self._row(content, instruction) for content in contents]
        vectors = np.array(rows).reshape(-1, self.dim)[:, : dim or self.dim]
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype("float32")

    def _row(self, content, instruction):
        row = np.full(self.dim, 1e-3)
        for word in re.findall(r"\w+", (content.text or "").lower()):
            row[8 + sum(map(ord, word)) % (self.dim - 8)] += 1
        row[3] += len(instruction or "") / 100
        for image in content.images:
            with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
                row[:3] += 3 * np.asarray(opened.convert("RGB")).mean(axis=(0, 1)) / 255
        return row


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setattr("mmrag.embedders.load_embedder", lambda *_, **__: StubEmbedder())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("library")
    Image.new("RGB", (8, 8), "red").save(folder / "red.png")
    return folder


@pytest.fixture(scope="module")
def red(folder):
    return folder / "red.png"


@pytest.fixture(scope="module")
def index(folder, red):
    """Three texts, and a page with an image."""
    page = {"file": "report.pdf", "page": 3, "label": "iii", "kind": "page"}
    texts = (
        ("The well is nine metres deep.", {"file": "a", "year": 2023, "final": True}),
        ("The well is old.", {"file": "b", "year": 2024, "final": False}),
        ("Bananas are yellow.", {"file": "c", "year": 2024}),
    )
    nodes = [TextNode(text=text, metadata=metadata) for text, metadata in texts]
    image = MediaResource(path=red)
    text = MediaResource(text="Revenue by region")
    nodes.append(Node(text_resource=text, image_resource=image, metadata=page))
    with UniversalIndex(folder / "library", StubEmbedder()) as opened:
        opened.insert_nodes(nodes)
        yield opened


@pytest.fixture
def retriever(index):
    return MMRAGRetriever(index=index, top_k=4)


def files(result):
    return [document.meta["file"] for document in result["documents"]]


def field(key, operator, value):
    return {"field": f"meta.{key}", "operator": operator, "value": value}


def group(operator, *conditions):
    return {"operator": operator, "conditions": list(conditions)}


@pytest.mark.parametrize(
    "component",
    [
        MMRAGTextEmbedder("m", instruction="Find a plan.", dim=8, device="cpu"),
        MMRAGTextEmbedder(
            "m",
            base_url="http://localhost:1/v1",
            api_key=Secret.from_env_var("SOME_KEY", strict=False),
            options={"timeout": 3.0},
        ),
        MMRAGDocumentEmbedder(
            "m",
            file_path_meta_field="image",
            root_path="images",
            meta_fields_to_embed=["title"],
            embedding_separator=" ",
            progress_bar=True,
        ),
        MMRAGRetriever(
            "library",
            top_k=3,
            filters=field("year", ">", 2023),
            embed_model="m",
            collection_name="c",
            api_key=Secret.from_env_var("SOME_KEY", strict=False),
            options={"depth": 20},
        ),
    ],
)
def test_components_are_stored_and_loaded(component):
    stored = component_to_dict(component, "name")
    assert json.loads(json.dumps(stored)) == stored
    assert stored["type"] == f"{type(component).__module__}.{type(component).__name__}"
    loaded = component_from_dict(type(component), deepcopy(stored), "name")
    assert component_to_dict(loaded, "name") == stored
    # What is left out of to_dict would come back as its default.
    names = set(stored["init_parameters"])
    assert names == {n for n in vars(component) if not n.startswith("_")} - {"index"}


def test_a_key_in_plain_text_is_not_stored():
    embedder = MMRAGTextEmbedder("m", base_url="http://x/v1", api_key=Secret.from_token("hidden"))
    with pytest.raises(ValueError, match="token-based"):
        embedder.to_dict()


def test_a_question_is_embedded_with_its_instruction():
    stub = StubEmbedder()
    embedder = MMRAGTextEmbedder(instruction="Find a plan.", dim=32)
    embedder.warm_up()
    asked = stub.encode([Content("eyes")], "Find a plan.", dim=32)[0]
    np.testing.assert_allclose(embedder.run("eyes")["embedding"], asked, atol=1e-6)
    assert embedder.run(text="eyes").keys() == {"embedding"}
    with pytest.raises(TypeError, match="MMRAGDocumentEmbedder"):
        embedder.run([Document(content="eyes")])


def test_documents_are_embedded_by_text_image_or_both(red):
    stub = StubEmbedder()
    documents = [
        Document(content="a square"),
        Document(blob=ByteStream(red.read_bytes(), mime_type="image/png")),
        Document(content="a square", meta={"file_path": "red.png", "title": "Shapes"}),
        # A text from a file that is no image is embedded by its text.
        Document(content="a square", meta={"file_path": "shapes.pdf"}),
        Document(meta={"file_path": "red.png", "title": "Shapes"}),
    ]
    embedder = MMRAGDocumentEmbedder(root_path=str(red.parent), meta_fields_to_embed=["title"])
    result = embedder.run(documents)["documents"]
    expected = stub.encode(
        [
            Content("a square"),
            Content(image=red),
            Content("Shapes\na square", red),
            Content("a square"),
            Content(image=red),
        ]
    )
    np.testing.assert_allclose([each.embedding for each in result], expected, atol=1e-6)
    assert [each.id for each in result] == [each.id for each in documents]
    assert all(each.embedding is None for each in documents)
    assert embedder.run([]) == {"documents": []}


def test_documents_that_cannot_be_embedded_are_named(red):
    embedder = MMRAGDocumentEmbedder(root_path=str(red.parent))
    with pytest.raises(ContentError, match=r"Document empty: .*neither text nor image"):
        embedder.run([Document(id="empty", meta={"file_path": "a.pdf"})])
    closed = MMRAGDocumentEmbedder(root_path=str(red.parent), file_path_meta_field=None)
    with pytest.raises(ContentError, match="Document red"):
        closed.run([Document(id="red", meta={"file_path": "red.png"})])
    with pytest.raises(TypeError, match="MMRAGTextEmbedder"):
        embedder.run("a text")


def test_a_pipeline_indexes_and_asks_after_it_was_stored():
    store = InMemoryDocumentStore(embedding_similarity_function="cosine")
    documents = [Document(content="the well is deep"), Document(content="bananas are yellow")]
    store.write_documents(MMRAGDocumentEmbedder().run(documents)["documents"])
    pipeline = Pipeline()
    pipeline.add_component("embedder", MMRAGTextEmbedder(instruction=None))
    pipeline.add_component("retriever", InMemoryEmbeddingRetriever(store, top_k=1))
    pipeline.connect("embedder.embedding", "retriever.query_embedding")
    result = pipeline.run({"embedder": {"text": "how deep is it"}})
    assert result["retriever"]["documents"][0].content == "the well is deep"
    assert MMRAGTextEmbedder.__name__ in Pipeline.loads(pipeline.dumps()).dumps()


def test_a_pipeline_over_a_collection_is_stored(tmp_path, index):
    place = tmp_path / "library"
    pipeline = Pipeline()
    pipeline.add_component("retriever", MMRAGRetriever(str(place), top_k=1))
    with pytest.raises(MissingCollectionError):
        pipeline.run({"retriever": {"query": "well"}})
    with UniversalIndex(place, StubEmbedder()) as opened:
        opened.insert_nodes([TextNode(text="The well is old.", metadata={"file": "b"})])
    loaded = Pipeline.loads(pipeline.dumps())
    assert files(loaded.run({"retriever": {"query": "well"}})["retriever"]) == ["b"]
    loaded.get_component("retriever").close()
    with UniversalIndex(place) as opened:
        assert len(opened.files()) == 1
    with pytest.raises(ConfigError, match="cannot be stored"):
        MMRAGRetriever(index=index).to_dict()


async def test_a_pipeline_asks_asynchronously(retriever):
    pipeline = Pipeline()
    pipeline.add_component("embedder", MMRAGTextEmbedder())
    pipeline.add_component("writer", MMRAGDocumentEmbedder())
    pipeline.add_component("retriever", retriever)
    asked = {"query": "bananas", "top_k": 1, "filters": field("year", "==", 2024)}
    documents = [Document(content="a")]
    given = {"retriever": asked, "embedder": {"text": "a"}, "writer": {"documents": documents}}
    result = await pipeline.run_async(given)
    assert files(result["retriever"]) == ["c"]
    assert len(result["embedder"]["embedding"]) == 64
    assert len(result["writer"]["documents"][0].embedding) == 64


def test_documents_say_where_they_are_from(retriever, index):
    page = retriever.run("revenue by region", top_k=1)["documents"][0]
    stored = {"file": "report.pdf", "page": 3, "label": "iii", "kind": "page"}
    assert stored.items() <= page.meta.items()
    assert page.content == "Revenue by region"
    assert 0 < page.score <= 1
    assert page.meta["ranks"]["bm25"] == 1
    with Image.open(page.meta["image_path"]) as image:
        assert image.convert("RGB").getpixel((0, 0)) == (255, 0, 0)
    (hit,) = index.as_retriever(similarity_top_k=1).retrieve("revenue by region")
    assert page.id == hit.node.node_id
    assert Document.from_dict(json.loads(json.dumps(page.to_dict()))).meta["page"] == 3


def test_an_image_is_a_question(retriever, red):
    assert files(retriever.run("", image=str(red), top_k=1)) == ["report.pdf"]


@pytest.mark.parametrize(
    ("filters", "found"),
    [
        (field("year", "==", 2024), "bc"),
        (field("year", "!=", 2024), "ar"),
        (field("year", ">", 2023), "bc"),
        (field("year", ">=", 2023), "abc"),
        (field("year", "<", 2024), "a"),
        (field("year", "<=", 2024), "abc"),
        (field("year", "in", [2023, 1]), "a"),
        (field("year", "not in", [2023]), "bcr"),
        (field("final", "==", True), "a"),
        (field("final", "in", [False]), "b"),
        (field("year", "==", None), "r"),
        (field("year", "!=", None), "abc"),
        (field("file", "==", "*.pdf"), "r"),
        (group("OR", field("file", "==", "c"), field("final", "==", True)), "ac"),
        (group("AND", field("year", "==", 2024), field("final", "==", False)), "b"),
        (group("NOT", field("year", "==", 2024), field("final", "==", False)), "acr"),
        (group("NOT", group("OR", field("file", "==", "a"), field("file", "==", "b"))), "cr"),
    ],
)
def test_filters_mean_what_haystack_says(index, filters, found):
    retriever = MMRAGRetriever(index=index)
    result = retriever.run("the well", filters=filters)
    assert "".join(sorted(name[0] for name in files(result))) == found
    of_its_own = MMRAGRetriever(index=index, filters=filters)
    assert sorted(files(of_its_own.run("the well"))) == sorted(files(result))
    assert files(of_its_own.run("well", filters=field("year", "==", 2023))) == ["a"]


@pytest.mark.parametrize(
    "filters",
    [
        {"year": 2024},
        field("year", "=~", 2024),
        {"field": "meta.year", "operator": "=="},
        field("year", ">", None),
        group("XOR", field("year", "==", 1)),
    ],
)
def test_filters_of_another_form_are_refused(retriever, filters):
    with pytest.raises(FilterError, match="year"):
        retriever.run("well", filters=filters)


def test_contradictions_are_refused(index):
    with pytest.raises(ConfigError, match="leave out location"):
        MMRAGRetriever("library", index=index)
    with pytest.raises(ConfigError, match="top_k"):
        MMRAGRetriever(top_k=0)
    with pytest.raises(ConfigError, match="server"):
        MMRAGTextEmbedder("m", api_key=Secret.from_token("k"))
    with pytest.raises(MissingCollectionError):
        MMRAGRetriever("nowhere").warm_up()
