"""The notebook of the documentation runs from top to bottom, and shows what it says."""

from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


def printed(cell):
    return "".join(
        output.get("text", "") or output.get("data", {}).get("text/plain", "")
        for output in cell.get("outputs", ())
    )


def test_the_notebook_runs():
    pytest.importorskip("ipykernel", reason="needs pip install ipykernel")
    nbclient = pytest.importorskip("nbclient", reason="needs pip install nbclient")
    import nbformat

    notebook = nbformat.read(DOCS / "notebook.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # they would grow old
    resources = {"metadata": {"path": str(DOCS)}}
    nbclient.NotebookClient(notebook, timeout=300, resources=resources).execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    said = {cell.source.splitlines()[0]: printed(cell) for cell in code}
    assert "4 files, 11 pages" in said["from mmrag import UniversalIndex"]
    assert "season-report.pdf  page 1" in said["retriever = index.as_retriever(similarity_top_k=3)"]
    assert "40 euros" in said["engine = index.as_query_engine()"]
    assert "handbook.pdf, page" in said["engine = index.as_query_engine()"]
    filtered = said["from llama_index.core.vector_stores import MetadataFilter, MetadataFilters"]
    assert "handbook.pdf" in filtered and "season-report.pdf" not in filtered
    assert "[1] handbook.pdf, page 4" in said["from collections.abc import Generator"]
    images = [
        output
        for cell in code
        for output in cell.outputs
        if "image/png" in output.get("data", {}) or "image/jpeg" in output.get("data", {})
    ]
    assert len(images) == 2
