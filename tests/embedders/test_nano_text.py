"""Questions for mmrag-nano in NumPy, against the model itself."""

import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from mmrag import UniversalIndex, load_embedder
from mmrag.embedders.nano_text import QuestionEmbedder, gelu, open_question_embedder
from mmrag.errors import ConfigError, ContentError

TEXTS = [
    "wind",
    "How deep is the well by the orchard, and who inspected it on 29 October 2024?",
    "Zuschüsse für Wärmepumpen \u2014 ¿cuánto cuesta? 浇水 \u0627\u0644\u0645\u0627\u0621",
    "x" * 400,
    "the rain and the pump " * 60,
]


@pytest.fixture(scope="module")
def nano():
    return load_embedder("mmrag-nano", device="cpu", dtype="float32")


@pytest.fixture
def quick(nano):
    loads = []
    found = open_question_embedder("mmrag-nano", nano.fingerprint, lambda: loads.append(1) or nano)
    assert isinstance(found, QuestionEmbedder)
    found.loads = loads
    return found


def test_vectors_are_those_of_the_model(nano, quick):
    vectors = quick.encode(TEXTS, "page_for_question")
    assert np.abs(vectors - nano.encode(TEXTS, "page_for_question")).max() < 1e-5
    assert vectors.dtype == np.float32
    assert not quick.loads
    assert quick.encode([]).shape == (0, nano.dim)
    cut = quick.encode(TEXTS[:1], dim=64)
    assert np.allclose(cut, nano.encode(TEXTS[:1], dim=64), atol=1e-5)


def test_it_says_of_itself_what_the_model_says(nano, quick):
    names = ("name", "family", "dim", "modalities", "fingerprint", "calibration")
    for name in (*names, "matryoshka_dims", "prefers_text", "prefers_passages"):
        assert getattr(quick, name) == getattr(nano, name), name


IMAGE = Image.new("RGB", (60, 60), "red")


@pytest.mark.parametrize(
    "contents", [[IMAGE], ["red", {"text": "red", "image": IMAGE}], ["rain " * 600], ["rain"] * 400]
)
def test_images_and_many_words_go_to_the_model(contents, nano, quick):
    assert np.array_equal(quick.encode(contents), nano.encode(contents))
    assert quick.loads == [1]
    # Once it is there, it reads all.
    assert np.array_equal(quick.encode(["rain"]), nano.encode(["rain"]))
    assert quick.loads == [1]


def test_bad_input_is_refused_without_the_model(quick):
    with pytest.raises(ConfigError, match="dim=999"):
        quick.encode(["rain"], dim=999)
    with pytest.raises(ContentError, match="put it in a list"):
        quick.encode("rain")
    assert not quick.loads


def test_a_pickled_one_works(nano):
    quick = open_question_embedder("mmrag-nano", nano.fingerprint, dict)
    again = pickle.loads(pickle.dumps(quick))
    assert np.array_equal(again.encode(["rain"]), quick.encode(["rain"]))


def test_other_weights_and_other_families_are_left_to_the_loader(qwen2_vl_folder):
    assert open_question_embedder("mmrag-nano", "0" * 16, dict) is None
    assert open_question_embedder(qwen2_vl_folder, "0" * 16, dict) is None


def test_gelu_is_that_of_torch():
    x = np.linspace(-9, 9, 20_001, dtype=np.float32)
    expected = torch.nn.functional.gelu(torch.from_numpy(x).double()).numpy()
    assert np.abs(gelu(x) - expected).max() < 1e-6


def test_a_search_imports_no_torch(tmp_path):
    (tmp_path / "well.md").write_text("The well is nine metres deep.")
    with UniversalIndex(tmp_path / "library") as index:
        index.add(tmp_path / "well.md")
    program = f"""
import sys
from mmrag.cli.app import main
sys.argv = ["mmrag", "search", "depth", "--collection", {str(tmp_path / "library")!r}]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
heavy = {{"torch", "transformers", "pymupdf"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "nine metres" in done.stdout
