"""What smaller vectors cost is measured against exact search."""

import json

import numpy as np
import pytest
from fakes import FakeEmbedder
from llama_index.core.schema import TextNode
from PIL import Image
from typer.testing import CliRunner

from mmrag.cli.app import app
from mmrag.errors import ConfigError
from mmrag.evaluation.storage import measure_storage, plot_storage
from mmrag.index import UniversalIndex
from mmrag.store.collection import Collection, CollectionSettings


@pytest.fixture
def collection(tmp_path):
    """200 vectors of 64 dimensions, in clusters of ten; the last 32 dimensions are small."""
    chance = np.random.default_rng(0)
    rows = chance.standard_normal((20, 64)).repeat(10, axis=0)
    rows = rows + 0.5 * chance.standard_normal(rows.shape)
    rows[:, 32:] *= 0.1
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    settings = CollectionSettings("m", "1", 64, ("text",))
    with Collection.open(tmp_path / "library", settings=settings) as collection:
        nodes = [TextNode(text=f"node {number}") for number in range(len(rows))]
        collection.write(nodes, [{"text": row} for row in rows])
        yield collection


def by_setting(measured):
    return {(each.dim, each.quantization): each for each in measured}


def test_whole_vectors_lose_nothing_and_shorter_ones_are_told(collection):
    measured = by_setting(measure_storage(collection, "text", dims=(4, 32, 64), n_queries=50))
    assert measured[64, "none"].recall == 1.0
    # Which vectors are asked for is left to chance: of some, half the dimensions lose nothing.
    assert measured[4, "none"].recall < measured[32, "none"].recall <= 1.0
    assert measured[64, "int8"].recall > 0.97
    assert [measured[64, name].bytes_per_vector for name in ("none", "int8", "binary")] == [
        256,
        64,
        8,
    ]
    assert all(0 < each.p50_ms <= each.p99_ms for each in measured.values())


def test_recall_is_that_of_an_independent_count(collection):
    """At four dimensions, by plain sorting."""
    _, rows = collection.vectors("text")
    queries = rows[:5]
    (measured,) = measure_storage(
        collection, "text", queries=queries, dims=(4,), quantizations=("none",)
    )
    cut = rows[:, :4] / np.linalg.norm(rows[:, :4], axis=1, keepdims=True)
    found = 0
    for row in range(5):
        exact = np.argsort(-(rows @ rows[row]), kind="stable")[:10]
        short = np.argsort(-(cut @ cut[row]), kind="stable")[:10]
        found += len(set(exact.tolist()) & set(short.tolist()))
    assert measured.recall == pytest.approx(found / 50)


def test_too_few_vectors_are_refused(tmp_path):
    settings = CollectionSettings("m", "1", 4, ("text",))
    with (
        Collection.open(tmp_path / "library", settings=settings) as collection,
        pytest.raises(ConfigError, match="Index more files"),
    ):
        measure_storage(collection, "text")


def test_the_plot_is_an_image(collection, tmp_path):
    pytest.importorskip("matplotlib")
    measured = measure_storage(collection, "text", dims=(32, 64), n_queries=5)
    plot_storage(measured, tmp_path / "plot.png")
    assert Image.open(tmp_path / "plot.png").size == (700, 450)
    with pytest.raises(ConfigError, match=r"plot\.nothing"):
        plot_storage(measured, tmp_path / "plot.nothing")


def test_the_command(tmp_path):
    papers = tmp_path / "papers"
    papers.mkdir()
    for number in range(12):
        (papers / f"{number}.txt").write_text(f"paper {number} is about subject {number}")
    folder = str(tmp_path / "library")
    with UniversalIndex(folder, FakeEmbedder(), views=["text"]) as index:
        index.add(papers)
    done = CliRunner().invoke(app, ["report", "-c", folder, "--json"])
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)
    assert [row["quantization"] for row in rows] == ["none", "int8", "binary"]
    assert rows[0]["recall"] == 1.0
