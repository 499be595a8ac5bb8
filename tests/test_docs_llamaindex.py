"""The code of docs/llamaindex.md runs, in order, with a stand-in for the model."""

import re
from pathlib import Path

import pytest
from fakes import FakeEmbedder, Scripted, make_image
from llama_index.core import Settings

import mmrag

ROOT = Path(__file__).parents[1]


@pytest.mark.filterwarnings("ignore:Payload indexes have no effect")
def test_code_in_the_llamaindex_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "integrations" / "llama-index-embeddings-mmrag"))
    monkeypatch.setattr("mmrag.embedders.load_embedder", lambda *_, **__: FakeEmbedder())
    monkeypatch.setattr(Settings, "_embed_model", None)
    for name in ("page.png", "figure.png", "photo.jpg"):
        make_image(tmp_path / name)
    text = (ROOT / "docs" / "llamaindex.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 6
    scope: dict = {"llm": Scripted(["Nine thousand euros [1]."])}
    monkeypatch.setattr(Settings, "_llm", None)
    for block in blocks:
        exec(compile(block, "docs/llamaindex.md", "exec"), scope)
    hits = scope["index"].as_retriever(similarity_top_k=2).retrieve("the deductible is $500.")
    assert {hit.node.metadata["page"] for hit in hits} == {1, 3}
    assert {entry.file for entry in scope["library"].files()} == {
        "Minutes",
        "photo.jpg",
        "report.pdf",
    }
    assert [hit.node.metadata["title"] for hit in scope["hits"]] == ["Minutes"]
    assert str(scope["answer"]) == "Nine thousand euros [1]."
    assert len(scope["chat"].chat_history) == 2
    scope["library"].close()
    assert scope["UniversalEmbedding"] is mmrag.UniversalEmbedding
