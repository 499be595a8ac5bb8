"""The code of docs/integrations.md runs, in order, with a stand-in for the model."""

import re
from pathlib import Path
from unittest import mock

import pytest
from fakes import FakeEmbedder, make_image

from mmrag import UniversalIndex

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "integrations.md").read_text(encoding="utf-8")


def run(title):
    """Run the blocks of one section; returns what they have defined."""
    (section,) = re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)
    scope: dict = {}
    blocks = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, f"docs/integrations.md, {title}", "exec"), scope)
    return scope


@pytest.fixture(autouse=True)
def library(tmp_path, monkeypatch):
    """A folder with the collection and the image that the page names."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mmrag.embedders.load_embedder", lambda *_, **__: FakeEmbedder())
    make_image(tmp_path / "page.png")
    Path("well.txt").write_text("The well is nine metres deep.")
    with UniversalIndex("library", FakeEmbedder()) as index:
        index.add(["well.txt", "page.png"])


def test_haystack(monkeypatch):
    pytest.importorskip("haystack")
    monkeypatch.syspath_prepend(str(ROOT / "integrations" / "mmrag-haystack"))
    scope = run("Haystack")
    assert "MMRAGRetriever" in scope["stored"]
    (found,) = scope["result"]["retriever"]["documents"]
    assert found.content == "The deductible is $500."
    (page,) = scope["pages"]["retriever"]["documents"]
    assert page.content == "The well is nine metres deep."


def test_sentence_transformers(monkeypatch):
    pytest.importorskip("sentence_transformers")
    monkeypatch.syspath_prepend(str(ROOT / "integrations" / "sentence-transformers-mmrag"))
    scope = run("sentence-transformers")
    assert scope["scores"].argmax() == 0
    texts = ["The deductible is $500.", "Bananas are yellow."]
    assert scope["again"].encode_document(texts) == pytest.approx(scope["texts"], abs=1e-5)
    assert scope["images"].shape == scope["both"].shape == (1, 384)


def test_mteb(monkeypatch):
    mteb = pytest.importorskip("mteb")
    mocks = pytest.importorskip("mteb.mocks")
    registry = pytest.importorskip("mteb.models.model_implementations").MODEL_REGISTRY
    monkeypatch.syspath_prepend(str(ROOT / "integrations" / "mteb-mmrag"))
    monkeypatch.setattr("mmrag.embedders.load_embedder", lambda name, **_: FakeEmbedder(name))
    monkeypatch.setattr(mteb, "get_tasks", lambda names: [mocks.MockRetrievalTask()])
    with mock.patch.dict(registry):
        scope = run("mteb")
    assert scope["model"].embedder.name == "mmrag-nano"
    (task,) = scope["results"].task_results
    assert task.get_score() > 0
    assert list(Path("results").rglob("MockRetrievalTask.json"))


def test_langchain(monkeypatch):
    pytest.importorskip("langchain_core")
    monkeypatch.syspath_prepend(str(ROOT / "integrations" / "langchain-mmrag"))
    scope = run("LangChain")
    assert scope["found"][0].page_content == "The deductible is $500."
    assert [document.page_content for document in scope["one"]] == ["The well is nine metres deep."]
    assert {Path(each.metadata["file"]).name for each in scope["documents"]} == {
        "well.txt",
        "page.png",
    }
    assert scope["similar"][0].metadata["image_path"].endswith(".png")
