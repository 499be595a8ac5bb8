"""What sentence-transformers asks of a module and does with a model, over the shipped embedder.

Expected vectors are those of ``load_embedder``, and scores are computed from them.
"""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

st = pytest.importorskip("sentence_transformers")

from sentence_transformers.base.modules import InputModule
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.evaluation import (
    EmbeddingSimilarityEvaluator,
    InformationRetrievalEvaluator,
    RerankingEvaluator,
    TripletEvaluator,
)
from sentence_transformers.util import semantic_search

from mmrag import Content, load_embedder
from mmrag.embedders import st_module
from mmrag.errors import ConfigError, ModelError
from mmrag.instructions import TASKS
from sentence_transformers_mmrag import UniversalModule, load

README = Path(__file__).parents[1] / "README.md"
TEXTS = [
    "The well is nine metres deep.",
    "Bananas are yellow.",
    "The deductible is $500, and it is paid once a year by each member of the family.",
    "a",
]
QUESTIONS = ["How deep is the well?", "What colour is a banana?", "How high is the deductible?"]
ASKED = TASKS["page_for_question"]


def picture(colour):
    return Image.new("RGB", (56, 56), colour)


PICTURES = [picture("red"), picture("blue")]
BOTH = [{"text": "a red page", "image": PICTURES[0]}, {"text": "a sea", "image": PICTURES[1]}]


@pytest.fixture(scope="module")
def model():
    return load("mmrag-nano", device="cpu")


@pytest.fixture(scope="module")
def embedder():
    return load_embedder("mmrag-nano", device="cpu", dtype="float32")


@pytest.fixture
def trained():
    """A model of its own for a test that changes the weights."""
    return load("mmrag-nano", device="cpu")


def same(found, expected):
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), atol=1e-5)


def ndcg(ranked, right, k=10):
    gains = [float(item in right) for item in ranked[:k]]
    best = [1.0] * min(len(right), k)
    found, ideal = (sum(g / np.log2(i + 2) for i, g in enumerate(row)) for row in (gains, best))
    return found / ideal


def test_the_module_fulfils_the_interface(model):
    assert UniversalModule is st_module.UniversalModule
    assert issubclass(UniversalModule, InputModule)
    assert not UniversalModule.__abstractmethods__
    asked = {"forward", "save", "load", "preprocess", "modalities", "get_embedding_dimension"}
    assert asked <= set(vars(UniversalModule))
    features = model.preprocess(TEXTS)
    # By this the trainer and the losses know a column of inputs, and how many there are.
    assert features["input_ids"].shape == (len(TEXTS),)
    assert model(features)["sentence_embedding"].shape == (len(TEXTS), 384)
    assert model.get_embedding_dimension() == 384
    assert list(model.parameters())


def test_what_it_says_it_can_embed_it_embeds(model, embedder):
    examples = {"text": TEXTS, "image": PICTURES, ("image", "text"): BOTH}
    assert set(model.modalities) == set(examples)
    for modality, inputs in examples.items():
        assert model.supports(modality)
        same(model.encode_document(inputs), embedder.encode(inputs))
    assert not model.supports("audio")
    with pytest.raises(ValueError, match="audio"):
        model.encode([{"array": np.zeros(160), "sampling_rate": 16000}])


@pytest.mark.parametrize("instruction", ["image_for_caption", "Find a plan.", None])
def test_queries_carry_the_instruction_and_documents_do_not(monkeypatch, embedder, instruction):
    seen = []
    prepare = st_module.inputs_of

    def spy(backbone, content, instruction):
        seen.append(instruction)
        return prepare(backbone, content, instruction)

    monkeypatch.setattr(st_module, "inputs_of", spy)
    model = load(instruction=instruction, device="cpu")
    for inputs in (QUESTIONS[:1], PICTURES[:1], BOTH[:1]):
        same(model.encode_query(inputs), embedder.encode(inputs, instruction))
        same(model.encode_document(inputs), embedder.encode(inputs))
    sentence = TASKS.get(instruction, instruction)
    assert seen == [sentence, None] * 3
    model.encode(["a"], prompt="passage_for_question")
    model.encode(["a"], prompt_name="query")
    assert seen[-2:] == [TASKS["passage_for_question"], sentence]
    with pytest.raises(ValueError, match="'wanted' not found"):
        model.encode(["a"], prompt_name="wanted")


