"""UniversalModule in a SentenceTransformer: the vectors of UniversalEmbedding, saved and loaded."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image
from tiny_adapters import adapter_weights, save_adapter
from tiny_nano import save_nano

from mmrag.embedding import UniversalEmbedding
from mmrag.errors import ConfigError, ContentError, ModelError

st = pytest.importorskip("sentence_transformers")
modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
ours = pytest.importorskip("mmrag.embedders.st_module")

IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8))
PROMPTS = {"query": "page_for_question"}


@pytest.fixture(scope="module", params=["gme", "nano"])
def folder(request, tmp_path_factory, qwen2_vl_folder):
    """A checkpoint of a large family, and one of the architecture of the shipped one."""
    place = tmp_path_factory.mktemp("checkpoint") / request.param
    if request.param == "nano":
        return save_nano(place)
    shutil.copytree(qwen2_vl_folder, place)
    (place / "mmrag.json").write_text(json.dumps({"family": "gme"}))
    return place


@pytest.fixture(scope="module")
def model(folder):
    parts = [ours.UniversalModule(folder), modules.Normalize()]
    return st.SentenceTransformer(modules=parts, device="cpu", prompts=PROMPTS)


@pytest.fixture(scope="module")
def embedding(folder):
    return UniversalEmbedding(str(folder), device="cpu")


def same(theirs, ours):
    np.testing.assert_allclose(np.asarray(theirs), np.asarray(ours), atol=1e-5)


def test_vectors_are_those_of_universal_embedding(model, embedding):
    texts = ["find the page", "a", "the well is nine metres deep"]
    same(model.encode_document(texts), embedding.get_text_embedding_batch(texts))
    same(model.encode_query(texts), [embedding.get_query_embedding(text) for text in texts])
    same(model.encode([IMAGE]), [embedding.get_image_embedding(IMAGE)])
    both = {"text": "a page", "image": IMAGE}
    same(model.encode([both]), [embedding.get_fused_embedding("a page", IMAGE)])
    asked = embedding.get_query_image_embedding(IMAGE, "a page")
    same(model.encode_query([both]), [asked])
    assert model.get_embedding_dimension() == embedding.embedder.dim


def test_a_prompt_is_the_instruction(model, embedding):
    told = embedding.embedder.encode(["find the page"], "Find a plan.")
    same(model.encode(["find the page"], prompt="Find a plan."), told)
    with pytest.raises(ConfigError, match="page_for_question"):
        model.encode(["x"], prompt="page_for_qestion")


def test_a_name_of_an_image_file_is_an_image(model, embedding, tmp_path):
    IMAGE.save(tmp_path / "page.png")
    same(model.encode([str(tmp_path / "page.png")]), [embedding.get_image_embedding(IMAGE)])
    words = "see page.png for more"
    same(model.encode([words]), [embedding.get_text_embedding(words)])


def test_an_adapter_is_saved_with_its_base(qwen2_vl_folder, tmp_path):
    adapter = save_adapter(tmp_path / "adapter", adapter_weights(), qwen2_vl_folder)
    (adapter / "mmrag.json").write_text(json.dumps({"family": "gme", "max_length": 77}))
    module = ours.UniversalModule(adapter)
    module.save(str(tmp_path / "saved"))
    saved = UniversalEmbedding(str(tmp_path / "saved"), device="cpu")
    stated = UniversalEmbedding(str(adapter), device="cpu")
    same(saved.get_query_embedding("a page"), stated.get_query_embedding("a page"))
    assert json.loads((tmp_path / "saved" / "mmrag.json").read_text())["max_length"] == 77


def test_a_saved_model_gives_the_same_vectors(model, embedding, tmp_path):
    model.save_pretrained(str(tmp_path / "saved"))
    again = st.SentenceTransformer(str(tmp_path / "saved"), device="cpu", trust_remote_code=True)
    assert again.prompts["query"] == "page_for_question"
    same(again.encode_query(["a page"]), [embedding.get_query_embedding("a page")])
    same(again.encode([IMAGE]), [embedding.get_image_embedding(IMAGE)])
    # mmrag reads the folder as well.
    reread = UniversalEmbedding(str(tmp_path / "saved"), device="cpu")
    assert reread.embedder.family == embedding.embedder.family
    same(reread.get_query_embedding("a page"), embedding.get_query_embedding("a page"))


def test_a_model_is_not_saved_over_its_own_files(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(folder.parent)
    module = ours.UniversalModule(folder.name)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="cannot be written over"):
        module.save(str(folder))


def test_inputs_that_cannot_be_embedded_are_refused(model, tmp_path):
    with pytest.raises(ContentError, match="no such image"):
        model.encode([{"image": str(tmp_path / "gone.png")}])
    with pytest.raises(ContentError, match="web addresses are not followed"):
        model.encode(["http://localhost/page.png"])
