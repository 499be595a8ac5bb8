"""Synthesis: all pairs, balance, resumption, filters, what happens without a model."""

import io
import json
import shutil
import threading
from types import SimpleNamespace

import httpx
import numpy as np
import openai
import pymupdf
import pytest
from chat_server import ChatServer
from fakes import FakeEmbedder
from PIL import Image
from tiny_chat import save_llava

from mmrag.errors import ConfigError, ContentError, EndpointError, ModelError
from mmrag_recipes import corpus as corpus_module
from mmrag_recipes import synthesize as synthesize_module
from mmrag_recipes.__main__ import main
from mmrag_recipes.config import PAIRS, PROMPTS, SynthesizeConfig
from mmrag_recipes.corpus import Document, read_corpus
from mmrag_recipes.figures import drawn_image
from mmrag_recipes.rows import ImageStore, Item, Row, check_rows, store_of
from mmrag_recipes.synthesize import split
from mmrag_recipes.writers import (
    EndpointModel,
    Entity,
    ExtractiveWriter,
    LocalModel,
    reads_as_query,
)

ANIMALS = ["kingfisher", "walrus", "badger", "stork", "lynx", "otter"]


@pytest.fixture(scope="module")
def papers(tmp_path_factory):
    """Six pages, each with a few sentences and a photograph with its caption."""
    folder = tmp_path_factory.mktemp("papers")
    pdf = pymupdf.open()
    chance = np.random.default_rng(0)
    for number, animal in enumerate(ANIMALS, 1):
        page = pdf.new_page()
        lines = [
            f"The {animal} lives near water and sleeps for {number} hours in the afternoon.",
            f"Young {animal} families eat {number * 3} fish each day before they walk home.",
            "Nobody knows why this happens, and further studies are wanted by everyone.",
        ]
        for row, line in enumerate(lines):
            page.insert_text((60, 80 + 24 * row), line, fontsize=10)
        noise = chance.integers(0, 255, (120, 160, 3), dtype=np.uint8)
        image = Image.fromarray(noise).resize((640, 480))
        path = folder / f"{animal}.png"
        image.save(path)
        page.insert_image((100, 200, 420, 440), filename=path)
        caption = f"Figure {number}: A {animal} rests on a rock at noon."
        page.insert_text((100, 460), caption, fontsize=9)
        path.unlink()
    pdf.set_toc([[1, f"All about {animal}", n] for n, animal in enumerate(ANIMALS, 1)])
    pdf.save(folder / "animals.pdf")
    return folder


class Scripted:
    """A model that answers by rule and can be told to fail."""

    name = "scripted"

    def __init__(self):
        self.asked = []
        self.failing = False
        self._lock = threading.Lock()

    def ask(self, prompt, images):
        with self._lock:
            self.asked.append((prompt, len(images)))
        if self.failing:
            raise EndpointError("no answer")
        animal = next((a for a in ANIMALS if a in prompt.rsplit("Example", 1)[-1]), "lynx")
        if prompt.startswith("You turn"):
            value = {"entity": animal, "query": "Where does this animal live?", "caption": animal}
        else:
            value = {"query": f"Where does the {animal} live?", "answer": "near water"}
        return f"Sure! {json.dumps(value)}", 100, 10


CONFIG = SynthesizeConfig(
    paths=("unused",),
    out="unused",
    rows=36,
    min_similarity=-1.0,
    top_k=100,
    license="CC0",
    concurrency=3,
)


def made(paths, out, config, embedder, model=None, prompts=PROMPTS, drawer=None):
    config = config.replace(paths=tuple(paths), out=out, prompts=prompts)
    return synthesize_module.synthesize(config, embedder, model, drawer)