def test_an_empty_instruction_marks_a_query(monkeypatch):
    """Some families mark a query without a task; sentence-transformers drops an empty prompt."""
    model = load(instruction="", device="cpu")
    seen = []
    monkeypatch.setattr(st_module, "inputs_of", lambda *given: seen.append(given[2]))
    model.preprocess(["a"], prompt=model.prompts["query"])
    model.preprocess(["a"], prompt=model.prompts["document"])
    assert seen == ["", None]


def test_arguments_of_encode_mean_what_they_say(model, embedder):
    expected = embedder.encode(TEXTS)
    same(model.encode(TEXTS[0]), expected[0])
    assert model.encode([]).shape == (0,)
    # Whatever is beside an input in a batch, and in whatever order it comes.
    for batch_size in (1, 3):
        same(model.encode(TEXTS[::-1], batch_size=batch_size)[::-1], expected)
    tensor = model.encode(TEXTS, convert_to_tensor=True)
    assert (tensor.dtype, tensor.shape) == (torch.float32, (4, 384))
    listed = model.encode(TEXTS, convert_to_numpy=False)
    assert all(isinstance(each, torch.Tensor) for each in listed)
    assert model.encode(TEXTS, precision="int8").dtype == np.int8
    assert model.encode(TEXTS, precision="ubinary").shape == (4, 48)
    same(np.unpackbits(model.encode(TEXTS, precision="ubinary"), axis=1), expected > 0)
    everything = model.encode(TEXTS, output_value=None)
    same(torch.stack([each["sentence_embedding"] for each in everything]), expected)


def test_dimensions_are_cut(embedder):
    model = load(truncate_dim=64, device="cpu")
    assert model.get_embedding_dimension() == 64
    expected = embedder.encode(TEXTS, dim=64)
    same(model.encode_document(TEXTS, normalize_embeddings=True), expected)
    found = model.encode_document(TEXTS)
    same(found, embedder.encode(TEXTS)[:, :64])
    same(model.similarity(found, found), expected @ expected.T)
    with model.truncate_embeddings(32):
        assert model.encode(TEXTS).shape == (4, 32)


def test_what_the_model_does_not_have_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="dim=385"):
        load(truncate_dim=385, device="cpu")
    with pytest.raises(ConfigError, match="page_for_question"):
        load(instruction="page_for_qestion")
    with pytest.raises(ModelError, match="gone"):
        load(tmp_path / "gone")


def test_dimensions_that_the_model_was_not_trained_for_are_refused(model, tmp_path):
    (folder,) = model[0].folders
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    marker = json.loads((folder / "mmrag.json").read_text())
    (tmp_path / "mmrag.json").unlink()
    (tmp_path / "mmrag.json").write_text(json.dumps({**marker, "matryoshka_dims": [64, 128]}))
    with pytest.raises(ConfigError, match="trained for 64, 128, 384 dimensions"):
        load(tmp_path, truncate_dim=96, device="cpu")
    assert load(tmp_path, truncate_dim=128, device="cpu").get_embedding_dimension() == 128


def test_similarities_are_cosines(model, embedder):
    questions, texts = embedder.encode(QUESTIONS, ASKED), embedder.encode(TEXTS)
    found = model.encode_query(QUESTIONS), model.encode_document(TEXTS)
    assert model.similarity_fn_name == "cosine"
    same(model.similarity(*found), questions @ texts.T)
    pairs = model.similarity_pairwise(found[0], found[1][:3])
    same(pairs, (questions * texts[:3]).sum(axis=1))
    for hits, row in zip(semantic_search(*found, top_k=2), questions @ texts.T, strict=True):
        assert [hit["corpus_id"] for hit in hits] == np.argsort(-row)[:2].tolist()


