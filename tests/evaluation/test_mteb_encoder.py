"""Tasks made of mteb's own classes run over an embedder, up to results that mteb reads back."""

import numpy as np
import pytest
from fakes import FakeEmbedder
from PIL import Image

from mmrag import MTEBEncoder, UniversalEmbedding, load_embedder
from mmrag.content import Content
from mmrag.errors import ConfigError, ContentError
from mmrag.evaluation.mteb_encoder import chunks, instruction_for, model_name, rows_of
from mmrag.instructions import resolve

mteb = pytest.importorskip("mteb")

from datasets import Dataset, Features, Value  # noqa: E402
from datasets import Image as ImageColumn  # noqa: E402
from mteb.abstasks import AbsTaskRetrieval, AbsTaskSTS  # noqa: E402
from mteb.abstasks.task_metadata import TaskMetadata  # noqa: E402
from mteb.models import EncoderProtocol, SearchProtocol  # noqa: E402
from mteb.results import ModelResult, TaskResult  # noqa: E402
from mteb.types import PromptType  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402

COLOURS = ("red", "green", "blue", "orange", "purple", "black")
# The text and the image of each row; either may be missing.
PARAGRAPHS = {
    "d0": ("a well is nine metres deep", None),
    "d1": ("the boiler heats water", None),
    "d2": ("hoses water the garden", None),
    "d3": ("a falcon hunts mice", None),
    "d4": ("the garden has a deep well", None),
}
QUESTIONS = {"q0": ("how deep is the well", None), "q1": ("what may water the garden", None)}
GRADES = {"q0": {"d0": 2, "d4": 1, "d3": 1}, "q1": {"d2": 1}}
MIXED = {
    "m0": ("", "red"),
    "m1": ("a green door", "green"),
    "m2": ("only words about purple", None),
    "m3": ("", "blue"),
    "m4": ("an orange boat", "orange"),
    "m5": ("a red boat", None),
}
MIXED_QUERIES = {"q0": ("", "red"), "q1": ("a boat", None), "q2": ("which door", "green")}
MIXED_GRADES = {"q0": {"m0": 1, "m5": 2}, "q1": {"m4": 1, "m5": 1}, "q2": {"m1": 1, "m2": 1}}


def metadata(
    name, category, prompt=None, kind="Retrieval", modalities=("text",), score="ndcg_at_10"
):
    return TaskMetadata(
        name=name,
        description="Made by a test.",
        dataset={"path": "none/none", "revision": "1"},
        prompt=prompt,
        type=kind,
        category=category,
        modalities=list(modalities),
        eval_langs=["eng-Latn"],
        main_score=score,
    )


def picture(colour):
    return None if colour is None else Image.new("RGB", (9, 6), colour)


def table(rows, with_images):
    columns = {"id": list(rows), "text": [text for text, _ in rows.values()]}
    features = {"id": Value("string"), "text": Value("string")}
    if with_images:
        columns["image"] = [picture(colour) for _, colour in rows.values()]
        features["image"] = ImageColumn()
    return Dataset.from_dict(columns, features=Features(features))


class Paragraphs(AbsTaskRetrieval):
    metadata = metadata("MadeParagraphs", "t2t", {"query": "Find the paragraph."})
    parts = (PARAGRAPHS, QUESTIONS, GRADES, False)

    def load_data(self, num_proc=None, **_):
        corpus, queries, grades, with_images = self.parts
        self.dataset = {
            "default": {
                "test": {
                    "corpus": table(corpus, with_images),
                    "queries": table(queries, with_images),
                    "relevant_docs": grades,
                    "top_ranked": None,
                }
            }
        }
        self.data_loaded = True


class Mixed(Paragraphs):
    metadata = metadata("MadeMixed", "it2it", None, "Any2AnyRetrieval", ("text", "image"))
    parts = (MIXED, MIXED_QUERIES, MIXED_GRADES, True)


class Photos(Paragraphs):
    metadata = metadata("MadePhotos", "t2i", None, "Any2AnyRetrieval", ("text", "image"))
    parts = (
        {f"p{i}": (None, colour) for i, colour in enumerate(COLOURS)},
        QUESTIONS,
        {"q0": {"p1": 1}, "q1": {"p2": 1, "p5": 3}},
        True,
    )


