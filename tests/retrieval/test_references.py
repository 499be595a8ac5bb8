"""Pages, figures, sections and kinds that a question names."""

import pytest
from fakes import FakeEmbedder, make_image, make_node

from mmrag.queries import Where
from mmrag.retrieval.references import named_nodes, wants_figures
from mmrag.retrieval.retriever import UniversalRetriever
from mmrag.store.collection import Collection, CollectionSettings

PAGES = {
    1: ("i", None, "Annual report of the harbour company"),
    2: ("ii", None, "Contents and figures"),
    3: ("1", "4 Results > 4.2 Costs", "Costs rose in every year, as Figure 3 shows"),
    4: ("2", None, "Figure 3: Costs by year\nand more words on them"),
    5: ("3", None, "4.20 Appendix\nTable 2. Ships that came in"),
    6: ("4", None, "Figure 30: Wind"),
}


@pytest.fixture(scope="module")
def embedder():
    return FakeEmbedder(dim=64)


@pytest.fixture(scope="module")
def collection(tmp_path_factory, embedder):
    folder = tmp_path_factory.mktemp("named")
    settings = CollectionSettings(embedder.name, embedder.fingerprint, 64)
    image = make_image(folder / "chart.png")
    with Collection.open(folder / "c", settings=settings) as opened:
        for file, sha in (("harbour_2023.pdf", "1" * 64), ("notes.pdf", "2" * 64)):
            nodes = [
                make_node(text, file=file, sha256=sha, page=page, label=label, section=section)
                for page, (label, section, text) in PAGES.items()
            ]
            nodes.append(
                make_node(
                    "Wind speed at the pier", file=file, sha256=sha, page=2, kind="figure",
                    image=image, label="ii",
                )
            )  # fmt: skip
            opened.write(nodes, [{"text": embedder.encode([node.text])[0]} for node in nodes[:6]]
                + [{"image": embedder.encode([{"image": image}])[0]}])  # fmt: skip
        yield opened


ONE = Where(files=("harbour_2023.pdf",))


@pytest.mark.parametrize(
    ("question", "pages"),
    [
        ("What does page 4 say?", {4, 6}),  # the fourth, and the one printed as 4
        ("Was steht auf Seite 2?", {2, 4}),
        ("What is on page ii?", {2}),
        ("Who is named on the cover?", {1}),
        ("What rose, by figure 3?", {3, 4}),
        ("Which ships are in Table 2?", {5}),
        ("What does section 4.2 say about costs?", {3}),
        ("What did the company pay?", set()),
    ],
)
def test_pages_that_are_named(collection, question, pages):
    assert {hit.payload["page"] for hit in named_nodes(collection, question, ONE)} == pages


def test_a_caption_comes_before_a_mention(collection):
    hits = named_nodes(collection, "Figure 3", ONE)
    assert [(hit.payload["page"], hit.score) for hit in hits] == [(4, 1.0), (3, 0.5)]


def test_a_page_number_counts_only_with_its_document(collection):
    assert named_nodes(collection, "What does page 4 say?", None) == []
    named = named_nodes(collection, "What does page 4 of harbour 2023 say?", None)
    assert {hit.payload["file"] for hit in named} == {"harbour_2023.pdf"}
    assert named_nodes(collection, "page 4", Where(files=("missing.pdf",))) == []


def test_a_named_page_is_among_the_first(collection, embedder):
    retriever = UniversalRetriever(collection, embedder, 2, where=ONE)
    hits = retriever.search("costs on page 5")
    assert 5 in {hit.metadata["page"] for hit in hits}
    assert any("reference" in hit.ranks for hit in hits)
    without = UniversalRetriever(collection, embedder, 2, where=ONE, weights={"reference": 0})
    assert all("reference" not in hit.ranks for hit in without.search("costs on page 5"))


@pytest.mark.parametrize(
    ("question", "wanted"),
    [
        ("Find a figure of wind speed", True),
        ("show me the monthly sales charts", True),
        ("Please find an aerial photo of the harbour", True),
        ("Find the page with Figure 3", False),
        ("find figure 3", False),
        ("What does the figure show?", False),
        ("find the plan", False),
    ],
)
def test_whether_a_figure_is_asked_for(question, wanted):
    assert wants_figures(question) is wanted


def test_a_figure_that_is_asked_for_comes_first_and_pages_follow(collection, embedder):
    retriever = UniversalRetriever(collection, embedder, 5)
    hits = retriever.search("Find a figure of costs by year")
    assert [hit.metadata["kind"] for hit in hits] == ["figure", "figure", "page", "page", "page"]
    pages_only = retriever.search("Find a figure of costs by year", where=Where(kinds=("page",)))
    assert {hit.metadata["kind"] for hit in pages_only} == {"page"}