@pytest.mark.slow
def test_processes_give_the_same_vectors(model, embedder):
    found = model.encode(BOTH * 2, device=["cpu"], chunk_size=3)
    same(found, embedder.encode(BOTH * 2))


def test_a_saved_model_is_loaded_by_its_name_in_mmrag(model, embedder, tmp_path):
    model.save_pretrained(str(tmp_path))
    parts = json.loads((tmp_path / "modules.json").read_text())
    # Folders that exist name the class so.
    assert parts[0]["type"] == "mmrag.embedders.st_module.UniversalModule"
    with pytest.raises(ValueError, match="trust_remote_code"):
        st.SentenceTransformer(str(tmp_path), device="cpu")
    theirs = st.SentenceTransformer(str(tmp_path), device="cpu", trust_remote_code=True)
    for again in (theirs, load(tmp_path, device="cpu")):
        same(again.encode_query(QUESTIONS), embedder.encode(QUESTIONS, ASKED))
        same(again.encode(BOTH), embedder.encode(BOTH))


@pytest.mark.parametrize("kind", ["texts", "pages"])
def test_an_evaluator_of_retrieval_measures_it(model, embedder, tmp_path, kind):
    documents = TEXTS
    if kind == "pages":
        documents = [
            str(tmp_path / f"{colour}.png") for colour in ("red", "green", "blue", "black")
        ]
        for path in documents:
            picture(Path(path).stem).save(path)
    corpus = {f"d{i}": document for i, document in enumerate(documents)}
    queries = {f"q{i}": text for i, text in enumerate(QUESTIONS)}
    right = {"q0": {"d0"}, "q1": {"d1", "d2"}, "q2": {"d3"}}
    found = InformationRetrievalEvaluator(queries, corpus, right, write_csv=False)(model)
    contents = [Content(image=each) if kind == "pages" else Content(each) for each in documents]
    scores = embedder.encode(QUESTIONS, ASKED) @ embedder.encode(contents).T
    ranked = [[f"d{i}" for i in np.argsort(-row)] for row in scores]
    expected = np.mean([ndcg(row, right[f"q{i}"]) for i, row in enumerate(ranked)])
    assert 0 < expected < 1
    assert found["cosine_ndcg@10"] == pytest.approx(expected)


def test_an_evaluator_of_reranking_measures_it(model, embedder):
    samples = [
        {"query": QUESTIONS[0], "positive": [TEXTS[0]], "negative": [TEXTS[1], TEXTS[2]]},
        {"query": QUESTIONS[1], "positive": [TEXTS[3]], "negative": [TEXTS[0], TEXTS[1]]},
    ]
    found = RerankingEvaluator(samples, write_csv=False)(model)
    ranks = []
    for sample in samples:
        texts = [*sample["positive"], *sample["negative"]]
        scores = embedder.encode([sample["query"]], ASKED)[0] @ embedder.encode(texts).T
        ranks.append(1 + np.sum(scores > scores[0]))
    assert max(ranks) > 1
    assert found["mrr@10"] == pytest.approx(np.mean(1 / np.array(ranks)))


def test_evaluators_of_pairs_and_triplets_measure_them(model, embedder):
    first, second, grades = TEXTS[:3], [QUESTIONS[0], QUESTIONS[2], QUESTIONS[2]], [0.0, 0.5, 1.0]
    found = EmbeddingSimilarityEvaluator(first, second, grades, write_csv=False)(model)
    cosines = (embedder.encode(first) * embedder.encode(second)).sum(axis=1)
    order = np.argsort(np.argsort(cosines))
    assert found["spearman_cosine"] == pytest.approx(np.corrcoef(order, [0, 1, 2])[0, 1])
    negatives = [TEXTS[2], TEXTS[2], TEXTS[2]]
    found = TripletEvaluator(QUESTIONS, TEXTS[:3], negatives, write_csv=False)(model)
    # The last positive is its own negative.
    assert found["cosine_accuracy"] == pytest.approx(2 / 3)


