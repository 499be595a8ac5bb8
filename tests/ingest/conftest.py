"""An index for tests of what is read from elsewhere."""

import pytest
from fakes import FakeEmbedder

from mmrag.index import UniversalIndex
from mmrag.reading import ReadOptions


@pytest.fixture
def index(tmp_path, monkeypatch):
    """In ``library``, which is new; the folder of the test is the current one."""
    monkeypatch.chdir(tmp_path)
    options = ReadOptions(dpi=50, passage_words=20, passage_overlap=0)
    embedder = FakeEmbedder(modalities=("text",))
    with UniversalIndex(tmp_path / "library", embedder, reading=options) as opened:
        yield opened
