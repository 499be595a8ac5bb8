"""Needles are hidden where they should be, found or not as a reader would say, and scored right."""

import itertools
import json

import numpy as np
import pymupdf
import pytest
from chat_server import ChatServer
from fakes import FakeEmbedder
from typer.testing import CliRunner

import mmrag.embedders
from mmrag.cli.app import app
from mmrag.content import load_image
from mmrag.errors import ConfigError, ContentError
from mmrag.evaluation.needle.corpora import (
    Corpus,
    CorpusWriter,
    NeedleOptions,
    place,
    plan_corpora,
)
from mmrag.evaluation.needle.pages import KINDS, PageMaker
from mmrag.evaluation.needle.pictures import all_shapes
from mmrag.evaluation.needle.report import write_needle_report
from mmrag.evaluation.needle.run import find_needles
from mmrag.evaluation.needle.scores import chance, wilson
from mmrag.reading import ReadOptions
from mmrag.reading.writing import DrawnPage, copyable_pages, write_pdf

SMALL = NeedleOptions(sizes=(4,), depths=(0.0, 1.0), layers=("text",), each=1, grid=2)


class Thumbnails(FakeEmbedder):
    """Images that look alike are near each other; a text that goes with an image is ignored."""

    def _vector(self, content, instruction):
        if not content.images:
            return super()._vector(content, instruction)
        image = load_image(content.images[0]).convert("RGB").resize((8, 8))
        pixels = np.asarray(image, dtype=float).ravel()
        return np.concatenate([pixels - pixels.mean(), [1e-3]])


def texts(path):
    with pymupdf.open(path) as document:
        return [" ".join(page.get_text().split()) for page in document]


def written(folder, layer="text", size=12, options=SMALL):
    maker = PageMaker(options.seed, options.grid)
    needles = maker.needles(options.kinds, options.depths, options.each)
    corpus = Corpus(layer, size, 1, place(needles, size))
    return corpus, CorpusWriter(folder, maker).write(corpus, lambda count: None)


def test_a_needle_is_on_the_page_of_its_depth():
    needles = PageMaker(0, 2).needles(("page",), (0.0, 0.25, 0.5, 1.0), 1)
    placed = place(needles, 101)
    assert {page: needle.depth for page, needle in placed.items()} == {
        1: 0.0,
        26: 0.25,
        51: 0.5,
        101: 1.0,
    }


def test_two_needles_never_share_a_page_and_stay_near_their_depth():
    needles = PageMaker(0, 2).needles(KINDS, (0.0, 0.5, 1.0), 2)
    placed = place(needles, 40)
    assert len(placed) == len(needles) == 18
    assert all(abs(page - 1 - needle.depth * 39) <= 6 for page, needle in placed.items())


def test_every_needle_is_hidden_once_in_every_size_and_layer():
    options = NeedleOptions(sizes=(6, 50), each=3)
    needles = PageMaker(0, 2).needles(options.kinds, options.depths, options.each)
    corpora = plan_corpora(options, needles)
    assert len({corpus.name for corpus in corpora}) == len(corpora)
    for size, layer in itertools.product((6, 50), ("text", "scanned")):
        these = [each for each in corpora if (each.size, each.layer) == (size, layer)]
        hidden = [needle.id for each in these for needle in each.needles.values()]
        assert sorted(hidden) == sorted(needle.id for needle in needles)
        assert all(2 * len(each.needles) <= size for each in these)


def test_only_the_needle_answers_its_question(tmp_path):
    corpus, path = written(tmp_path)
    pages = texts(path)
    assert len(pages) == 12
    for number, needle in corpus.needles.items():
        there = [n for n, text in enumerate(pages, 1) if needle.asks[0].answer in text]
        # Words of a chart and of a sheet are pixels.
        assert there == ([number] if needle.kind == "page" else [])


def test_nothing_else_has_the_name_or_the_picture_of_a_needle():
    maker = PageMaker(3, 2)
    needles = maker.needles(KINDS, (0.0, 0.5, 1.0), 10)
    others = list(itertools.islice(maker.haystack(), 64))
    words = {word.strip(".,?") for page in others for p in page.paragraphs for word in p.split()}
    for needle in needles:
        if needle.kind == "page":
            (name,) = [w.strip(".,?") for w in needle.asks[0].text.split()[1:] if w[0].isupper()]
            assert name not in words
        if needle.kind == "cell":
            shown = {image for page in others for _, image in page.pictures}
            assert needle.asks[1].picture not in shown
            mine = [image for _, image in needle.page.pictures]
            assert mine.count(needle.asks[1].picture) == 1
    pictures = [needle.asks[1].picture for needle in needles if needle.kind == "cell"]
    assert len(set(pictures)) == 30


