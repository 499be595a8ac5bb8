"""LangChain's standard tests, and what they do not ask: images, filters, metadata, storing."""

import io
import json
import pickle
import re

import numpy as np
import pytest

standard = pytest.importorskip("langchain_tests.integration_tests")
units = pytest.importorskip("langchain_tests.unit_tests")

from langchain_core.documents import Document
from langchain_core.load import dumps, loads
from langchain_core.runnables import RunnablePassthrough
from langchain_core.vectorstores import InMemoryVectorStore
from llama_index.core.schema import MediaResource, Node, TextNode
from llama_index.core.vector_stores.types import MetadataFilter, MetadataFilters
from PIL import Image
from pydantic import ValidationError

from langchain_mmrag import MMRAGEmbeddings, MMRAGRetriever
from mmrag import Content, UniversalIndex
from mmrag.errors import ConfigError, MissingCollectionError
from mmrag.queries import Where

RECENT = MetadataFilters(filters=[MetadataFilter(key="year", value=2023, operator=">")])


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


class TestUnits(units.EmbeddingsUnitTests):
    embeddings_class = MMRAGEmbeddings
    embedding_model_params = {"model": "mmrag-nano", "device": "cpu"}  # noqa: RUF012


class TestEmbeddings(standard.EmbeddingsIntegrationTests):
    embeddings_class = MMRAGEmbeddings
    embedding_model_params = {"embedder": StubEmbedder()}  # noqa: RUF012


class TestRetriever(standard.RetrieversIntegrationTests):
    retriever_constructor = MMRAGRetriever
    retriever_query_example = "how deep is the well"

    @pytest.fixture(autouse=True)
    def _open(self, index):
        self.index = index

    @property
    def retriever_constructor_params(self):
        return {"index": self.index}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("library")


@pytest.fixture(scope="module")
def red(folder):
    Image.new("RGB", (8, 8), "red").save(folder / "red.png")
    return folder / "red.png"


@pytest.fixture(scope="module")
def index(folder, red):
    """Three texts, and a page with an image."""
    page = {"file": "report.pdf", "page": 3, "label": "iii", "kind": "page"}
    with UniversalIndex(folder / "library", StubEmbedder()) as opened:
        opened.insert_nodes(
            [
                TextNode(text=text, metadata={"file": file, "year": year})
                for text, file, year in (
                    ("The well is nine metres deep.", "a", 2023),
                    ("The well is old.", "b", 2024),
                    ("Bananas are yellow.", "c", 2024),
                )
            ]
            + [
                Node(
                    text_resource=MediaResource(text="Revenue by region"),
                    image_resource=MediaResource(path=red),
                    metadata=page,
                ),
            ]
        )
        yield opened


@pytest.fixture
def retriever(index):
    return MMRAGRetriever(index=index, k=2)


def names(documents):
    return [document.metadata["file"] for document in documents]


def test_queries_carry_the_instruction_and_documents_do_not():
    stub = StubEmbedder()
    model = MMRAGEmbeddings(embedder=stub, query_instruction="Find a plan.")
    asked = stub.encode([Content("eyes")], "Find a plan.")[0]
    np.testing.assert_allclose(model.embed_query("eyes"), asked, atol=1e-6)
    plain = stub.encode([Content("eyes")])
    np.testing.assert_allclose(model.embed_documents(["eyes"]), plain, atol=1e-6)


async def test_images_alone_and_with_their_text(red):
    stub = StubEmbedder()
    model = MMRAGEmbeddings(embedder=stub, dim=32)
    alone, both = stub.encode([Content(image=red), Content("a square", red)], dim=32)
    np.testing.assert_allclose(model.embed_image([str(red)]), [alone], atol=1e-6)
    uris = [red.read_bytes(), str(red)]
    np.testing.assert_allclose(
        await model.aembed_image(uris, texts=[None, "a square"]), [alone, both], atol=1e-6
    )
    asked = stub.encode([Content("a square", red)], "page_for_question", dim=32)[0]
    np.testing.assert_allclose(model.embed_query_image(red, "a square"), asked, atol=1e-6)
    assert await model.aembed_query_image(red, "a square") == model.embed_query_image(
        red, "a square"
    )
    with pytest.raises(ConfigError, match="2 images and 1 texts"):
        model.embed_image(uris, texts=["a square"])


def test_a_vector_store_of_langchain_finds_by_it():
    store = InMemoryVectorStore(MMRAGEmbeddings(embedder=StubEmbedder(), query_instruction=None))
    store.add_documents([Document("the well is deep"), Document("bananas are yellow")])
    (found,) = store.similarity_search("how deep is it", k=1)
    assert found.page_content == "the well is deep"