def test_all_nine_pairs_come_out_balanced_and_valid(papers, tmp_path):
    model = Scripted()
    report = made([papers], tmp_path, CONFIG, FakeEmbedder(), model)
    rows, problems = check_rows(tmp_path / "rows.jsonl", store_of(tmp_path / "rows.jsonl"))
    assert not problems
    assert {row.pair for row in rows} == set(PAIRS)
    assert set(report.kept.values()) == {4}
    assert all(row.license == "CC0" and row.source.startswith("animals.pdf#") for row in rows)
    fused = [row for row in rows if row.query.modality == "fused"]
    assert all(row.query.text == "Where does this animal live?" for row in fused)
    # An image in the query is never the document itself.
    assert all(row.query.image != row.positives[0].image for row in rows if row.query.image)
    with_images = [n for prompt, n in model.asked if prompt.startswith("You write")]
    assert 0 in with_images
    assert 1 in with_images
    assert report.usage["requests"] == len(model.asked)
    assert report.usage["prompt_tokens"] == 100 * len(model.asked)


def test_a_second_run_asks_nothing_again(papers, tmp_path):
    model = Scripted()
    first = made([papers], tmp_path, CONFIG, FakeEmbedder(), model)
    kept = (tmp_path / "rows.jsonl").read_text()
    with (tmp_path / "generated.jsonl").open("a") as file:
        file.write('{"key": "cut off by a ki')
    again = Scripted()
    second = made([papers], tmp_path, CONFIG, FakeEmbedder(), again)
    assert again.asked == []
    assert second.kept == first.kept
    assert (tmp_path / "rows.jsonl").read_text() == kept


def test_what_a_server_failed_is_tried_again_in_the_next_run(papers, tmp_path):
    model = Scripted()
    model.failing = True
    config = CONFIG.replace(pairs=("text->text",), rows=4)
    report = made([papers], tmp_path, config, FakeEmbedder(), model)
    assert report.lost == {"the server or the document failed": 4}
    model.failing = False
    assert made([papers], tmp_path, config, FakeEmbedder(), model).kept["text->text"] == 4


def test_rows_that_do_not_find_their_document_are_dropped(papers, tmp_path):
    class Vague(Scripted):
        def ask(self, prompt, images):
            return json.dumps({"query": "zebra quagga okapi", "answer": ""}), 1, 1

    config = CONFIG.replace(pairs=("text->text",), rows=6, top_k=1)
    good = made([papers], tmp_path / "good", config, FakeEmbedder(), Scripted())
    vague = made([papers], tmp_path / "vague", config, FakeEmbedder(), Vague())
    assert good.kept["text->text"] >= 5
    assert vague.kept["text->text"] <= 2
    assert vague.lost["not among the first 1 for its own query"] >= 4


def test_without_a_model_the_report_says_so(papers, tmp_path):
    report = made([papers], tmp_path, CONFIG, FakeEmbedder())
    assert "no language model" in str(report)
    rows, _ = check_rows(tmp_path / "rows.jsonl")
    assert len({row.pair for row in rows}) >= 7
    for row in rows:
        # A sentence that became the query is not left in the document as a give-away.
        text = row.positives[0].text
        assert not (text and row.query.text and row.query.text in text)
    captions = [r.query.text for r in rows if r.pair == "text->image"]
    assert any("rests on a rock" in text for text in captions)


def test_a_sentence_broken_over_lines_is_taken_out_too():
    text = "Before.\nThe kingfisher lives near (clear) water and\n  sleeps at noon.\nAfter."
    document = Document("1", "page", text, None, "", "a.pdf", 1)
    sentence = "The kingfisher lives near (clear) water and sleeps at noon."
    item = document.item("text", without=sentence)
    assert item.text is not None
    assert item.text.split() == ["Before.", "After."]


def test_documents_serve_again_and_whole_pages_are_held_out(papers, tmp_path):
    config = CONFIG.replace(pairs=("text->text",), queries=3, dev=0.4)
    report = made([papers], tmp_path, config, FakeEmbedder())
    train, _ = check_rows(tmp_path / "rows.jsonl")
    held, _ = check_rows(tmp_path / "dev.jsonl")
    assert report.kept["text->text"] == len(train) + len(held) > len(ANIMALS)
    assert train
    assert held
    assert not {row.place for row in train} & {row.place for row in held}
    queries = [row.query.text for row in train + held]
    assert len(set(queries)) == len(queries)


