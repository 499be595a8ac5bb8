"""A small library with questions whose right pages are known."""

import pytest
from fakes import FakeEmbedder, make_node

from mmrag.evaluation.questions import Question, numbered
from mmrag.index import UniversalIndex
from mmrag.store.collection import Collection, CollectionSettings
from mmrag.store.entries import FileEntry

TOPICS = ("apple", "boiler", "copper", "dental", "engine", "falcon", "garden", "harbour")
DOCUMENTS = "abc"


@pytest.fixture
def embedder():
    return FakeEmbedder(dim=64)


@pytest.fixture
def library(tmp_path, embedder):
    """Words say which page is right; vectors point at the page behind it."""
    settings = CollectionSettings(embedder.name, embedder.fingerprint, 64, views=("text",))
    with Collection.open(tmp_path / "c", settings=settings) as collection:
        for document in DOCUMENTS:
            file, sha256 = f"{document}.pdf", document * 64
            for page, topic in enumerate(TOPICS, start=1):
                node = make_node(f"{topic} report {document}", file=file, sha256=sha256, page=page)
                other = f"{TOPICS[page - 2]} report {document}"
                collection.write([node], [{"text": embedder.encode([other])[0]}])
            collection.mark_done(FileEntry(file, sha256, len(TOPICS), len(TOPICS)))
    embedder.calls.clear()
    with UniversalIndex(tmp_path / "c", embedder) as index:
        yield index


@pytest.fixture
def questions():
    return numbered(
        [
            Question(
                f"{topic} report {document}",
                ((f"{document}.pdf", page),),
                kind="first half" if page <= 4 else "second half",
            )
            for document in DOCUMENTS
            for page, topic in enumerate(TOPICS, start=1)
        ]
    )
