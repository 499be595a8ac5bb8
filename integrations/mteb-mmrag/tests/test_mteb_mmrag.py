"""mteb's own check of a model, its wrappers, and models of mmrag found by name."""

import json
import re
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

mteb = pytest.importorskip("mteb")

from mteb.mocks import (
    ALL_MOCK_TASK_TEST_GRID,
    MockAny2AnyRetrievalI2TTask,
    MockAny2AnyRetrievalT2ITask,
    MockRetrievalTask,
)
from mteb.models import CachedEmbeddingWrapper, CompressionWrapper
from mteb.models.model_implementations import MODEL_REGISTRY
from mteb.models.models_protocols import CrossEncoderProtocol, EncoderProtocol
from mteb.results import TaskResult

import mmrag
from mmrag import Content, load_embedder
from mmrag.errors import ConfigError
from mteb_mmrag import MTEBEncoder, register
from mteb_mmrag.__main__ import main

# What mteb warns of with tasks as small as these.
pytestmark = pytest.mark.filterwarnings("ignore:::mteb")
NAME = "mmrag/mmrag-nano"
README = Path(__file__).parents[1] / "README.md"


class StubEmbedder:
    """A stand-in for a model: texts by their letters, images by their first pixels."""

    family, dim, fingerprint = "stub", 26, "first"
    modalities = frozenset({"text", "image", "fused"})

    def __init__(self, name="mmrag-nano"):
        self.name = name
        self.encoded = 0

    def encode(self, contents, instruction=None, dim=None, progress=False):
        self.encoded += len(contents)
        rows = [self._row(content) for content in contents]
        vectors = np.array(rows, dtype=np.float32)[:, : dim or self.dim]
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def _row(self, content):
        text = (content.text or "").lower()
        row = np.array([0.1 + text.count(chr(97 + place)) for place in range(self.dim)])
        for image in content.images:
            row += np.asarray(image.convert("L")).ravel()[: self.dim] / 255
        return row


@pytest.fixture(autouse=True)
def _registry():
    with mock.patch.dict(MODEL_REGISTRY):
        yield


@pytest.fixture
def stub():
    return StubEmbedder()


@pytest.fixture(scope="module")
def nano():
    return load_embedder("mmrag-nano", device="cpu")


@pytest.fixture
def run(tmp_path):
    """Evaluate without progress bars, by default filed in a folder of the test."""

    def evaluate(model, *tasks, cache="results", **options):
        return mteb.evaluate(
            model,
            tasks or [MockRetrievalTask()],
            cache=cache and mteb.ResultCache(tmp_path / cache),
            co2_tracker=False,
            show_progress_bar=False,
            encode_kwargs={"show_progress_bar": False},
            **options,
        )

    return evaluate


def test_the_encoder_is_the_one_of_mmrag():
    assert MTEBEncoder is mmrag.MTEBEncoder


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_mteb_finds_nothing_wrong_with_a_model_that_it_has_found_by_name(nano):
    """``mteb.mock_run``: every type of task there is, made up by mteb."""
    register(MTEBEncoder(nano))
    model = mteb.get_model(NAME)
    found = mteb.mock_run(model)
    assert found.model_name == NAME
    possible = {
        task.metadata.name
        for task in ALL_MOCK_TASK_TEST_GRID
        if set(task.metadata.modalities) <= {"text", "image"}
    }
    assert len(possible) > 40
    # mteb counts a task that fails for a missing library as passed.
    failed = {
        name: result for name, result in found.items() if not isinstance(result, TaskResult | None)
    }
    assert not failed
    assert {name for name, result in found.items() if result is not None} == possible
    # All scores of this task are equal, so they have no rank correlation.
    constant = {"MockVisualSTS"}
    for name in possible - constant:
        assert np.isfinite(found[name].get_score()), name


@pytest.mark.parametrize(
    "make", [MockRetrievalTask, MockAny2AnyRetrievalI2TTask, MockAny2AnyRetrievalT2ITask]
)
def test_mteb_ranks_by_the_cosines_of_the_embedder(run, stub, tmp_path, make):
    task = make()
    task.load_data()
    split = task.dataset["default"]["test"]
    run(MTEBEncoder(stub), task, prediction_folder=tmp_path / "predictions")
    (path,) = (tmp_path / "predictions").rglob("*.json")
    predicted = json.loads(path.read_text())["default"]["test"]

    def vectors(rows):
        contents = {
            # mteb puts a title in front of its text.
            row["id"]: Content(
                " ".join(filter(None, map(row.get, ("title", "text")))), row.get("image")
            )
            for row in rows
        }
        return {key: stub.encode([content])[0] for key, content in contents.items()}

    queries, documents = vectors(split["queries"]), vectors(split["corpus"])
    assert predicted.keys() == queries.keys()
    for query, scores in predicted.items():
        assert scores.keys() == documents.keys()
        for document, score in scores.items():
            assert score == pytest.approx(queries[query] @ documents[document], abs=1e-5)


def test_a_registered_model_is_found_by_name(stub):
    meta = register(MTEBEncoder(stub))
    assert mteb.get_model_meta(NAME) is meta
    assert NAME in [each.name for each in mteb.get_model_metas(modalities=["image", "text"])]
    model = mteb.get_model(NAME, device="cuda:7")
    assert isinstance(model, MTEBEncoder)
    assert isinstance(model, EncoderProtocol)
    assert not isinstance(model, CrossEncoderProtocol)
    assert model.embedder is stub
    assert model.mteb_model_meta.revision == meta.revision == "first"
    with pytest.raises(ValueError, match="Expected first"):
        mteb.get_model(NAME, revision="second")
    with pytest.raises(ConfigError, match="dtype: mmrag/mmrag-nano is loaded already"):
        mteb.get_model(NAME, dtype="float16")


