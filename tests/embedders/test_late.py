"""Models with one vector a token: against transformers' own forward, and pooling against Ward."""

import itertools
import json

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import save_qwen2_vl
from tiny_cross import save_bert
from tiny_late import DIM, save_colpali, save_colqwen2
from transformers import AutoProcessor, ColPaliForRetrieval, ColQwen2ForRetrieval

from mmrag.content import Content
from mmrag.embedders import load_embedder
from mmrag.embedders.late import LateInteraction, load_token_embedder, max_sim
from mmrag.errors import ConfigError, ContentError, ModelError

st = pytest.importorskip("sentence_transformers")

MODELS = {"colqwen2": ColQwen2ForRetrieval, "colpali": ColPaliForRetrieval}
QUERIES = ["which page", "where does the report say how deep the wells of 1984 were?"]


@pytest.fixture(scope="module", params=MODELS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def folder(kind, tmp_path_factory):
    save = {"colqwen2": save_colqwen2, "colpali": save_colpali}[kind]
    return save(tmp_path_factory.mktemp(kind) / "tiny")


@pytest.fixture(scope="module")
def embedder(folder):
    return load_token_embedder(folder, device="cpu")


@pytest.fixture(scope="module")
def images():
    chance = np.random.default_rng(0)
    sizes = ((100, 120), (60, 200), (300, 150))
    return [Image.fromarray(chance.integers(0, 255, (*s, 3), dtype=np.uint8)) for s in sizes]


@pytest.fixture(scope="module")
def reference(kind, folder):
    """Tokens by transformers alone: one item at a time, no padding."""
    model = MODELS[kind].from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)

    def encode(**item):
        with torch.inference_mode():
            return model(**processor(**item)).embeddings[0].numpy()

    return encode


def test_tokens_are_those_of_the_models_own_forward(embedder, reference, images):
    documents = embedder.encode_documents([Content(image=image) for image in images])
    for tokens, image in zip(documents, images, strict=True):
        np.testing.assert_allclose(tokens, reference(images=[image]), atol=1e-5)
    for query in QUERIES:
        expected = reference(text=[query])
        np.testing.assert_allclose(embedder.encode_query(query), expected, atol=1e-5)
    assert embedder.dim == DIM and embedder.modalities == {"image"}


