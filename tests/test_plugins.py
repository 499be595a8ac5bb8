"""Families and rerankers of other packages, installed for the length of a test."""

import sys
import textwrap

import pytest

from mmrag.content import Content
from mmrag.embedders import all_families, load_embedder
from mmrag.errors import ConfigError
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


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """A package with one family and one reranker, as pip would leave it on the path."""
    (tmp_path / "own_plugin.py").write_text(textwrap.dedent(CODE))
    about = tmp_path / "own_plugin-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: own-plugin\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(
        "[mmrag.families]\nown_family = own_plugin:load_own\ngme = own_plugin:nothing\n"
        "[mmrag.rerankers]\nlongest = own_plugin:load_longest\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("own_plugin", None)


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