def test_pictures_are_told_apart_by_their_words():
    words = [shapes.words for shapes in all_shapes()]
    assert len(set(words)) == len(words) == 4 * 6 * 8 * 7


def test_a_scanned_corpus_has_images_of_the_same_pages_and_no_text(tmp_path):
    small = NeedleOptions(depths=(0.0,), each=1, grid=2)
    _, path = written(tmp_path, "scanned", 4, small)
    assert texts(path) == [""] * 4
    _, with_text = written(tmp_path, "text", 4, small)
    with pymupdf.open(path) as scan, pymupdf.open(with_text) as text:
        for one, other in zip(scan, text, strict=True):
            a, b = (
                np.frombuffer(page.get_pixmap(dpi=30).samples, dtype=np.uint8).astype(float)
                for page in (one, other)
            )
            assert np.abs(a - b).mean() < 6


def test_pages_are_the_same_from_a_seed_and_others_from_another():
    one, same, other = (PageMaker(seed, 2) for seed in (5, 5, 6))
    first, second, third = (
        [needle.page for needle in maker.needles(KINDS, (0.5,), 2)] for maker in (one, same, other)
    )
    assert first == second != third


def test_pages_of_a_folder_are_copied_and_a_bad_file_is_named(tmp_path):
    write_pdf(tmp_path / "good.pdf", [DrawnPage((f"Page {n} of mine.",)) for n in (1, 2, 3)])
    (tmp_path / "bad.pdf").write_bytes(b"%PDF-1.7 nothing else")
    pages, errors = copyable_pages(tmp_path)
    assert [(page.path.name, page.page) for page in pages] == [("good.pdf", n) for n in (1, 2, 3)]
    assert [("bad.pdf" in str(error)) for error in errors] == [True]
    write_pdf(tmp_path / "copy.pdf", [pages[2], DrawnPage(("Between.",)), pages[0]])
    assert texts(tmp_path / "copy.pdf") == ["Page 3 of mine.", "Between.", "Page 1 of mine."]


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    # From the formula of Wilson's paper, by hand in 6 decimals.
    [(8, 10, 0.490162, 0.943318), (0, 5, 0.0, 0.434482), (5, 5, 0.565518, 1.0)],
)
def test_wilson(right, n, low, high):
    score = wilson(right, n)
    assert (score.mean, score.n) == (right / n, n)
    assert (score.low, score.high) == pytest.approx((low, high), abs=1e-6)


def test_chance_is_the_mean_over_all_orders():
    found = chance(4, (1, 3))
    ranks = [order.index("right") + 1 for order in itertools.permutations(["right", *"abc"])]
    assert found["hit@1"] == pytest.approx(np.mean([rank <= 1 for rank in ranks]))
    assert found["hit@3"] == pytest.approx(np.mean([rank <= 3 for rank in ranks]))
    assert found["mrr"] == pytest.approx(np.mean([1 / rank if rank <= 3 else 0 for rank in ranks]))
    assert chance(2, (1, 5))["hit@5"] == 1


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    work = tmp_path_factory.mktemp("needle")
    embedder = Thumbnails(dim=193)
    return find_needles(embedder, work, SMALL, reading=ReadOptions(ocr="off")), work, embedder


def test_each_needle_is_found_by_what_it_is(found):
    result, _, _ = found
    assert result.evaluation.notes == []
    cells = {cell.group["kind"]: cell for cell in result.cells("kind")}
    assert {kind: cell.n for kind, cell in cells.items()} == {
        "page": 2,
        "figure": 2,
        "cell by text": 2,
        "cell by picture": 2,
    }
    # Words find the sentence; pictures alike find the cell, and where it is on its sheet.
    assert cells["page"].hits[1].mean == 1.0
    image = next(system for system in result.systems() if system.ranking == "image")
    of_image = {cell.group["kind"]: cell for cell in result.cells("kind", system=image)}
    assert of_image["cell by picture"].hits[1].mean == 1.0
    assert cells["cell by picture"].located == 1.0
    assert np.isnan(cells["page"].located)


def test_scores_are_those_of_the_ranks(found):
    result, _, _ = found
    evaluation = result.evaluation
    for cell in result.cells("kind", "depth"):
        ids = [
            id_
            for id_, case in result.cases.items()
            if (case.kind, case.depth) == (cell.group["kind"], cell.group["depth"])
        ]
        ranks = [min(evaluation.found[result.main][id_].values(), default=None) for id_ in ids]
        assert cell.mrr.mean == pytest.approx(np.mean([1 / r if r else 0 for r in ranks]))
        assert cell.hits[1].mean == np.mean([r == 1 for r in ranks])
        assert cell.chance["hit@1"] == 0.25