def test_max_sim_is_that_of_the_models_own_processor(folder, embedder, reference, images):
    processor = AutoProcessor.from_pretrained(folder)
    documents = embedder.encode_documents([Content(image=image) for image in images])
    queries = [embedder.encode_query(query) for query in QUERIES]
    ours = [[max_sim(query, document) for document in documents] for query in queries]
    theirs = processor.score_retrieval(
        [torch.from_numpy(query) for query in queries],
        [torch.from_numpy(reference(images=[image])) for image in images],
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_a_batch_moves_no_token(folder, embedder, images):
    contents = [Content(image=image) for image in images]
    alone = [embedder.encode_documents([content])[0] for content in contents]
    for batch_size in (2, 3):
        batched = load_token_embedder(folder, device="cpu", batch_size=batch_size)
        assert batched.fingerprint == embedder.fingerprint
        for one, other in zip(alone, batched.encode_documents(contents), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5)


def ward_clusters(points, count):
    """Merge the two clusters whose merger adds least to the spread, until ``count`` are left.

    Distances between clusters after Lance and Williams (1967), starting from cosine distances.
    """
    between = {
        frozenset((i, j)): 1 - float(points[i] @ points[j])
        for i, j in itertools.combinations(range(len(points)), 2)
    }
    members = {i: [i] for i in range(len(points))}
    while len(members) > count:
        closest = min(between, key=between.get)
        a, b = closest
        d_ab, new = between[closest], max(members) + 1
        for c in set(members) - {a, b}:
            n_a, n_b, n_c = (len(members[each]) for each in (a, b, c))
            squared = (
                (n_a + n_c) * between.pop(frozenset((a, c))) ** 2
                + (n_b + n_c) * between.pop(frozenset((b, c))) ** 2
                - n_c * d_ab**2
            ) / (n_a + n_b + n_c)
            between[frozenset((new, c))] = np.sqrt(squared)
        del between[closest]
        members[new] = members.pop(a) + members.pop(b)
    return members.values()


def test_pooled_tokens_are_the_means_of_wards_clusters(embedder, images):
    content = Content(image=images[0])
    (tokens,) = embedder.encode_documents([content])
    (pooled,) = embedder.encode_documents([content], pool_factor=3)
    clusters = ward_clusters(tokens.astype(np.float64), len(tokens) // 3)
    means = np.array([tokens[members].mean(axis=0) for members in clusters])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    assert pooled.shape == means.shape
    order, expected = (np.lexsort(each.round(3).T) for each in (pooled, means))
    np.testing.assert_allclose(pooled[order], means[expected], atol=1e-5)


def test_documents_that_cannot_be_embedded_are_named(embedder, tmp_path):
    with pytest.raises(ContentError, match=r"item 1: .* embeds documents of image, not text"):
        embedder.encode_documents([Content(image=Image.new("RGB", (60, 60))), Content("text")])
    with pytest.raises(ContentError, match=r"item 0: .*there is no such image"):
        embedder.encode_documents([Content(image=tmp_path / "gone.png")])


def test_models_with_one_vector_are_refused(tmp_path):
    qwen = save_qwen2_vl(tmp_path / "qwen")
    for name in ("mmrag-nano", qwen, save_bert(tmp_path / "bert")):
        with pytest.raises(ModelError, match="gives one vector for a whole text or image"):
            load_token_embedder(name, device="cpu")
    with pytest.raises(ConfigError, match=r"mmrag-nano.*gives one vector for a page"):
        LateInteraction(load_embedder("mmrag-nano", device="cpu"))
    config = qwen / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"auto_map": {}}))
    with pytest.raises(ModelError, match="needs code of its own"):
        load_token_embedder(qwen, device="cpu")
    config.unlink()
    (qwen / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="whose name ends in -hf"):
        load_token_embedder(qwen, device="cpu")


def test_a_pool_factor_below_one_is_refused(embedder):
    with pytest.raises(ConfigError, match="pool_factor=0"):
        LateInteraction(embedder, pool_factor=0.5)


def test_a_text_model_that_sentence_transformers_saved(tmp_path):
    """As ColBERT: documents are texts, whose first token is not pooled."""
    modules = pytest.importorskip("sentence_transformers.multi_vector_encoder.modules")
    base = pytest.importorskip("sentence_transformers.base.modules")
    backbone = base.Transformer(str(save_bert(tmp_path / "bert")))
    dense = base.Dense(32, 8, bias=False, module_input_name="token_embeddings")
    normal = base.Normalize(module_input_name="token_embeddings")
    model = st.MultiVectorEncoder(modules=[backbone, dense, modules.MultiVectorMask(), normal])
    model.save_pretrained(str(tmp_path / "colbert"))
    embedder = load_token_embedder(tmp_path / "colbert", device="cpu")
    assert embedder.modalities == {"text"} and embedder.dim == 8
    texts = ["solar cells make power from light", "wind"]
    whole = embedder.encode_documents([Content(text) for text in texts])
    theirs = model.encode_document(texts, convert_to_numpy=True)
    for tokens, expected in zip(whole, theirs, strict=True):
        np.testing.assert_allclose(tokens, expected, atol=1e-5)
    with pytest.raises(ModelError, match="pass it as late= or --late"):
        load_embedder(tmp_path / "colbert", device="cpu")
    pooled = embedder.encode_documents([Content(texts[0])], pool_factor=2)[0]
    assert len(pooled) == 1 + (len(whole[0]) - 1) // 2
    np.testing.assert_allclose(pooled[0], whole[0][0], atol=1e-6)