class Pairs(AbsTaskSTS):
    metadata = metadata("MadePairs", "t2t", "Compare.", "STS", score="cosine_spearman")
    min_score, max_score = 0, 5

    def load_data(self, num_proc=None, **_):
        rows = {
            "sentence1": ["a red boat", "a deep well", "the garden", "a falcon"],
            "sentence2": ["a red boat", "the well", "a boiler", "mice are small"],
            "score": [5.0, 3.0, 1.0, 0.0],
        }
        self.dataset = {"test": Dataset.from_dict(rows)}
        self.data_loaded = True


def ndcg(task, embedder, k=10):
    """As trec_eval counts it, from vectors of single rows that mteb never saw."""

    def vectors(rows):
        contents = [Content(text or None, picture(colour)) for text, colour in rows.values()]
        return np.concatenate([embedder.encode([content]) for content in contents])

    corpus, queries, grades, _ = task.parts
    scores = vectors(queries) @ vectors(corpus).T
    values = []
    for query, row in zip(queries, scores, strict=True):
        gains = [grades[query].get(list(corpus)[i], 0) for i in np.argsort(-row)]
        best = sorted(grades[query].values(), reverse=True)
        found, ideal = (
            sum(gain / np.log2(rank + 2) for rank, gain in enumerate(each[:k]))
            for each in (gains, best)
        )
        values.append(found / ideal)
    return np.mean(values)


@pytest.fixture(scope="module")
def nano():
    return load_embedder("mmrag-nano", device="cpu")


@pytest.fixture
def run(tmp_path):
    cache = mteb.ResultCache(tmp_path / "results")

    def evaluate(encoder, task, batch_size=2):
        return mteb.evaluate(
            encoder,
            task,
            cache=cache,
            co2_tracker=False,
            show_progress_bar=False,
            encode_kwargs={"batch_size": batch_size, "show_progress_bar": False},
        )

    evaluate.cache = cache
    return evaluate


@pytest.mark.parametrize("task", [Paragraphs, Mixed, Photos])
def test_ndcg_equals_an_independent_computation(run, task):
    result = run(MTEBEncoder(FakeEmbedder()), task())
    score = result.task_results[0].get_score()
    assert 0 < score < 1
    # mteb rounds to five decimals.
    assert score == pytest.approx(ndcg(task, FakeEmbedder()), abs=1e-5)


def test_the_results_file_is_read_back(run):
    encoder = MTEBEncoder(FakeEmbedder(), name="maker/model")
    score = run(encoder, Mixed()).task_results[0].get_score()

    path = run.cache.get_task_result_path("MadeMixed", encoder.mteb_model_meta)
    assert path.parts[-3:] == ("maker__model", "fake-32-1", "MadeMixed.json")
    assert TaskResult.from_disk(path).get_score() == pytest.approx(score, abs=1e-5)

    loaded = run.cache.load_results(models=[encoder.mteb_model_meta], tasks=[Mixed()])
    (model,) = loaded.model_results
    assert (model.model_name, model.model_revision) == ("maker/model", "fake-32-1")
    assert model.model_meta.embed_dim == 32
    copy = path.parent / "copy.json"
    model.to_disk(copy)
    (task,) = ModelResult.from_disk(copy).task_results
    assert (task.task_name, task.get_score()) == ("MadeMixed", pytest.approx(score, abs=1e-5))


def test_earlier_results_are_taken_only_for_the_same_vectors(run):
    first = FakeEmbedder()
    run(MTEBEncoder(first), Paragraphs())
    done = first.encoded
    run(MTEBEncoder(first), Paragraphs())
    assert first.encoded == done
    for other in (
        MTEBEncoder(FakeEmbedder(version="2")),
        MTEBEncoder(FakeEmbedder(), dim=16),
        MTEBEncoder(FakeEmbedder(), instructions={"MadeParagraphs": "Find it."}),
    ):
        run(other, Paragraphs())
        assert other.embedder.encoded == done