def test_the_last_registered_model_of_a_name_is_found(stub):
    register(MTEBEncoder(stub))
    register(MTEBEncoder(other := StubEmbedder()))
    register(MTEBEncoder(StubEmbedder("a/b")))
    assert mteb.get_model(NAME).embedder is other


def test_settings_of_the_encoder_are_kept(stub):
    given = {"MockRetrievalTask": "Find it."}
    register(MTEBEncoder(stub, dim=20, instructions=given, name="me/mine"))
    model = mteb.get_model("me/mine")
    assert (model.dim, model.instructions) == (20, given)
    smaller = mteb.get_model("me/mine", embed_dim=8)
    assert (smaller.dim, smaller.instructions) == (8, given)
    assert smaller.mteb_model_meta.name == model.mteb_model_meta.name == "me/mine"
    with pytest.raises(ConfigError, match="dim=27"):
        mteb.get_model("me/mine", embed_dim=27)


def test_results_of_a_name_are_filed_and_read_back_as_those_of_the_encoder(run, stub, tmp_path):
    encoder = MTEBEncoder(stub)
    meta = register(encoder)
    score = run(meta).task_results[0].get_score()
    done = stub.encoded
    assert done == 8
    for same in (encoder, mteb.get_model(NAME), meta):
        assert run(same).task_results[0].get_score() == pytest.approx(score, abs=1e-5)
    assert stub.encoded == done
    run(mteb.get_model(NAME, embed_dim=8))
    assert stub.encoded == 2 * done

    cache = mteb.ResultCache(tmp_path / "results")
    loaded = cache.load_results(models=[NAME], tasks=["MockRetrievalTask"])
    (model,) = loaded.model_results
    assert (model.model_name, model.model_revision) == (NAME, "first")
    assert model.task_results[0].get_score() == pytest.approx(score, abs=1e-5)


def test_vectors_that_mteb_has_kept_are_not_made_again(run, stub, tmp_path):
    register(MTEBEncoder(stub))
    for folder, total in (("once", 4), ("once", 4), ("again", 8)):
        kept = CachedEmbeddingWrapper(mteb.get_model(NAME), tmp_path / folder)
        run(kept, MockAny2AnyRetrievalT2ITask(), cache=None)
        assert stub.encoded == total


def test_a_wrapper_leaves_the_registered_model_as_it_is(run, stub):
    register(MTEBEncoder(stub))
    compressed = CompressionWrapper(mteb.get_model(NAME))
    assert run(compressed).task_results[0].get_score() > 0
    assert compressed.mteb_model_meta.experiment_kwargs == {"output_dtypes": "int8"}
    assert mteb.get_model(NAME).mteb_model_meta.experiment_kwargs is None
    assert mteb.get_model_meta(NAME).experiment_kwargs is None


@pytest.mark.parametrize(
    ("options", "device", "revision"),
    [([], "auto", None), (["--device", "1", "--model-revision", "v2"], "cuda:1", "v2")],
)
def test_the_command_runs_a_model_of_mmrag(stub, tmp_path, monkeypatch, options, device, revision):
    asked = {}

    def load(name, **settings):
        asked.update(settings, name=name)
        return stub

    monkeypatch.setattr("mteb_mmrag.__main__.load_embedder", load)
    monkeypatch.setattr(mteb, "get_tasks", lambda tasks, **_: [MockRetrievalTask()])
    place = ["--output-folder", str(tmp_path / "filed")]
    main(["run", "-m", "my-checkpoint", "-t", "MockRetrievalTask", *place, *options])
    assert asked == {"name": "my-checkpoint", "device": device, "revision": revision}
    filed = tmp_path / "filed" / "results" / "mmrag__mmrag-nano" / "first"
    assert (filed / "MockRetrievalTask.json").is_file()


def test_the_command_checks_a_model_of_mmrag(stub, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mteb_mmrag.__main__.load_embedder", lambda *_, **__: stub)
    monkeypatch.setattr("mteb.mocks.mock_run.ALL_MOCK_TASK_TEST_GRID", [MockRetrievalTask()])
    main(["mock-run", "-m", "mmrag-nano", "--device", "cpu"])
    assert f"`{NAME}` passed all expected checks" in capsys.readouterr().out


def test_the_command_says_what_cannot_be_loaded(tmp_path):
    with pytest.raises(SystemExit, match=r"error: .*gone"):
        main(["run", "-m", str(tmp_path / "gone"), "-t", "NFCorpus"])


def test_other_commands_of_mteb_are_as_they_are(capsys):
    main(["available-tasks", "-t", "NFCorpus"])
    assert "NFCorpus" in capsys.readouterr().out


def test_the_examples_of_the_readme_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mteb, "get_tasks", lambda tasks: [MockRetrievalTask()])
    scope = {}
    for block in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL):
        exec(compile(block, str(README), "exec"), scope)
    assert scope["results"].task_results[0].get_score() > 0
    assert (scope["model"].dim, scope["smaller"].dim) == (384, 64)