def test_a_model_is_told_which_query_it_writes(papers, tmp_path):
    model = Scripted()
    config = CONFIG.replace(pairs=("text->text",), rows=99, queries=2)
    made([papers], tmp_path, config, FakeEmbedder(), model)
    again = [prompt for prompt, _ in model.asked if "query number 2" in prompt]
    assert len(again) * 2 == len(model.asked)


def test_a_sentence_of_many_pages_asks_for_none_of_them(papers, tmp_path):
    config = CONFIG.replace(pairs=("text->text",), rows=99, queries=9)
    made([papers], tmp_path, config, FakeEmbedder())
    rows, _ = check_rows(tmp_path / "rows.jsonl")
    assert any(row.query.text.startswith("Young") for row in rows)
    assert not any(row.query.text.startswith("Nobody knows") for row in rows)


def test_an_embedder_without_eyes_filters_what_it_can_and_says_the_rest(papers, tmp_path):
    blind = FakeEmbedder(modalities=("text",))
    report = made([papers], tmp_path, CONFIG, blind, Scripted())
    assert report.unfiltered == sum(
        count for pair, count in report.kept.items() if pair != "text->text"
    )
    assert "without a round trip" in str(report)


def test_a_filter_that_can_drop_nothing_is_told(papers, tmp_path):
    config = CONFIG.replace(pairs=("text->text",), rows=99)
    report = made([papers], tmp_path / "all", config.replace(top_k=99), FakeEmbedder())
    (n_texts,) = report.too_few.values()
    assert f"all {n_texts} documents as text are within top_k" in str(report)
    for top_k, told in ((n_texts, {"text": n_texts}), (n_texts - 1, {})):
        report = made([papers], tmp_path / str(top_k), config.replace(top_k=top_k), FakeEmbedder())
        assert report.too_few == told
    assert "within top_k" not in str(report)


def test_an_answer_that_is_no_json_is_asked_for_again(papers, tmp_path):
    class Chatty(Scripted):
        def ask(self, prompt, images):
            reply = super().ask(prompt, images)
            return reply if "JSON object alone" in prompt else ("I would rather not.", 5, 5)

    config = CONFIG.replace(pairs=("text->text",), rows=6, concurrency=1)
    model = Chatty()
    assert made([papers], tmp_path / "a", config, FakeEmbedder(), model).kept["text->text"] == 6
    assert len(model.asked) == 12

    class Mute(Scripted):
        def ask(self, prompt, images):
            super().ask(prompt, images)
            return "No.", 5, 5

    model = Mute()
    report = made([papers], tmp_path / "b", config, FakeEmbedder(), model)
    assert report.lost == {"no query could be written": 6}
    assert len(model.asked) == 12


def test_prompts_can_be_edited(papers, tmp_path):
    folder = tmp_path / "prompts"
    folder.mkdir()
    for path in PROMPTS.glob("*.txt"):
        (folder / path.name).write_text("MY OWN WORDS $text $query")
    model = Scripted()
    config = CONFIG.replace(pairs=("text->text",), rows=2)
    made([papers], tmp_path / "out", config, FakeEmbedder(), model, folder)
    assert all(prompt.startswith("MY OWN WORDS The") for prompt, _ in model.asked)
    (folder / "text.txt").unlink()
    with pytest.raises(ConfigError, match=r"text\.txt"):
        made([papers], tmp_path / "out2", config, FakeEmbedder(), model, folder)


