"""An application's own nodes: stored, found, cited, replaced and removed."""

import base64
import logging

import pytest
from fakes import FakeEmbedder, make_image
from llama_index.core.schema import (
    Document,
    ImageDocument,
    ImageNode,
    MediaResource,
    Node,
    NodeRelationship,
    RelatedNodeInfo,
    TextNode,
)
from llama_index.core.vector_stores.types import MetadataFilter, MetadataFilters
from qdrant_client import QdrantClient

from mmrag.answering.context import select_sources
from mmrag.errors import ContentError
from mmrag.index import UniversalIndex


@pytest.fixture
def embedder():
    return FakeEmbedder()


@pytest.fixture(params=["folder", "server"])
def opened(request, tmp_path, embedder):
    """Opens the same index, again and again."""
    client = QdrantClient(":memory:")

    def again():
        if request.param == "folder":
            return UniversalIndex(tmp_path / "library", embedder)
        return UniversalIndex(client, embedder, images_dir=tmp_path / "images")

    return again


@pytest.fixture
def index(opened):
    with opened() as index:
        yield index


def test_nodes_are_ranked_by_their_words_as_well(index, tmp_path):
    index.insert_nodes(mixed(tmp_path))
    (hit,) = index.as_retriever(similarity_top_k=1).retrieve("nine million")
    assert (hit.node.node_id, hit.ranks["bm25"]) == ("note", 1)
    # Metadata of that name is the user's still.
    index.insert_nodes([TextNode(id_="odd", text="plain words", metadata={"text": "other"})])
    (hit,) = index.as_retriever(similarity_top_k=1).retrieve("plain words")
    assert (hit.text, hit.node.metadata["text"], hit.ranks["bm25"]) == ("plain words", "other", 1)


def of(document, **fields):
    source = {NodeRelationship.SOURCE: RelatedNodeInfo(node_id=document)}
    return TextNode(relationships=source, **fields)


def mixed(tmp_path):
    """A node of each kind, with ids that Qdrant would not take."""
    red, blue = (make_image(tmp_path / "own" / f"{c}.png", c) for c in ("red", "blue"))
    return [
        TextNode(id_="note", text="the budget is nine million", metadata={"title": "Minutes"}),
        ImageNode(id_="photo", image_path=str(red), metadata={"file": "red.png", "year": 2024}),
        ImageNode(id_="bytes", image=base64.b64encode(blue.read_bytes()).decode()),
        Node(
            id_="page",
            text_resource=MediaResource(text="a page about turbines"),
            image_resource=MediaResource(path=blue),
            metadata={"file": "scan.pdf", "page": 7},
        ),
        Node(id_="held", image_resource=MediaResource(data=red.read_bytes())),
    ]


def find(index, text=None, image=None, **options):
    return index.as_retriever(**options).search(text, image)


def test_nodes_of_every_kind_are_found_as_they_were_given(opened, tmp_path):
    nodes = mixed(tmp_path)
    with opened() as index:
        index.insert_nodes(nodes)
    for path in (tmp_path / "own").iterdir():
        path.unlink()  # the collection has copies
    with opened() as index:
        by_id = {hit.node.node_id: hit.node for hit in find(index, "turbines budget red")}
        by_id |= {hit.node.node_id: hit.node for hit in find(index, image=red_square(tmp_path))}
        assert set(by_id) == {"note", "photo", "bytes", "page", "held"}
        for given in nodes:
            found = by_id[given.node_id]
            assert type(found) is type(given)
            assert found.metadata == given.metadata
            assert found.get_content() == given.get_content()
        assert by_id["note"].hash == nodes[0].hash
        colours = {id_: pixel(by_id[id_]) for id_ in ("photo", "bytes", "page", "held")}
        red, blue = (255, 0, 0), (0, 0, 255)
        assert colours == {"photo": red, "bytes": blue, "page": blue, "held": red}


def red_square(tmp_path):
    return make_image(tmp_path / "query.png", "red")


def pixel(node):
    from mmrag.content import load_image
    from mmrag.nodes import node_image

    return load_image(node_image(node)).getpixel((0, 0))


def test_an_image_finds_the_nodes_that_show_it(index, tmp_path):
    index.insert_nodes(mixed(tmp_path))
    hits = find(index, image=red_square(tmp_path), similarity_top_k=2, weights={"text": 0})
    assert {hit.node.node_id for hit in hits} == {"photo", "held"}
    assert all(hit.view_scores["image"] == pytest.approx(1, abs=1e-5) for hit in hits)