def test_settings_are_stored_and_checked(monkeypatch):
    monkeypatch.setattr("mmrag.embedders.load_embedder", lambda *_, **__: StubEmbedder())
    model = MMRAGEmbeddings(model="mmrag-nano", dim=32, device="cpu")
    stored = model.model_dump()
    assert {"embedder", "api_key"}.isdisjoint(stored)
    copy = MMRAGEmbeddings(**json.loads(json.dumps(stored)))
    assert copy.embed_query("eyes") == model.embed_query("eyes")
    assert pickle.loads(pickle.dumps(model)).embed_query("eyes") == model.embed_query("eyes")
    with pytest.raises(ValidationError, match="dimension"):
        MMRAGEmbeddings(dimension=32)
    with pytest.raises(ConfigError, match="leave out model_name"):
        MMRAGEmbeddings(model="other", embedder=StubEmbedder())
    remote = MMRAGEmbeddings(model="m", base_url="http://localhost:1/v1", api_key="secret")
    assert "secret" not in repr(remote) + str(remote.model_dump())


def test_documents_say_where_they_are_from(retriever, index):
    (page,) = retriever.invoke("revenue by region", k=1)
    stored = {"file": "report.pdf", "page": 3, "label": "iii", "kind": "page"}
    assert stored.items() <= page.metadata.items()
    assert page.page_content == "Revenue by region"
    assert 0 < page.metadata["score"] <= 1
    assert page.metadata["ranks"]["bm25"] == 1, page
    with Image.open(page.metadata["image_path"]) as image:
        assert image.convert("RGB").getpixel((0, 0)) == (255, 0, 0)
    (hit,) = index.as_retriever(similarity_top_k=1).retrieve("revenue by region")
    assert page.id == hit.node.node_id
    assert "image_path" not in retriever.invoke("bananas", k=1)[0].metadata


def test_an_image_is_a_question(retriever, red):
    assert names(retriever.invoke("", image=str(red), k=1)) == ["report.pdf"]


@pytest.mark.parametrize(
    ("filters", "found"),
    [
        (RECENT, {"b", "c"}),
        ({"year": 2024}, {"b", "c"}),
        ({"year": [2023, 2024], "file": ["a", "c"]}, {"a", "c"}),
        ({"file": "*.pdf"}, {"report.pdf"}),
        (Where(pages=(3, 3)), {"report.pdf"}),
    ],
)
def test_filters_are_passed_on(index, filters, found):
    retriever = MMRAGRetriever(index=index, k=4)
    assert set(names(retriever.invoke("the well", filters=filters))) == found
    of_its_own = MMRAGRetriever(index=index, k=4, filters=filters)
    assert set(names(of_its_own.invoke("the well"))) == found
    # What one question asks for takes the place of the retriever's own.
    assert set(names(of_its_own.invoke("the well", filters={"year": 2023}))) == {"a"}


async def test_batches_and_chains(retriever):
    chain = {"context": retriever, "question": RunnablePassthrough()} | RunnablePassthrough()
    result = await chain.ainvoke("how deep is the well")
    assert names(result["context"])[0] == "a"
    first, second = retriever.batch(["how deep is the well", "bananas"])
    assert (names(first)[0], names(second)[0]) == ("a", "c")
    (found,) = await retriever.ainvoke("bananas", k=1, filters={"year": 2024})
    assert found.metadata["file"] == "c"


def test_options_reach_the_ranking(index):
    words = {"text": 0, "image": 0, "fused": 0, "reference": 0, "bm25": 1}
    retriever = MMRAGRetriever(index=index, options={"weights": words})
    assert all(set(hit.metadata["ranks"]) == {"bm25"} for hit in retriever.invoke("well"))
    with pytest.raises(ConfigError, match="smell"):
        MMRAGRetriever(index=index, options={"weights": {"smell": 1}}).invoke("well")


def test_a_folder_is_opened_when_asked_and_released(tmp_path, monkeypatch):
    monkeypatch.setattr("mmrag.embedders.load_embedder", lambda *_, **__: StubEmbedder())
    place = str(tmp_path / "library")
    retriever = MMRAGRetriever(location=place, k=1)
    with pytest.raises(MissingCollectionError):
        retriever.invoke("well")
    with UniversalIndex(place, StubEmbedder()) as opened:
        opened.insert_nodes([TextNode(text="The well is old.", metadata={"file": "b"})])
    assert len(retriever.batch(["well"] * 4)) == 4
    retriever.close()
    stored = dumps(retriever)
    copy = loads(stored, allowed_objects=[MMRAGRetriever], valid_namespaces=["langchain_mmrag"])
    assert isinstance(copy, MMRAGRetriever)
    assert names(copy.invoke("well")) == ["b"]
    copy.close()


def test_keys_are_not_stored():
    retriever = MMRAGRetriever(location="http://localhost:6333", api_key="hidden")
    assert "hidden" not in repr(retriever) + dumps(retriever) + str(retriever.model_dump())


def test_contradictions_are_refused(index):
    with pytest.raises(ConfigError, match="leave out location"):
        MMRAGRetriever(index=index, location="library")
    with pytest.raises(ValidationError, match="top_k"):
        MMRAGRetriever(index=index, top_k=3)
    with pytest.raises(ValidationError, match="k"):
        MMRAGRetriever(index=index, k=0)
    assert MMRAGRetriever(index=index, k=1).close() is None
    assert index.collection.count() == 4
