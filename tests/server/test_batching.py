import threading

import numpy as np
import pytest
from fakes import FakeEmbedder

from mmrag.content import Content
from mmrag.embedders.base import OPTIONAL_TRAITS, Calibration
from mmrag.errors import ConfigError, ContentError
from mmrag.server.batching import SMALL, BatchingEmbedder
from mmrag.testing import check_embedder


@pytest.fixture
def batched():
    made = []

    def make(embedder, **options):
        made.append(BatchingEmbedder(embedder, **options))
        return made[-1]

    yield make
    for each in made:
        each.close()


def together(calls):
    """Results of calls that are made at the same moment; exceptions as results."""
    barrier, results = threading.Barrier(len(calls)), [None] * len(calls)

    def run(place, call):
        barrier.wait()
        try:
            results[place] = call()
        except Exception as error:  # noqa: BLE001
            results[place] = error

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return results


def test_calls_of_a_moment_are_one_batch_and_get_their_own_rows(batched):
    inner, sizes = FakeEmbedder(), []
    embedder = batched(inner, wait=0.3, observe=sizes.append)
    texts = [f"question {n}" for n in range(6)]
    results = together([lambda t=t: embedder.encode([t], "page_for_question") for t in texts])
    assert len(inner.calls) == 1
    assert sizes == [6]
    for text, result in zip(texts, results, strict=True):
        assert np.allclose(result, FakeEmbedder().encode([text]))


def test_each_call_keeps_its_task_and_its_dimensions(batched):
    inner = FakeEmbedder()
    embedder = batched(inner, wait=0.3)
    own = Content("c", instruction="Find an image of my own.")
    results = together(
        [
            lambda: embedder.encode(["a"], "page_for_question", dim=8),
            lambda: embedder.encode(["b"]),
            lambda: embedder.encode([own], "page_for_image"),
        ]
    )
    assert [result.shape for result in results] == [(1, 8), (1, 32), (1, 32)]
    tasks = {content.text: content.instruction for content in inner.calls[0]}
    assert tasks == {"a": "page_for_question", "b": None, "c": "Find an image of my own."}
    assert np.allclose(results[0], FakeEmbedder().encode(["a"], dim=8))


def test_a_call_that_fails_fails_alone(batched):
    embedder = batched(FakeEmbedder(), wait=0.3)
    good, bad = together([lambda: embedder.encode(["a"]), lambda: embedder.encode(["POISON"])])
    assert good.shape == (1, 32)
    assert isinstance(bad, ContentError)


def test_an_error_that_nobody_expects_reaches_the_caller_and_the_thread_lives(batched):
    class Fragile(FakeEmbedder):
        def encode(self, contents, *args, **options):
            if contents[0].text == "crash":
                raise RuntimeError("no memory")
            return super().encode(contents, *args, **options)

    embedder = batched(Fragile())
    with pytest.raises(RuntimeError):
        embedder.encode(["crash"])
    assert embedder.encode(["a"]).shape == (1, 32)


def test_large_calls_go_straight_to_the_model(batched):
    inner = FakeEmbedder()
    embedder = batched(inner)
    assert embedder.encode(["a"] * (SMALL + 1)).shape == (SMALL + 1, 32)
    assert embedder.encode([]).shape == (0, 32)
    assert len(inner.calls) == 2


def test_a_wrong_dimension_is_refused_before_it_waits(batched):
    with pytest.raises(ConfigError):
        batched(FakeEmbedder()).encode(["a"], dim=99)


def test_closing_answers_what_was_asked(batched):
    embedder = BatchingEmbedder(FakeEmbedder(), wait=0.2)
    (result,) = together([lambda: embedder.encode(["a"])])
    embedder.close()
    assert result.shape == (1, 32)


def test_it_keeps_the_contract_of_an_embedder(batched, gme):
    embedder = batched(gme)
    check_embedder(embedder)


def test_it_keeps_what_was_measured_for_the_model(batched):
    """Or the server would index and rank otherwise than the command line."""
    inner = FakeEmbedder()
    traits = {
        "prefers_text": True,
        "prefers_passages": True,
        "matryoshka_dims": (4,),
        "calibration": Calibration(support_cosine=0.8),
    }
    assert set(traits) == set(OPTIONAL_TRAITS)
    vars(inner).update(traits)
    embedder = batched(inner)
    assert {name: getattr(embedder, name) for name in traits} == traits
    with pytest.raises(ConfigError, match="trained for"):
        embedder.encode(["text"], dim=5)