def test_a_second_run_reads_and_embeds_nothing_again(found):
    result, work, embedder = found
    embedder.calls.clear()
    again = find_needles(embedder, work, SMALL, reading=ReadOptions(ocr="off"))
    assert again.cases == result.cases
    assert again.evaluation.found == result.evaluation.found
    # Where a part is on its page is asked anew; it costs a query each.
    parts = sum(case.located is not None for case in result.cases.values())
    assert embedder.encoded == parts


def test_json_and_report_have_every_number(found, tmp_path):
    result, _, _ = found
    values = json.loads(json.dumps(result.to_json()))
    assert len(values["needle"]["cases"]) == 8
    rows = [row for row in values["needle"]["cells"] if row["ranking"] == "fusion"]
    assert [(row["kind"], row["depth"]) for row in rows[:2]] == [("page", 0.0), ("page", 1.0)]
    assert rows[0]["located"] is None
    write_needle_report(result, tmp_path / "r.html")
    html = (tmp_path / "r.html").read_text()
    assert "<script" not in html
    for cell in result.cells("layer", "kind", "size"):
        assert f"{cell.mrr.mean:.3f}" in html
        assert cell.hits[1].interval in html
    assert "text, cell by picture, 4 pages" in html


def test_a_model_without_images_is_asked_in_words_alone(tmp_path):
    options = NeedleOptions(sizes=(4,), depths=(0.5,), kinds=("cell",), layers=("text",), each=1)
    found = find_needles(FakeEmbedder(modalities=("text",)), tmp_path, options)
    assert [case.kind for case in found.cases.values()] == ["cell by text"]
    assert any("takes no images" in note for note in found.evaluation.notes)


def test_a_folder_must_have_enough_pages(tmp_path):
    write_pdf(tmp_path / "mine.pdf", [DrawnPage(("Only this.",))])
    with pytest.raises(ContentError, match="have 1 pages"):
        find_needles(FakeEmbedder(), tmp_path / "work", SMALL, folder=tmp_path)


@pytest.mark.parametrize(
    "wrong",
    [{"sizes": (1,)}, {"depths": (1.5,)}, {"kinds": ("word",)}, {"each": 0}, {"cuts": ()}],
)
def test_options_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ConfigError):
        NeedleOptions(**wrong)


def run(*args):
    return CliRunner().invoke(app, ["needle", *map(str, args)])


@pytest.fixture
def plain(monkeypatch):
    for name in ("MMRAG_LLM", "OPENAI_BASE_URL", "OPENAI_API_BASE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(
        mmrag.embedders, "load_embedder", lambda name, **_: FakeEmbedder(name=str(name))
    )


def test_the_command_answers_and_saves(plain, tmp_path, monkeypatch):
    folder = tmp_path / "mine"
    folder.mkdir()
    write_pdf(folder / "mine.pdf", [DrawnPage((f"Sheet {n} of nothing.",)) for n in range(5)])
    monkeypatch.setenv("OPENAI_API_KEY", "x")
    server = ChatServer("The value is 12345 [1].")
    file, html = tmp_path / "found.json", tmp_path / "found.html"
    try:
        shown = run(
            *(folder, "--size", 4, "--kind", "page", "--layer", "text", "--depth", 0.5),
            *("--each", 1, "--answers", "--llm", "tiny", "--base-url", server.url),
            *("--json", file, "--html", html),
        )
    finally:
        server.close()
    assert shown.exit_code == 0, shown.output
    assert "1 questions, of fusion" in shown.stdout
    assert "located" in shown.stdout
    values = json.loads(file.read_text())
    (row,) = [row for row in values["needle"]["cells"] if row["ranking"] == "fusion"]
    assert row["hit@1"][0] == 1.0
    assert row["answers"]["mmrag-nano, tiny"]["contains"] == 0.0
    assert "a right page cited" in html.read_text()


def test_wrong_use_of_the_command_is_explained(plain, tmp_path):
    judged = run("--judge", "x")
    assert judged.exit_code == 2
    assert "--judge needs --answers" in judged.stderr
    write_pdf(tmp_path / "mine.pdf", [DrawnPage(("Only this.",))])
    short = run(tmp_path, "--size", 10)
    assert short.exit_code == 2
    assert "give sizes of no more" in short.stderr
