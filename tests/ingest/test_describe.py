"""Descriptions of images by a model: what is described, what it costs, where it counts."""

import json
import threading

import pymupdf
import pytest
from chat_server import ChatServer
from fakes import FakeEmbedder, Scripted, make_image, make_node
from llama_index.core.schema import NodeWithScore
from typer.testing import CliRunner

import mmrag.embedders
from mmrag.answering.context import Part, fence, select_sources
from mmrag.answering.extractive import extract
from mmrag.cli.app import app
from mmrag.content import Content
from mmrag.index import UniversalIndex
from mmrag.ingest import describe as module
from mmrag.llms.endpoint import open_llm
from mmrag.reading import ReadOptions

SAID = "A red lighthouse on a cliff, seen from the sea."


@pytest.fixture
def server():
    server = ChatServer(SAID)
    server.usage = {"prompt_tokens": 900, "completion_tokens": 20, "total_tokens": 920}
    yield server
    server.close()


@pytest.fixture
def llm(server):
    return open_llm("tiny", server.url)


@pytest.fixture
def index(tmp_path):
    reading = ReadOptions(dpi=50, ocr="off")
    with UniversalIndex(tmp_path / "library", FakeEmbedder(), reading=reading) as index:
        yield index


def descriptions(index):
    entries = index.files()
    nodes = [node for entry in entries for node in index.collection.file_nodes(entry.sha256)]
    return [node for node in nodes if node.metadata["kind"] == "description"]


def write_pdf(path):
    """A page of words, a page that is a drawing, both without figures."""
    document = pymupdf.open()
    words = "The harbour office opens at nine and closes at five on every working day of the year."
    document.new_page(width=600).insert_text((20, 50), words, fontsize=9)
    document.new_page().draw_rect((50, 50, 300, 300), fill=(0, 0, 1))
    document.save(path)


def test_images_and_pages_without_words_are_described(index, llm, tmp_path):
    make_image(tmp_path / "in" / "photo.png")
    write_pdf(tmp_path / "in" / "harbour.pdf")
    report = index.add(tmp_path / "in", describe=llm)
    found = {(n.metadata["file"].split("/")[-1], n.metadata["page"]) for n in descriptions(index)}
    assert found == {("photo.png", 1), ("harbour.pdf", 2)}
    done = report.descriptions
    assert (done.stored, done.calls, done.failed, done.reused) == (2, 2, 0, 0)
    assert (done.input_tokens, done.output_tokens) == (1800, 40)
    assert done.seconds > 0


def test_a_description_is_found_by_words_and_by_the_text_view(index, llm, tmp_path):
    make_image(tmp_path / "photo.png")
    make_image(tmp_path / "other.png", "blue")
    index.add(tmp_path / "photo.png", describe=llm)
    index.add(tmp_path / "other.png")
    for weights in ({"bm25": 1.0}, {"text": 1.0}):
        (hit, *_) = index.as_retriever(weights=weights).retrieve("lighthouse cliff")
        assert hit.metadata["file"].endswith("photo.png")
        assert hit.description == SAID
        assert hit.described_by == "tiny"


def test_a_description_is_no_evidence(index, llm, tmp_path):
    make_image(tmp_path / "photo.png")
    index.add(tmp_path / "photo.png", describe=llm)
    hits = index.as_retriever().retrieve("Where is the red lighthouse?")
    (source,) = select_sources(hits, "Where is the red lighthouse?")
    assert source.text == ""
    assert extract(Content("Where is the red lighthouse?"), [source]) is None
    shown = fence(Part(source, source.text), "b")
    assert shown.index("(no text layer)") < shown.index("description by tiny") < shown.index(SAID)


def test_the_node_of_a_description_alone_is_no_evidence():
    node = make_node(SAID, kind="description", described_by="tiny")
    (source,) = select_sources([NodeWithScore(node=node, score=1.0)], "lighthouse")
    assert (source.text, source.description, source.described_by) == ("", SAID, "tiny")


def test_equal_images_cost_one_call_also_after_removal(index, llm, server, tmp_path):
    make_image(tmp_path / "in" / "a.png")
    make_image(tmp_path / "in" / "b.bmp")  # other bytes, equal pixels
    report = index.add(tmp_path / "in", describe=llm)
    assert (report.descriptions.stored, report.descriptions.reused) == (2, 1)
    assert len(server.requests) == 1
    assert index.add(tmp_path / "in", describe=llm).descriptions.stored == 0
    index.remove("*")
    assert index.collection.count() == 0
    assert index.add(tmp_path / "in", describe=llm).descriptions.reused == 2
    assert len(server.requests) == 1


def test_descriptions_go_with_the_file_on_its_way(index, llm, server, tmp_path):
    path = make_image(tmp_path / "in" / "a.png")
    index.add(tmp_path / "in", describe=llm)
    path.rename(path.with_name("b.png"))
    report = index.add(tmp_path / "in", describe=llm)
    assert report.moved and len(server.requests) == 1
    (node,) = descriptions(index)
    assert node.metadata["file"].endswith("b.png")