def test_files_lists_their_documents(index, tmp_path):
    index.insert_nodes([*mixed(tmp_path), of("doc-1", text="one"), of("doc-1", text="two")])
    entries = {entry.file: (entry.doc_id, entry.nodes, entry.pages) for entry in index.files()}
    assert entries == {
        "Minutes": ("Minutes", 1, 0),
        "red.png": ("red.png", 1, 0),
        "bytes": ("bytes", 1, 0),
        "scan.pdf": ("scan.pdf", 1, 1),
        "held": ("held", 1, 0),
        "doc-1": ("doc-1", 2, 0),
    }


def test_they_are_cited_by_their_metadata(index, tmp_path):
    index.insert_nodes(mixed(tmp_path))
    sources = select_sources(find(index, "turbines"), "turbines")
    assert (sources[0].place, sources[0].page) == ("scan.pdf, page 7", 7)
    answer = index.as_query_engine().query("Is the budget nine million?")
    (cited,) = (source for source in answer.sources if source.cited)
    assert (cited.file, cited.quote) == ("Minutes", "the budget is nine million")


def test_what_is_unchanged_is_not_embedded_again(index, embedder, tmp_path):
    nodes = mixed(tmp_path)
    index.insert_nodes(nodes)
    before = embedder.encoded
    index.insert_nodes(nodes)
    assert embedder.encoded == before
    make_image(tmp_path / "own" / "red.png", "green")  # the same path, another image
    nodes[0].metadata["title"] = "Other minutes"
    index.insert_nodes(nodes)
    assert embedder.encoded == before + 2
    (best,) = find(index, "budget", similarity_top_k=1, weights={"image": 0})
    assert best.node.metadata["title"] == "Other minutes"
    green = {"image": tmp_path / "own" / "red.png", "weights": {"text": 0}}
    (best,) = find(index, **green, similarity_top_k=1)
    assert best.node.node_id == "photo" and pixel(best.node) == (0, 128, 0)


def test_documents_are_split_refreshed_and_deleted(opened, embedder, caplog):
    long = " ".join(f"Sentence number {n} is about turbines." for n in range(400))
    documents = [
        Document(id_="long", text=long, metadata={"file_name": "long.txt", "team": "wind"}),
        Document(id_="short", text="Eye exams are covered.", metadata={"file_name": "short.txt"}),
    ]
    with opened() as index:
        index.insert(documents[0])
        (entry,) = index.files()
        assert entry.nodes > 1 and (entry.file, entry.doc_id) == ("long.txt", "long")
        assert index.refresh_ref_docs(documents) == [False, True]
    before = embedder.encoded
    with opened() as index:
        assert index.refresh_ref_docs(documents) == [False, False]
        assert embedder.encoded == before
        documents[0].metadata["team"] = "sea"
        documents[1].set_content("Glasses are covered.")
        assert index.refresh_ref_docs(documents) == [True, True]
        nodes = [hit.node for hit in find(index, "covered turbines", similarity_top_k=50)]
        assert len(nodes) == entry.nodes + 1 == index.collection.count()
        assert {n.metadata["team"] for n in nodes if n.ref_doc_id == "long"} == {"sea"}
        assert "Glasses are covered." in [node.get_content() for node in nodes]
        index.delete_ref_doc("long")
        assert [each.doc_id for each in index.files()] == ["short"]
        assert index.collection.count() == 1
        with caplog.at_level(logging.WARNING):
            index.delete_ref_doc("long", delete_from_docstore=True)
    assert "long not found" in caplog.text


def test_a_document_with_an_image_keeps_it(index, tmp_path):
    image = make_image(tmp_path / "red.png")
    index.insert(ImageDocument(id_="shown", text="a red square", image_path=str(image)))
    (hit,) = find(index, "red square")
    assert type(hit.node) is Node and pixel(hit.node) == (255, 0, 0)
    assert hit.text == "a red square"


def test_a_node_class_whose_image_would_be_lost_is_refused(index, tmp_path):
    class Chart(ImageNode):
        pass

    image = make_image(tmp_path / "red.png")
    chart = Chart(id_="chart", image_path=str(image))
    with pytest.raises(ContentError, match=r"1 of 2 nodes .* chart: a Chart comes back .* Node\("):
        index.insert_nodes([chart, TextNode(text="words")])
    assert [hit.text for hit in find(index, "words")] == ["words"]


def test_a_bad_node_is_named_and_the_others_are_stored(index):
    nodes = [of("doc", id_="good", text="fine words"), of("doc", id_="bad", text="POISON")]
    missing = ImageNode(id_="gone", image_path="missing.png")
    address = ImageNode(id_="web", image_url="https://example.com/a.png")
    with pytest.raises(ContentError, match=r"3 of 4 .*missing\.png.*example\.com.*bad"):
        index.insert_nodes([*nodes, missing, address])
    assert [hit.text for hit in find(index, "words")] == ["fine words"]
    (entry,) = index.files()
    assert not entry.complete and "bad" in entry.errors[0]
    index.insert_nodes([of("doc", id_="bad", text="good by now")])
    (entry,) = index.files()
    assert entry.complete and entry.nodes == 2


