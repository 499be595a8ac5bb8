"""Backward compatibility: new queries over old vectors, and old vectors in the new space."""

import shutil

import numpy as np
import pytest
import torch
from one_step import prepare_step
from tiny import save_qwen2_vl
from tiny_nano import save_nano
from training import config_of, log_of

from mmrag.embedders import load_embedder
from mmrag.errors import ConfigError, ContentError
from mmrag.index import UniversalIndex
from mmrag_recipes.__main__ import main
from mmrag_recipes.batches import Batch
from mmrag_recipes.compatible import load_old, old_vectors
from mmrag_recipes.config import CompatibleConfig
from mmrag_recipes.data import load_datasets
from mmrag_recipes.export import export
from mmrag_recipes.project import Projection, fit, map_vectors
from mmrag_recipes.rows import Item, Row, read_rows, write_rows
from mmrag_recipes.steps import Feeder, step_loss
from mmrag_recipes.train import load_model, train


@pytest.fixture(scope="module")
def other_model(tmp_path_factory):
    return save_qwen2_vl(tmp_path_factory.mktemp("other") / "other", seed=8)


def softmax_loss(queries, documents, temperature):
    """Mean cross entropy of each query's document among all, in float64."""
    cosines = queries @ documents.T
    cosines /= np.linalg.norm(queries, axis=1)[:, None] * np.linalg.norm(documents, axis=1)
    logits = cosines / temperature
    return float((np.log(np.exp(logits).sum(1)) - np.diag(logits)).mean())


@pytest.mark.parametrize("sides", ["queries", "both"])
def test_the_loss_is_that_of_the_formula(tiny_model, other_model, text_rows, tmp_path, sides):
    compatible = CompatibleConfig(model=str(other_model), family="gme", weight=0.7, sides=sides)
    config = config_of(tiny_model, tmp_path, text_rows, hard_negatives=0, temperature=0.5)
    config = config.replace(compatible=compatible, false_negative_margin=2.0)
    backbone = load_model(config)
    old = load_old(config, backbone)
    dataset = load_datasets(config, backbone)[0]
    feeder = Feeder([dataset], backbone, 0, old=old)
    ((_, step),) = feeder.steps([Batch(0, (0, 1, 2, 3), 0)])
    with torch.no_grad():
        new = backbone.forward(step.inputs).float()
    before = old_vectors(old, step, chunk=3)
    found = float(step_loss(new, step, config, before))
    q, d, old_q, old_d = (
        part.double().numpy() for vectors in (new, before) for part in (vectors[:4], vectors[4:])
    )
    cross = softmax_loss(q, old_d, 0.5)
    if sides == "both":
        cross = (cross + softmax_loss(old_q, d, 0.5)) / 2
    expected = 0.3 * softmax_loss(q, d, 0.5) + 0.7 * cross
    assert found == pytest.approx(expected, rel=1e-5)
    alone = prepare_step(Batch(0, (0, 1, 2, 3), 0), dataset, backbone, 0)
    assert not alone.old_inputs


def test_the_old_vectors_are_those_of_its_collections(tiny_model, mixed_rows, tmp_path):
    """Of all modalities, and in the order of the new inputs."""
    config = config_of(tiny_model, tmp_path, mixed_rows, compatible=CompatibleConfig())
    backbone = load_model(config)
    old = load_old(config, backbone)
    dataset = load_datasets(config, backbone)[0]
    ((_, step),) = Feeder([dataset], backbone, 0, old=old).steps([Batch(0, (0, 1, 2, 3), 0)])
    found = old_vectors(old, step, chunk=0).numpy()
    embedder = load_embedder(tiny_model, family="gme", device="cpu")
    rows = read_rows(mixed_rows)[:4]
    wanted = [
        embedder.encode([dataset.store.content(row.query)], row.instruction)[0] for row in rows
    ] + [embedder.encode([dataset.store.content(row.positives[0])])[0] for row in rows]
    cosines = (found * wanted).sum(1) / np.linalg.norm(found, axis=1)
    assert (cosines > 0.9999).all()


def answers(folder, count=24):
    rows = [
        Row(
            id=f"r{n}",
            query=Item(text=f"find {n * 37 % 101} user"),
            positives=[Item(text=f"the page {n} that answers {n * 53 % 97}")],
        )
        for n in range(count)
    ]
    write_rows(folder / "rows.jsonl", rows)
    return folder / "rows.jsonl"


def test_queries_of_a_compatible_run_find_old_documents(tiny_model, tmp_path):
    """The loss of new queries on old documents falls with the table and not without it."""
    rows = answers(tmp_path)

    def on_old(out, **changes):
        options = {"steps": 12, "batch_size": 8, "hard_negatives": 0, "temperature": 0.1}
        config = config_of(tiny_model, out, rows, **options, lr=3e-3, report=(), **changes)
        train(config)
        new = load_embedder(export(out, out / "m", dtype="float32"), device="cpu")
        old = load_embedder(tiny_model, family="gme", device="cpu")
        found = read_rows(rows)
        queries = new.encode([row.query.text for row in found])
        documents = old.encode([row.positives[0].text for row in found])
        return softmax_loss(queries.astype(float), documents.astype(float), 0.1)

    with_table = on_old(tmp_path / "a", compatible=CompatibleConfig(weight=0.9))
    assert with_table < on_old(tmp_path / "b")