def test_over_the_wire_with_images(papers, tmp_path):
    server = ChatServer(answer='{"query": "Where does the walrus live?", "answer": "sea"}')
    try:
        model = EndpointModel("tiny", server.url, "key", retries=0)
        config = CONFIG.replace(pairs=("text->image",), rows=2)
        report = made([papers], tmp_path, config, FakeEmbedder(), model)
        assert report.kept["text->image"] == 2
        assert server.requests[0]["response_format"] == {"type": "json_object"}
        assert server.requests[0]["max_tokens"] == 400
        assert "temperature" not in server.requests[0]
        parts = server.requests[0]["messages"][0]["content"]
        assert parts[1]["image_url"]["url"].startswith("data:image/")
        server.mode = "refuse"
        with pytest.raises(EndpointError, match="tiny"):
            model.ask("x", [])
    finally:
        server.close()


def test_the_command_line_runs_on_extracts(papers, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(synthesize_module, "load_embedder", lambda name: FakeEmbedder())
    out = tmp_path / "out"
    main(["synthesize", str(papers), "--out", str(out), "--rows", "9", "--top-k", "100"])
    shown = capsys.readouterr().out
    assert "rows kept" in shown
    assert (out / "rows.jsonl").is_file()
    with pytest.raises(SystemExit):
        main(["synthesize", str(papers), "--out", str(out), "--rowz", "9"])
    assert "unrecognized arguments: --rowz" in capsys.readouterr().err


def test_nothing_to_read_is_an_error(tmp_path):
    with pytest.raises(ContentError, match="Nothing could be read"):
        made([tmp_path], tmp_path / "out", CONFIG, FakeEmbedder())


def test_entities_can_be_drawn_where_the_files_have_no_figures(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("The kingfisher lives near water and sleeps for an hour in the afternoon. " * 3)

    class Painter:
        model = "painter"

        def draw(self, caption):
            buffer = io.BytesIO()
            Image.new("RGB", (40, 30), "blue").save(buffer, "PNG")
            return buffer.getvalue()

    config = CONFIG.replace(pairs=("fused->text",))
    out = tmp_path / "out"
    report = made([path], out, config, FakeEmbedder(), Scripted(), drawer=Painter())
    assert report.kept == {"fused->text": 1}


def test_rows_of_another_writer_or_prompt_are_not_taken_over(papers, tmp_path):
    config = CONFIG.replace(pairs=("text->text",), rows=4)
    made([papers], tmp_path, config, FakeEmbedder())
    model = Scripted()
    made([papers], tmp_path, config, FakeEmbedder(), model)
    assert len(model.asked) == 4
    rows, _ = check_rows(tmp_path / "rows.jsonl")
    assert all(row.query.text.startswith("Where does the") for row in rows)
    prompts = tmp_path / "prompts"
    shutil.copytree(PROMPTS, prompts)
    with (prompts / "text.txt").open("a") as file:
        file.write("Ask in French.")
    made([papers], tmp_path, config, FakeEmbedder(), model, prompts)
    assert len(model.asked) == 8
    # What was made before the prompts changed is still there.
    made([papers], tmp_path, config, FakeEmbedder(), model)
    assert len(model.asked) == 8


def test_the_license_may_be_added_later(papers, tmp_path):
    config = CONFIG.replace(pairs=("text->text",), rows=4, license="")
    made([papers], tmp_path, config, FakeEmbedder())
    made([papers], tmp_path, config.replace(license="MIT"), FakeEmbedder())
    rows, _ = check_rows(tmp_path / "rows.jsonl")
    assert {row.license for row in rows} == {"MIT"}


def test_rows_of_a_document_without_pages_are_held_out_together():
    rows = [
        Row(
            id=f"{document}/text->text/{turn}",
            query=Item(text=f"q{turn}"),
            positives=[Item(text=f"document {document}")],
            source="notes.md",
        )
        for document in range(8)
        for turn in range(4)
    ]
    train, held = split(rows, CONFIG.replace(dev=0.5))
    assert train
    assert held
    documents = [{row.positives[0].text for row in part} for part in (train, held)]
    assert not documents[0] & documents[1]


def test_a_model_of_this_machine_writes_too(papers, tmp_path):
    """A random model says nothing useful; what matters is that it is asked and counted."""
    with pytest.raises(ModelError):
        LocalModel(str(tmp_path / "none"))
    folder = save_llava(tmp_path / "llava")
    config = CONFIG.replace(pairs=("text->image",), rows=1, concurrency=1)
    model = LocalModel(str(folder), device="cpu", max_tokens=4)
    report = made([papers], tmp_path / "out", config, FakeEmbedder(), model)
    assert report.usage["requests"] >= 1
    assert report.usage["prompt_tokens"] > 50
    assert report.lost == {"no query could be written": 1}


def test_a_copy_of_a_file_is_left_out_and_said(papers, tmp_path):
    for name in ("a.pdf", "b.pdf"):
        shutil.copy(papers / "animals.pdf", tmp_path / name)
    store = ImageStore(tmp_path / "images")
    documents, problems = read_corpus([tmp_path / "a.pdf", tmp_path / "b.pdf"], store)
    assert {document.file for document in documents} == {(tmp_path / "a.pdf").as_posix()}
    assert len({document.id for document in documents}) == len(documents)
    (problem,) = problems
    assert "b.pdf" in problem
    assert "same content" in problem


def test_options_of_a_server_and_a_server_without_json_mode(monkeypatch):
    options = {"max_tokens": 9, "max_tokens_key": "max_completion_tokens", "temperature": 0.5}
    model = EndpointModel("tiny", "http://127.0.0.1:9/v1", "key", retries=0, **options)
    asked = []

    def create(**given):
        asked.append(given)
        if "response_format" in given:
            request = httpx.Request("POST", "http://x")
            refused = httpx.Response(400, request=request)
            raise openai.BadRequestError("no", response=refused, body=None)
        message = SimpleNamespace(content="{}")
        return SimpleNamespace(choices=[SimpleNamespace(message=message)], usage=None)

    monkeypatch.setattr(model.client.chat.completions, "create", create)
    assert [model.ask("x", [])[0] for _ in range(2)] == ["{}", "{}"]
    assert ["response_format" in given for given in asked] == [True, False, False]
    assert asked[1]["max_completion_tokens"] == 9
    assert asked[1]["temperature"] == 0.5
    assert "max_tokens" not in asked[1]


def test_a_server_that_is_down_is_told_at_once(tmp_path):
    with pytest.raises(EndpointError, match=r"cannot be reached"):
        EndpointModel("tiny", "http://127.0.0.1:9/v1", "key").check()
    server = ChatServer()
    try:
        EndpointModel("tiny", server.url, "key").check()
    finally:
        server.close()


def test_a_server_that_goes_down_leaves_the_rows_of_before(papers, tmp_path):
    model = Scripted()
    config = CONFIG.replace(pairs=("text->text",), rows=6)
    made([papers], tmp_path, config, FakeEmbedder(), model)
    before = (tmp_path / "rows.jsonl").read_text()
    assert before
    model.failing = True
    more = config.replace(rows=40, queries=9, concurrency=1)
    with pytest.raises(EndpointError, match=r"8 times in a row.*run the same command again"):
        made([papers], tmp_path, more, FakeEmbedder(), model)
    assert len(model.asked) == 6 + 8
    assert (tmp_path / "rows.jsonl").read_text() == before


def test_the_cost_is_that_of_all_runs(papers, tmp_path):
    config = CONFIG.replace(pairs=("text->text",), rows=4, prompt_price=1e6, completion_price=1e4)
    first = made([papers], tmp_path, config, FakeEmbedder(), Scripted())
    assert first.cost == pytest.approx(4 * (100 + 0.1))
    more = config.replace(rows=6)
    again = made([papers], tmp_path, more, FakeEmbedder(), Scripted())
    assert again.usage["requests"] == 6
    assert again.cost == pytest.approx(6 * (100 + 0.1))


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ("Where does the kingfisher live in winter?", True),
        ("Цена билета в 2019 году", True),
        ("12 450 18.2 33 7,100 1999 2004 88", False),
        ("the exam- ple of a bro- ken line", False),
        ("a well-known state-of-the-art method", True),
    ],
)
def test_lists_of_numbers_and_broken_words_are_no_queries(text, good):
    assert reads_as_query(text) is good