def gradients(model, loss, columns):
    model.zero_grad()
    value = loss([model.preprocess(column) for column in columns], None)
    value.backward()
    found = {name: weight.grad for name, weight in model.named_parameters()}
    return value.item(), {name: grad.clone() for name, grad in found.items() if grad is not None}


def test_losses_follow_the_vectors_and_gradients_reach_the_weights(trained, embedder):
    trained.eval()  # without dropout
    columns = [QUESTIONS, TEXTS[:3], ["It is old.", "They are sweet.", "It is low."]]
    value, found = gradients(trained, losses.MultipleNegativesRankingLoss(trained), columns)
    questions, *answers = (embedder.encode(column) for column in columns)
    logits = 20 * questions @ np.concatenate(answers).T
    right = np.exp(logits[range(3), range(3)]) / np.exp(logits).sum(axis=1)
    assert value == pytest.approx(-np.log(right).mean(), abs=1e-4)
    assert any(grad.abs().max() > 1e-3 for grad in found.values())


def test_gradcache_cuts_a_batch_of_pictures_and_changes_no_gradient(trained):
    trained.eval()
    columns = [QUESTIONS, [picture("red"), picture("green"), picture("blue")]]
    whole = gradients(trained, losses.MultipleNegativesRankingLoss(trained), columns)
    cached = losses.CachedMultipleNegativesRankingLoss(trained, mini_batch_size=2)
    cut = gradients(trained, cached, columns)
    assert cut[0] == pytest.approx(whole[0], abs=1e-5)
    assert cut[1].keys() == whole[1].keys()
    for name, grad in whole[1].items():
        torch.testing.assert_close(cut[1][name], grad, atol=1e-4, rtol=1e-3)
    assert any("visual" in name or "vision" in name for name in whole[1])


def test_the_trainer_trains_saves_and_reads_its_checkpoints(trained, embedder, tmp_path):
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("accelerate")
    colours = ["red", "green", "blue", "black"]
    rows = {"anchor": colours, "positive": [picture(colour) for colour in colours]}
    dataset = datasets.Dataset.from_dict(rows)
    arguments = st.SentenceTransformerTrainingArguments(
        str(tmp_path / "run"),
        max_steps=6,
        per_device_train_batch_size=4,
        learning_rate=3e-5,
        prompts={"anchor": "image_for_caption"},
        eval_strategy="steps",
        eval_steps=3,
        save_steps=3,
        save_only_model=True,
        load_best_model_at_end=True,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    loss = losses.MatryoshkaLoss(trained, losses.MultipleNegativesRankingLoss(trained), [384, 64])
    trainer = st.SentenceTransformerTrainer(
        trained, arguments, train_dataset=dataset, eval_dataset=dataset, loss=loss
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    assert after < before / 2
    trained.save_pretrained(str(tmp_path / "saved"))
    again = load(tmp_path / "saved", device="cpu")
    found = again.encode(rows["positive"])
    same(found, trained.encode(rows["positive"]))
    assert np.abs(found - embedder.encode(rows["positive"])).max() > 1e-3
    best = Path(trainer.state.best_model_checkpoint)
    same(load(best, device="cpu").encode(rows["positive"]), found)


def test_the_examples_of_the_readme_run(tmp_path, monkeypatch):
    pytest.importorskip("accelerate")
    monkeypatch.chdir(tmp_path)
    picture("red").save("page.png")
    scope = {}
    for block in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL):
        exec(compile(block, str(README), "exec"), scope)
    assert scope["scores"].argmax() == 0
    assert scope["pages"].shape == scope["both"].shape == (1, 384)
    same(load("my-model").encode(TEXTS), scope["model"].encode(TEXTS))