def test_rows_of_any_modality_come_in_one_call(run):
    embedder = FakeEmbedder()
    run(MTEBEncoder(embedder), Mixed())
    queries, documents = embedder.calls
    assert [each.modality for each in queries] == ["image", "text", "fused"]
    # By what each query is; what it looks for has text and image.
    assert [each.instruction for each in queries] == [
        "image_for_image",
        "fused_for_question",
        "fused_for_image_question",
    ]
    assert [each.modality for each in documents] == [
        *("image", "fused", "text", "image", "fused", "text")
    ]
    assert {each.instruction for each in documents} == {None}


def test_queries_get_the_prompt_of_the_task_or_what_is_given_for_it(run):
    for given, expected in (
        ({}, "Find the paragraph."),
        ({"MadeParagraphs": "passage_for_question"}, "passage_for_question"),
        ({"Another": "Find it."}, "Find the paragraph."),
    ):
        embedder = FakeEmbedder()
        run(MTEBEncoder(embedder, instructions=given), Paragraphs())
        queries, documents = embedder.calls
        assert [each.instruction for each in queries] == [expected] * len(QUESTIONS)
        assert {each.instruction for each in documents} == {None}


def test_both_sides_of_a_task_without_queries_get_its_prompt(run):
    embedder = FakeEmbedder()
    result = run(MTEBEncoder(embedder), Pairs())
    assert {each.instruction for call in embedder.calls for each in call} == {"Compare."}
    assert result.task_results[0].get_score() > 0.5


@pytest.mark.parametrize(
    ("category", "kind", "modality", "expected"),
    [
        ("t2t", "Retrieval", "text", "passage_for_question"),
        ("t2i", "DocumentUnderstanding", "text", "page_for_question"),
        ("t2it", "DocumentUnderstanding", "text", "page_for_question"),
        ("t2i", "Any2AnyRetrieval", "text", "image_for_caption"),
        ("i2t", "Any2AnyRetrieval", "image", "caption_for_image"),
        ("it2t", "Any2AnyRetrieval", "fused", "passage_for_image_question"),
        ("it2i", "Any2AnyRetrieval", "fused", "image_for_edited_image"),
        ("it2it", "Any2AnyRetrieval", "fused", "fused_for_image_question"),
    ],
)
def test_tasks_without_a_prompt_get_one_by_what_is_asked_and_wanted(
    category, kind, modality, expected
):
    task = metadata("Made", category, None, kind, ("text", "image"))
    content = Content(
        None if modality == "image" else "words", None if modality == "text" else picture("red")
    )
    assert instruction_for(content, task, PromptType.query, {}) == expected
    assert instruction_for(content, task, PromptType.document, {}) is None
    assert instruction_for(content, task, None, {}) is None


@pytest.mark.parametrize(
    "benchmark", ["BEIR", "ViDoRe(v1)", "ViDoRe(v2)", "ViDoRe(v3)", "ViDoRe(v3.1)", "MIEB(eng)"]
)
def test_every_retrieval_task_of_the_benchmarks_has_an_instruction(benchmark):
    # CQADupstack, for one, is made of tasks of its own.
    parts = [
        part
        for task in mteb.get_benchmark(benchmark).tasks
        for part in getattr(task.metadata, "tasks", None) or [task]
    ]
    tasks = [part for part in parts if isinstance(part, AbsTaskRetrieval)]
    assert len(tasks) >= 4
    for task in tasks:
        sides = set(task.metadata.get_modalities(PromptType.query))
        query = Content(
            "words" if "text" in sides else None, picture("red") if "image" in sides else None
        )
        instruction = instruction_for(query, task.metadata, PromptType.query, {})
        # A name that does not exist would raise.
        assert " " in resolve(instruction), task.metadata.name
        assert instruction_for(query, task.metadata, PromptType.document, {}) is None


def test_the_batch_size_moves_no_vector(nano):
    rows = {
        f"d{i}": ("word " * (1 + 7 * i % 23), COLOURS[i % 6] if i % 3 else None) for i in range(75)
    }
    encoder = MTEBEncoder(nano)
    vectors = [
        encoder.encode(
            DataLoader(
                table(rows, with_images=True),
                batch_size=batch_size,
                collate_fn=lambda batch: {
                    key: [row[key] for row in batch] for key in ("text", "image")
                },
            ),
            task_metadata=Mixed.metadata,
            hf_split="test",
            hf_subset="default",
            prompt_type=PromptType.document,
            show_progress_bar=False,
        )
        for batch_size in (1, 3, 16)
    ]
    assert vectors[0].shape == (75, nano.dim)
    assert np.allclose(np.linalg.norm(vectors[0], axis=1), 1, atol=1e-5)
    # To the last bit.
    assert np.array_equal(vectors[0], vectors[1])
    assert np.array_equal(vectors[0], vectors[2])