def test_extracts_leave_out_what_does_not_read():
    text = (
        "Total 12 450 18.2 33 7,100 1999 2004 88 12 14. "
        "The sound of the bro- ken bell was heard in all of the valley. "
        "The kingfisher nests in burrows that it digs into sandy banks of rivers."
    )
    document = Document("a", "page", text, None, "", "a.pdf", 1)
    writer = ExtractiveWriter([document])
    drafts = [writer.draft(document, "text", turn) for turn in range(4)]
    taken = {draft.sentence for draft in drafts if draft and draft.sentence}
    assert taken <= {"The kingfisher nests in burrows that it digs into sandy banks of rivers."}


def test_queries_in_several_languages(papers, tmp_path):
    model = Scripted()
    config = CONFIG.replace(pairs=("text->text",), rows=12, queries=2)
    french = config.replace(languages=("French", "Thai"))
    made([papers], tmp_path / "a", french, FakeEmbedder(), model)
    told = [prompt.rsplit("Write the query in ", 1)[-1].strip(" .\n") for prompt, _ in model.asked]
    assert set(told) == {"French", "Thai"}
    with pytest.raises(ConfigError, match="languages"):
        made([papers], tmp_path / "b", french, FakeEmbedder())


def test_instructions_may_vary(papers, tmp_path):
    config = CONFIG.replace(pairs=("text->text",), rows=24, queries=4, vary_instructions=True)
    made([papers], tmp_path, config, FakeEmbedder(), Scripted())
    rows, _ = check_rows(tmp_path / "rows.jsonl")
    assert len({row.instruction for row in rows}) == 3