def test_metadata_cannot_pass_for_bookkeeping(index):
    """Keys that the collection uses itself come back with the node and mean nothing else."""
    metadata = {
        "kind": "settings",
        "sha256": "0" * 64,
        "terms": ["poison"],
        "text": "poison",
        "box": "large",
        "doc_id": "contract 17",
        "node_hash": "x",
    }
    index.insert_nodes([TextNode(id_="odd", text="plain words", metadata=metadata)])
    (hit,) = find(index, "words")
    assert hit.node.metadata == metadata
    assert hit.box is None
    assert find(index, "poison", weights={"text": 0, "image": 0}) == []
    index.remove("odd")
    assert index.files() == [] and index.collection.count() == 0


def test_removal_takes_nodes_entries_and_images(index, tmp_path):
    index.insert_nodes(mixed(tmp_path))
    images = index.collection.images_dir
    assert len([*images.rglob("*.png")]) == 4
    assert index.remove("scan.pdf") == ["scan.pdf"]
    index.delete_nodes(["photo", "bytes"])
    assert {entry.file for entry in index.files()} == {"Minutes", "held"}
    index.collection.remove_file(next(e.sha256 for e in index.files() if e.file == "held"))
    assert {entry.file for entry in index.files()} == {"Minutes"}
    assert [*images.rglob("*.png")] == []


def test_a_replaced_image_leaves_no_file_behind(index, tmp_path):
    for colour in ("red", "blue"):
        image = make_image(tmp_path / f"{colour}.png", colour)
        index.insert_nodes([ImageNode(id_="same", image_path=str(image))])
    assert [path.name for path in index.collection.images_dir.rglob("*.png")] == ["blue.png"]


def test_indexing_files_leaves_them_alone(index, tmp_path):
    """Neither missing nor damaged, whatever indexing is told about files of the same name."""
    folder = tmp_path / "papers"
    folder.mkdir()
    (folder / "a.txt").write_text("turbines turn in the wind")
    name = (folder / "notes.txt").as_posix()
    index.insert_nodes([TextNode(text="own words", metadata={"file": name})])
    index.add(folder, prune=True)
    assert {entry.file for entry in index.files()} == {name, (folder / "a.txt").as_posix()}
    assert not index.collection.examine().damaged and index.collection.unfinished() == {}
    index.add(folder, prune=True)
    assert {hit.text for hit in find(index, "own wind")} == {
        "own words",
        "turbines turn in the wind",
    }


def test_a_file_that_was_read_goes_by_its_ref_doc_id(index, tmp_path):
    (tmp_path / "a.txt").write_text("turbines turn in the wind")
    index.add(tmp_path / "a.txt")
    (hit,) = find(index, "wind")
    index.delete_ref_doc(hit.node.ref_doc_id)
    assert index.files() == []


def test_a_document_that_lost_nodes_is_damaged_and_inserted_again(index):
    document = Document(id_="doc", text="fine words")
    index.insert(document)
    (node_id,) = [hit.node.node_id for hit in find(index, "words")]
    index.collection._engine.delete_ids([node_id])
    (lost,) = index.collection.examine().lost.items()
    assert (lost[0].doc_id, lost[1]) == ("doc", 1)
    assert index.refresh_ref_docs([document]) == [True]
    assert not index.collection.examine().damaged


def test_nodes_of_one_page_stand_for_themselves(index):
    """Unlike passages of a page that was read, there is no page that has their text."""
    nodes = [of("doc", text=f"words {n}", metadata={"page": 1}) for n in range(3)]
    index.insert_nodes(nodes)
    assert len(find(index, "words")) == 3


def test_they_are_filtered_by_their_metadata(index, tmp_path):
    index.insert_nodes(mixed(tmp_path))
    filters = MetadataFilters(filters=[MetadataFilter(key="year", value=2024)])
    assert [h.node.node_id for h in find(index, "turbines", filters=filters)] == ["photo"]
    in_minutes = MetadataFilters(filters=[MetadataFilter(key="file", value="Minutes")])
    assert [h.node.node_id for h in find(index, "turbines", filters=in_minutes)] == ["note"]


async def test_async_twins(index):
    await index.ainsert_nodes([TextNode(text="words", metadata={"file": "a"})])
    await index.ainsert(Document(id_="b", text="more words"))
    assert await index.arefresh_ref_docs([Document(id_="b", text="more words")]) == [False]
    await index.adelete_ref_doc("a")
    assert [entry.doc_id for entry in index.files()] == ["b"]
