"""Weights fitted to questions."""

import numpy as np
import pytest
from fakes import FakeEmbedder, make_node

from mmrag.errors import ContentError
from mmrag.evaluation.questions import Question
from mmrag.evaluation.tuning import tune
from mmrag.retrieval.retriever import UniversalRetriever
from mmrag.store.collection import Collection, CollectionSettings

TOPICS = ("apple", "boiler", "copper", "dental", "engine", "falcon", "garden", "harbour")


def question(document, topic):
    return Question(f"{topic} report", ((f"{document}.pdf", TOPICS.index(topic) + 1),))


@pytest.fixture
def misled(tmp_path):
    """Words say which page is right; vectors point at the page behind it."""
    embedder = FakeEmbedder(dim=64)
    settings = CollectionSettings(embedder.name, embedder.fingerprint, 64, views=("text",))
    with Collection.open(tmp_path / "c", settings=settings) as collection:
        for document in "abc":
            for page, topic in enumerate(TOPICS, start=1):
                text = f"{topic} report {document}"
                other = f"{TOPICS[page - 2]} report"
                node = make_node(text, file=f"{document}.pdf", sha256=document * 64, page=page)
                collection.write([node], [{"text": embedder.encode([other])[0]}])
        yield UniversalRetriever(collection, embedder, weights={"text": 3, "bm25": 0.1})


def asked(words="report"):
    return [
        Question(f"{topic} {words} {document}", ((f"{document}.pdf", page),))
        for document in "abc"
        for page, topic in enumerate(TOPICS, start=1)
    ]


def test_the_better_ranking_gets_the_weight(misled):
    found = tune(misled, asked())
    assert found.weights["bm25"] > found.weights["text"]
    # As much as before: a page that a question names keeps its weight beside them.
    assert sum(found.weights.values()) == pytest.approx(3.1)
    assert found.after > found.before
    assert found.low > 0
    assert not found.within_noise
    assert (found.n_questions, found.n_documents) == (24, 3)


def test_the_gain_is_that_of_documents_left_out(misled):
    """Judged with the fitted weights, the left-out questions give the same mean."""
    found = tune(misled, asked())
    fitted = UniversalRetriever(misled.collection, misled.embedder, 10, weights=found.weights)
    gains = []
    for each in asked():
        pages = [(hit.metadata["file"], hit.metadata["page"]) for hit in fitted.search(each.text)]
        (right,) = each.pages
        gains.append(1 / np.log2(pages.index(right) + 2) if right in pages else 0)
    assert found.after == pytest.approx(np.mean(gains), abs=0.02)


def test_no_gain_is_within_noise(misled):
    best = UniversalRetriever(misled.collection, misled.embedder, weights={"text": 0, "bm25": 1})
    found = tune(best, asked())
    assert found.weights == {"bm25": 1.0}
    assert found.within_noise


def test_one_document_is_not_enough(misled):
    with pytest.raises(ContentError, match="two documents"):
        tune(misled, asked()[:8])