def test_files_are_read_once(papers, tmp_path, monkeypatch):
    config = CONFIG.replace(pairs=("text->text",), rows=4)
    made([papers], tmp_path, config, FakeEmbedder())
    kept = (tmp_path / "rows.jsonl").read_text()
    with (tmp_path / "documents.jsonl").open("a") as file:
        file.write('{"stamp": "cut off by a ki')

    def never(*given, **options):
        raise AssertionError("a file was read again")

    monkeypatch.setattr(corpus_module, "read_file", never)
    embedder = FakeEmbedder()
    made([papers], tmp_path, config, embedder)
    assert (tmp_path / "rows.jsonl").read_text() == kept
    assert embedder.encoded == 0  # vectors are kept as well


def test_without_another_figure_nothing_is_asked(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("The kingfisher lives near water and sleeps for an hour in the afternoon. " * 3)
    model = Scripted()
    config = CONFIG.replace(pairs=("fused->text", "text->text"), rows=2)
    report = made([path], tmp_path / "out", config, FakeEmbedder(), model)
    assert set(report.planned) == {"text->text"}
    assert all(not prompt.startswith("You turn") for prompt, _ in model.asked)


def test_a_drawn_image_must_show_its_caption(tmp_path):
    class Painter:
        def draw(self, caption):
            buffer = io.BytesIO()
            Image.new("RGB", (40, 30), "blue").save(buffer, "PNG")
            return buffer.getvalue()

    entity = Entity("walrus", "Where does this animal live?", "A walrus on ice.")
    store = ImageStore(tmp_path / "images")
    drawn = [drawn_image(Painter(), entity, FakeEmbedder(), store, least) for least in (-1, 1.1)]
    assert drawn[0]
    assert drawn[1] is None
    blind = FakeEmbedder(modalities=("text",))
    assert drawn_image(Painter(), entity, blind, store, 1.1)  # nothing can be said against it