def test_a_run_resumes_only_with_the_same_old_model(tiny_model, other_model, text_rows, tmp_path):
    def config(old):
        compatible = CompatibleConfig(model=str(old), family="gme")
        return config_of(tiny_model, tmp_path / "run", text_rows, compatible=compatible, report=())

    train(config(tiny_model))
    count = len(log_of(tmp_path / "run"))
    train(config(tiny_model))
    # By its weights and not by its place.
    train(config(shutil.copytree(tiny_model, tmp_path / "moved")))
    assert len(log_of(tmp_path / "run")) == count
    with pytest.raises(ConfigError, match="holds a run with compatible="):
        train(config(other_model))


def test_an_old_model_of_another_width_is_refused(text_rows, tmp_path):
    model = save_nano(tmp_path / "nano")
    settings = CompatibleConfig(model="mmrag-nano")
    config = config_of(model, tmp_path / "run", text_rows, family=None, compatible=settings)
    with pytest.raises(ConfigError, match=r"384 dimensions and the new model 32.*recipe project"):
        train(config)


def unit(chance, *shape):
    vectors = chance.normal(size=shape).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.parametrize("width", [6, 8, 11])
def test_procrustes_finds_a_rotation_again(width):
    chance = np.random.default_rng(0)
    old = unit(chance, 50, 8)
    turn = np.linalg.qr(chance.normal(size=(max(8, width),) * 2))[0][:8, :width]
    new = (old @ turn).astype(np.float32)
    matrix = fit(old, new).matrix
    if width >= 8:
        np.testing.assert_allclose(matrix, turn, atol=1e-5)
    product = matrix @ matrix.T if width >= 8 else matrix.T @ matrix
    np.testing.assert_allclose(product, np.eye(min(8, width)), atol=1e-5)


def test_least_squares_is_that_of_numpy():
    chance = np.random.default_rng(1)
    old, new = unit(chance, 60, 8), unit(chance, 60, 5)
    expected = np.linalg.lstsq(old.astype(float), new.astype(float))[0]
    np.testing.assert_allclose(fit(old, new, "linear", ridge=0).matrix, expected, atol=1e-5)
    # A ridge is least squares with more rows, which ask for zero.
    more, zero = np.eye(8) * np.sqrt(0.5 * 60), np.zeros((8, 5))
    expected = np.linalg.lstsq(np.vstack([old, more]), np.vstack([new, zero]))[0]
    np.testing.assert_allclose(fit(old, new, "linear", ridge=0.5).matrix, expected, atol=1e-5)
    with pytest.raises(ContentError, match="too few"):
        fit(old[:7], new[:7])


def test_a_collection_is_mapped_and_searched_with_the_new_model(tmp_path, capsys):
    old, new = save_nano(tmp_path / "old"), save_nano(tmp_path / "new", seed=1)
    rows = answers(tmp_path, 60)
    files = tmp_path / "files"
    files.mkdir()
    for n, row in enumerate(read_rows(rows)[:6]):
        (files / f"{n}.txt").write_text(row.positives[0].text)
    with UniversalIndex(
        tmp_path / "library", embed_model=load_embedder(old, device="cpu")
    ) as index:
        index.add(files)
    words = ["project", str(rows), "--old", str(old), "--new", str(new)]
    words += ["--out", str(tmp_path / "map.npz"), "--evaluate", str(rows), "--method", "linear"]
    words += ["--source", str(tmp_path / "library"), "--target", str(tmp_path / "mapped")]
    main(words)
    shown = capsys.readouterr().out
    for name in ("new -> new", "new -> old", "old -> old", "new -> projected old"):
        assert f"| {name} | 60 |" in shown
    with np.load(tmp_path / "map.npz") as kept:
        projection = Projection(kept["matrix"])
    embedder = load_embedder(new, device="cpu")
    with UniversalIndex(tmp_path / "mapped", embed_model=embedder) as index:
        nodes, vectors = index.collection.vectors("text")
        assert index.as_retriever().retrieve("the page")
    with UniversalIndex(tmp_path / "library") as index:
        same, before = index.collection.vectors("text")
    assert [node.id for node in nodes] == [node.id for node in same]
    np.testing.assert_allclose(vectors, projection.apply(before), atol=1e-6)
    words[words.index("--old") + 1] = str(new)
    with pytest.raises(SystemExit, match="its vectors are others"):
        main([*words[:-1], str(tmp_path / "again")])


def test_saved_vectors_are_mapped(tmp_path):
    chance = np.random.default_rng(2)
    embedder = load_embedder(save_nano(tmp_path / "nano"), device="cpu")
    projection = Projection(chance.normal(size=(32, 5)).astype(np.float32))
    np.save(tmp_path / "old.npy", unit(chance, 7, 32))
    assert map_vectors(tmp_path / "old.npy", tmp_path / "new", embedder, projection) == 7
    assert np.load(tmp_path / "new").shape == (7, 5)
    np.save(tmp_path / "old.npy", unit(chance, 7, 31))
    with pytest.raises(ContentError, match=r"shape \(7, 31\), not \(n, 32\)"):
        map_vectors(tmp_path / "old.npy", tmp_path / "new", embedder, projection)