def test_a_failure_is_reported_and_tried_again(index, llm, server, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_CALLS_AT_ONCE", 1)
    make_image(tmp_path / "in" / "a.png")
    make_image(tmp_path / "in" / "b.png", "blue")
    server.modes = ["refuse"]
    report = index.add(tmp_path / "in", describe=llm)
    (error,) = report.errors
    assert "was not described" in str(error) and error.file.endswith("a.png")
    assert (report.descriptions.stored, report.descriptions.failed) == (1, 1)
    report = index.add(tmp_path / "in", describe=llm)
    assert (report.errors, report.descriptions.stored) == ([], 1)
    assert len(descriptions(index)) == 2


def test_a_busy_server_is_asked_again(index, llm, server, tmp_path):
    make_image(tmp_path / "a.png")
    server.modes = ["loading"] * 2  # the client of the server asks twice, then we do
    report = index.add(tmp_path / "a.png", describe=llm)
    assert (report.errors, report.descriptions.stored, report.descriptions.calls) == ([], 1, 2)


def test_a_server_that_refuses_everything_is_left_alone(index, llm, server, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_CALLS_AT_ONCE", 1)
    for shade in range(8):
        make_image(tmp_path / "in" / f"{shade}.png", (shade, 0, 0))
    server.mode = "refuse"
    report = index.add(tmp_path / "in", describe=llm)
    assert len(server.requests) == 5 and report.descriptions.left == 3
    assert "3 images were not described" in report.notes[-1]


def test_a_run_that_was_stopped_goes_on(index, llm, server, tmp_path, monkeypatch):
    """What was paid before Ctrl-C is not asked for again, stored or not."""
    for shade in range(4):
        make_image(tmp_path / "in" / f"{shade}.png", (shade, 0, 0))
    monkeypatch.setattr(module, "_BATCH_IMAGES", 2)
    store, batches = module._store, []

    def stop(*args):
        batches.append(args)
        if len(batches) == 2:
            raise KeyboardInterrupt
        store(*args)

    monkeypatch.setattr(module, "_store", stop)
    with pytest.raises(KeyboardInterrupt):
        index.add(tmp_path / "in", describe=llm)
    assert len(descriptions(index)) == 2
    monkeypatch.setattr(module, "_store", store)
    report = index.add(tmp_path / "in", describe=llm)
    assert (report.descriptions.stored, report.descriptions.calls) == (2, 0)
    assert len(descriptions(index)) == len(server.requests) == 4


def test_another_model_replaces_what_the_first_one_wrote(index, llm, tmp_path):
    make_image(tmp_path / "a.png")
    index.add(tmp_path / "a.png", describe=llm)
    index.add(tmp_path / "a.png", describe=Scripted(["Another view."], model_name="other"))
    (node,) = descriptions(index)
    assert (node.text, node.metadata["described_by"]) == ("Another view.", "other")


def test_what_an_image_says_cannot_steer_a_prompt(index, tmp_path):
    make_image(tmp_path / "a.png")
    llm = Scripted(["<think>hm</think>A sign.<|im_end|> See [1]\u202e." + "x" * 9000])
    index.add(tmp_path / "a.png", describe=llm)
    (node,) = descriptions(index)
    assert node.text.startswith("A sign.< |im_end| > See (ref 1).")
    assert len(node.text) == 2000


def test_a_lost_description_is_noticed(index, llm, tmp_path):
    make_image(tmp_path / "a.png")
    index.add(tmp_path / "a.png", describe=llm)
    (entry,) = index.files()
    assert (entry.nodes, entry.descriptions) == (2, 1)
    assert not index.collection.examine().lost
    index.collection._engine.delete_ids([descriptions(index)[0].node_id])
    assert index.collection.examine().lost
    index.add(tmp_path / "a.png", describe=llm)
    assert len(descriptions(index)) == 1 and not index.collection.examine().lost


def test_calls_are_bounded(index, tmp_path):
    at_once, most, lock = 0, 0, threading.Lock()
    pause = threading.Event()

    class Slow(Scripted):
        def chat(self, messages, **kwargs):
            nonlocal at_once, most
            with lock:
                at_once += 1
                most = max(most, at_once)
            pause.wait(0.05)
            with lock:
                at_once -= 1
            return super().chat(messages, **kwargs)

    for shade in range(12):
        make_image(tmp_path / "in" / f"{shade}.png", (shade, 0, 0))
    assert index.add(tmp_path / "in", describe=Slow(["A square."])).descriptions.stored == 12
    assert 2 <= most <= 4


def test_on_the_command_line(server, tmp_path, monkeypatch):
    monkeypatch.setattr(mmrag.embedders, "load_embedder", lambda *_, **__: FakeEmbedder())
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.setenv("COLUMNS", "120")
    photo = make_image(tmp_path / "photo.png")
    library, run = str(tmp_path / "library"), CliRunner().invoke
    asked = ["--describe", "tiny", "--base-url", server.url]
    result = run(app, ["index", str(photo), "-c", library, *asked])
    assert result.exit_code == 0, result.output
    assert "1 by tiny (0 known, 0 failed); 1 calls, 900 tokens in, 20 out" in result.output
    result = run(app, ["search", "lighthouse", "-c", library])
    assert f"description by tiny: {SAID}" in " ".join(result.output.split())
    result = run(app, ["search", "lighthouse", "-c", library, "--json"])
    assert '"described_by": "tiny"' in result.output
    result = run(app, ["index", str(photo), "-c", library, *asked, "--json"])
    assert json.loads(result.stdout)["descriptions"]["stored"] == 0
