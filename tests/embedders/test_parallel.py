"""One model in a process on each of several devices; here, two on the CPU."""

import os
import pickle
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from mmrag import UniversalIndex, load_embedder
from mmrag.embedders import parallel
from mmrag.embedders.parallel import ParallelEmbedder
from mmrag.errors import ConfigError, ContentError, ModelError
from tests.tiny import save_qwen2_vl


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_qwen2_vl(tmp_path_factory.mktemp("gme"))


@pytest.fixture(scope="module")
def one(checkpoint):
    return load_embedder(checkpoint, family="gme", device="cpu")


@pytest.fixture(scope="module")
def two(checkpoint):
    embedder = load_embedder(checkpoint, family="gme", device="cpu,cpu", workers=1)
    yield embedder
    embedder.close()


@pytest.fixture(scope="module")
def contents():
    images = [Image.new("RGB", (56, 28 * (1 + n % 3)), (9 * n, 90, 200)) for n in range(8)]
    texts = [f"find the page that answers {n}" for n in range(17)]
    return [*texts, *images, {"text": "a caption", "image": images[3]}]


def pids(embedder):
    return [worker._process.pid for worker in embedder._workers]


def test_vectors_are_those_of_one_process_in_order(one, two, contents):
    assert isinstance(two, ParallelEmbedder)
    for name in ("name", "family", "dim", "modalities", "fingerprint", "prefers_text"):
        assert getattr(two, name) == getattr(one, name)
    assert len(set(pids(two))) == 2
    np.testing.assert_allclose(two.encode(contents), one.encode(contents), atol=1e-5)
    for query in (contents[:1], contents[:9]):
        np.testing.assert_allclose(
            two.encode(query, instruction="page_for_question", dim=8),
            one.encode(query, instruction="page_for_question", dim=8),
            atol=1e-5,
        )
    assert two.encode([]).shape == (0, one.dim)


def test_many_contents_are_sent_in_shares(one, two, monkeypatch):
    """And both processes get some of them."""
    monkeypatch.setattr(parallel, "_MOST_ITEMS", 5)
    asked = []
    ask = parallel._Worker.ask
    monkeypatch.setattr(
        parallel._Worker, "ask", lambda self, *given: asked.append(self) or ask(self, *given)
    )
    texts = [f"text {n}" for n in range(42)]
    np.testing.assert_allclose(two.encode(texts), one.encode(texts), atol=1e-5)
    assert len(asked) == 9
    assert len(set(asked)) == 2


def test_queries_from_threads_get_their_own_vectors(one, two):
    texts = [f"question {n}" for n in range(24)]
    expected = one.encode(texts)
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda text: two.encode([text])[0], texts))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_an_error_names_the_item_of_the_call(two, contents, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    items = [*contents[:13], tmp_path / "broken.png", *contents[13:]]
    with pytest.raises(ContentError, match=r"^item 13: "):
        two.encode(items)
    assert two.encode(contents[:2]).shape == (2, two.dim)


def test_a_process_that_is_killed_is_told_and_started_anew(one, two, contents, monkeypatch):
    other, killed = pids(two)
    os.kill(killed, signal.SIGSTOP)
    asked = threading.Event()
    exchange = parallel._Worker._exchange

    def tell(worker, *request):
        if worker is two._workers[1]:
            asked.set()
        return exchange(worker, *request)

    with monkeypatch.context() as patch, ThreadPoolExecutor(1) as pool:
        patch.setattr(parallel._Worker, "_exchange", tell)
        running = pool.submit(two.encode, contents)
        assert asked.wait(30)
        os.kill(killed, signal.SIGKILL)
        with pytest.raises(ModelError, match=r"process on cpu ended \(exit code -9\)"):
            running.result()
    np.testing.assert_allclose(two.encode(contents), one.encode(contents), atol=1e-5)
    assert pids(two)[0] == other
    assert pids(two)[1] != killed


def test_after_ctrl_c_no_call_gets_the_answer_to_another(one, two, contents, monkeypatch):
    def stop(running):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(parallel, "as_completed", stop)
        with pytest.raises(KeyboardInterrupt):
            two.encode(contents)
    np.testing.assert_allclose(two.encode(contents[5:]), one.encode(contents[5:]), atol=1e-5)


@pytest.mark.slow  # each process imports PyTorch
def test_a_copy_has_processes_of_its_own(one, two):
    copy = pickle.loads(pickle.dumps(two))
    assert not set(pids(copy)) & set(pids(two))
    np.testing.assert_allclose(copy.encode(["text"]), one.encode(["text"]), atol=1e-5)
    copy.close()


def test_devices_that_would_give_other_vectors_are_refused(monkeypatch):
    prints = iter("ab")
    monkeypatch.setattr(parallel._Worker, "start", lambda self: {"fingerprint": next(prints)})
    with pytest.raises(ConfigError, match="pass dtype="):
        ParallelEmbedder("mmrag-nano", ["cpu", "cuda"])


@pytest.mark.parametrize(
    ("device", "options", "said"),
    [
        ("cpu,", {}, "name at least two"),
        ("cpu,cpu", {"device_map": "auto"}, "device_map"),
        ("cpu,cpu", {"family": "other"}, "other"),
    ],
)
def test_bad_devices_are_refused(device, options, said, checkpoint):
    with pytest.raises((ConfigError, ModelError), match=said):
        load_embedder(checkpoint, **{"family": "gme", "device": device} | options)


def test_an_index_passes_its_device_on(one, tmp_path, monkeypatch):
    """To a model that is named, and to the one that a collection names."""
    (tmp_path / "well.md").write_text("# Well\n\nThe well is nine metres deep.\n")
    asked = []

    def load(name, *, device, download=True):
        asked.append((str(name), device))
        return one

    monkeypatch.setattr("mmrag.embedders.load_embedder", load)
    library = tmp_path / "library"
    with UniversalIndex(library, one.name, device="cuda:0,cuda:1") as index:
        assert index.add(tmp_path / "well.md").nodes
    with UniversalIndex(library, device="cuda:1") as index:
        assert index.embedder is one
    assert asked == [(one.name, "cuda:0,cuda:1"), (one.name, "cuda:1")]
    with pytest.raises(ConfigError, match="given by name"):
        UniversalIndex(library, one, device="cpu")
