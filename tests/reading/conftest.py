"""PDFs made for the tests of reading."""

import sys
from collections.abc import Callable
from pathlib import Path

import pymupdf
import pytest

from mmrag.errors import ReadError
from mmrag.reading import ReadOptions, ReadPage, read_file

SAMPLES = Path(__file__).parents[2] / "docs" / "samples"


class Reading:
    """What reading a file gave."""

    def __init__(self, pages: list[ReadPage], errors: list[ReadError]) -> None:
        self.pages = pages
        self.errors = errors
        self.nodes = [node for page in pages for node in page.nodes]

    def kind(self, kind: str) -> list:
        return [node for node in self.nodes if node.metadata["kind"] == kind]

    def text(self, page: int) -> str:
        (node,) = [n for n in self.kind("page") if n.metadata["page"] == page]
        return node.get_content()


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., Reading]:
    def run(path: Path, **options: object) -> Reading:
        errors: list[ReadError] = []
        pages = read_file(path, tmp_path / "images", ReadOptions(**options), errors.append)
        return Reading(list(pages), errors)

    return run


@pytest.fixture
def make_pdf(tmp_path: Path) -> Callable[..., Path]:
    """Save a document that a function draws; keywords go to ``save``."""

    def make(draw: Callable[[pymupdf.Document], None], name: str = "a.pdf", **save: object) -> Path:
        with pymupdf.open() as document:
            draw(document)
            document.save(tmp_path / name, **save)
        return tmp_path / name

    return make


@pytest.fixture(scope="session")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample PDFs of the demo."""
    sys.path.insert(0, str(SAMPLES))
    try:
        import make_samples
    finally:
        sys.path.pop(0)
    folder = tmp_path_factory.mktemp("samples")
    make_samples.main(folder)
    return folder