def test_scores_of_a_real_model_do_not_depend_on_the_batch_size(nano, tmp_path):
    scores = set()
    for batch_size in (1, 3, 16):
        result = mteb.evaluate(
            MTEBEncoder(nano),
            [Paragraphs(), Mixed()],
            cache=None,
            co2_tracker=False,
            show_progress_bar=False,
            encode_kwargs={"batch_size": batch_size, "show_progress_bar": False},
        )
        scores.add(tuple(each.get_score() for each in result.task_results))
    assert len(scores) == 1


def test_chunks_are_cut_by_the_rows_alone():
    rows = [Content(image=picture("red"))] * 100 + [Content("a")] * 2000
    assert [len(chunk) for chunk in chunks(rows)] == [64, 1024, 1012]
    assert list(chunks([])) == []


def test_an_embed_model_brings_its_dimensions(nano):
    model = UniversalEmbedding(embedder=nano, dim=64)
    encoder = MTEBEncoder(model)
    assert encoder.embedder is nano
    assert encoder.mteb_model_meta.embed_dim == encoder.dim == 64
    assert encoder.mteb_model_meta.experiment_name == "dim_64"
    assert MTEBEncoder(model, dim=128).dim == 128
    assert isinstance(encoder, EncoderProtocol)
    assert not isinstance(encoder, SearchProtocol)


def test_similarities_are_cosines():
    a, b = np.random.default_rng(0).standard_normal((2, 3, 8)).astype(np.float32)
    unit = [each / np.linalg.norm(each, axis=1, keepdims=True) for each in (a, b)]
    encoder = MTEBEncoder(FakeEmbedder())
    assert np.allclose(encoder.similarity(a, b).numpy(), unit[0] @ unit[1].T, atol=1e-6)
    pairs = encoder.similarity_pairwise(a, b).numpy()
    assert np.allclose(pairs, (unit[0] * unit[1]).sum(axis=1), atol=1e-6)


def test_a_row_that_cannot_be_embedded_is_named(run):
    embedder = FakeEmbedder(poison="falcon")
    with pytest.raises(
        ContentError, match="MadeParagraphs, default, test, document: from row 0: item 3"
    ):
        run(MTEBEncoder(embedder), Paragraphs())
    with pytest.raises(ContentError, match="audio, and neither text nor image"):
        list(rows_of({"audio": [1]}))


def test_mteb_refuses_tasks_of_other_modalities(run):
    words = MTEBEncoder(FakeEmbedder(modalities=("text",)))
    assert words.mteb_model_meta.modalities == ["text"]
    with pytest.raises(ValueError, match="MadePhotos"):
        run(words, Photos())


def test_settings_that_cannot_be_kept_are_refused(monkeypatch):
    embedder = FakeEmbedder()
    with pytest.raises(ConfigError, match="organization/model"):
        MTEBEncoder(embedder, name="model")
    with pytest.raises(ConfigError, match="dim=64"):
        MTEBEncoder(embedder, dim=64)
    with pytest.raises(ConfigError, match="float32 only"):
        MTEBEncoder(embedder).encode(
            [],
            task_metadata=Paragraphs.metadata,
            hf_split="test",
            hf_subset="default",
            precision="int8",
        )
    monkeypatch.setitem(__import__("sys").modules, "mteb.models", None)
    with pytest.raises(ConfigError, match=r"mmrag\[eval\]"):
        MTEBEncoder(embedder)


def test_models_are_named_as_mteb_files_them(tmp_path):
    assert model_name("Alibaba-NLP/gme-Qwen2-VL-2B-Instruct").startswith("Alibaba-NLP/")
    assert model_name("mmrag-nano") == "mmrag/mmrag-nano"
    assert model_name(str(tmp_path / "mine")) == "mmrag/mine"
