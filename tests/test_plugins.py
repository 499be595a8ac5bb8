"""Families, rerankers and readers of other packages, installed for the length of a test."""

import sys
import textwrap

import pytest

from mmrag.content import Content
from mmrag.embedders import all_families, load_embedder
from mmrag.errors import ConfigError
from mmrag.reading import ReadOptions, find_files, read_file
from mmrag.reading.client import close_workers
from mmrag.reading.files import file_kind
from mmrag.rerankers import all_rerankers, load_scorer

CODE = """
    import torch
    from mmrag.embedders.families.gme import load_gme

    def load_own(folder, placement, *, max_length=64):
        backbone = load_gme(folder, placement, max_length=max_length)
        backbone.family = "own_family"
        return backbone

    class Longest:
        def __init__(self, name):
            self.name = name

        def judge(self, pairs, instruction=None):
            return [min(1.0, len(document.text) / 100) for _, document in pairs]

    def load_longest(folder, placement, *, name, prompt=None):
        return Longest(name)
"""
READER = """
    from mmrag.reading import PageRecord, Passage, Problem

    def read_own(path, folder, options):
        for number, text in enumerate(path.read_text().splitlines(), 1):
            if text == "crash":
                raise ValueError("line of no kind")
            if text == "odd":
                yield text
            elif text.startswith("page"):
                yield PageRecord(page=number, image=None, text=text, text_layer="none")
            elif text.startswith("bad"):
                yield Problem(number, "it is unreadable")
            else:
                yield Passage(text, None, "Notes")
"""


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """A package with a family, a reranker and readers, as pip would leave it on the path."""
    (tmp_path / "own_plugin.py").write_text(textwrap.dedent(CODE))
    (tmp_path / "own_reader.py").write_text(textwrap.dedent(READER))
    about = tmp_path / "own_plugin-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: own-plugin\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(
        "[mmrag.families]\nown_family = own_plugin:load_own\ngme = own_plugin:nothing\n"
        "[mmrag.rerankers]\nlongest = own_plugin:load_longest\n"
        "[mmrag.readers]\n.own = own_reader:read_own\n.md = own_reader:read_own\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    close_workers()  # those that wait were started without the package
    yield
    close_workers()
    sys.modules.pop("own_plugin", None)


def read_own(path, text):
    """The nodes of a file and what could not be read of it."""
    path.write_text(text)
    errors = []
    pages = list(read_file(path, path.parent / "images", on_error=errors.append))
    return [node for page in pages for node in page.nodes], [str(each.args[0]) for each in errors]


def test_a_file_is_read_by_the_reader_of_another_package(plugin, tmp_path):
    nodes, errors = read_own(tmp_path / "a.OWN", "page one\nbad two\nfirst note\nsecond note")
    assert [(node.metadata["kind"], node.text) for node in nodes] == [
        ("page", "page one"),
        ("text", "first note"),
        ("text", "second note"),
    ]
    assert nodes[0].metadata["page"] == 1 and nodes[1].metadata["section"] == "Notes"
    assert errors == ["it is unreadable"]
    found = find_files([tmp_path / "a.OWN"])
    assert [path.name for path in found.files] == ["a.OWN"] and not found.errors


def test_the_reader_of_another_package_may_fail(plugin, tmp_path):
    nodes, errors = read_own(tmp_path / "a.own", "page one\ncrash\npage three")
    assert [node.text for node in nodes] == ["page one"]
    assert errors == ["ValueError: line of no kind"]
    _, errors = read_own(tmp_path / "b.own", "odd")
    assert "gave a str; it must give PageRecord" in errors[0]
    _, errors = read_own(tmp_path / "c.own", "\n")
    assert errors == []  # an empty line is a passage of no text
    (tmp_path / "d.own").write_bytes(b"PK\x03\x04")  # as Office documents begin
    assert file_kind(tmp_path / "d.own", ReadOptions()) == "plugin"


def test_a_plugin_does_not_take_the_place_of_a_reader_here(plugin, tmp_path):
    nodes, errors = read_own(tmp_path / "a.md", "# Wells\n\npage one")
    assert [node.metadata.get("section") for node in nodes] == ["Wells"]
    assert not errors


def test_without_the_package_its_files_are_not_read(tmp_path):
    (tmp_path / "a.own").write_text("page one")
    assert find_files([tmp_path]).passed_over == [tmp_path / "a.own"]
    (error,) = find_files([tmp_path / "a.own"]).errors
    assert "files of type .own are not supported" in str(error)


def test_a_family_of_another_package_is_loaded(plugin, qwen2_vl_folder):
    assert "own_family" in all_families()
    embedder = load_embedder(qwen2_vl_folder, family="own_family", device="cpu", max_length=32)
    assert embedder.family == "own_family"
    assert embedder.encode(["wind energy"]).shape == (1, embedder.dim)
    with pytest.raises(ConfigError, match="squash: unknown to family 'own_family'"):
        load_embedder(qwen2_vl_folder, family="own_family", squash=3)


def test_a_plugin_does_not_take_the_place_of_a_family_here(plugin, qwen2_vl_folder):
    assert load_embedder(qwen2_vl_folder, family="gme", device="cpu").family == "gme"


def test_a_reranker_of_another_package_is_loaded(plugin, qwen2_vl_folder):
    assert "longest" in all_rerankers()
    scorer = load_scorer(qwen2_vl_folder, kind="longest", device="cpu")
    pairs = [(Content("q"), Content("x" * n)) for n in (10, 90)]
    assert scorer.judge(pairs) == [0.1, 0.9]
    with pytest.raises(ConfigError, match="max_length: unknown"):
        load_scorer(qwen2_vl_folder, kind="longest", max_length=3)


def test_without_the_package_it_is_not_known(qwen2_vl_folder):
    with pytest.raises(ConfigError, match="family='own_family' is not known"):
        load_embedder(qwen2_vl_folder, family="own_family")
    with pytest.raises(ConfigError, match="kind='longest' is not known"):
        load_scorer(qwen2_vl_folder, kind="longest")
