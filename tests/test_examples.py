"""Every example in a docstring runs, and every public class has one."""

import doctest
import importlib
import inspect
import pkgutil

import pytest

import mmrag

# What only runs beside an optional library is tried where that is installed.
MODULES = sorted(
    info.name for info in pkgutil.walk_packages(mmrag.__path__, "mmrag.") if info.name != "mmrag"
)


def examples(name: str) -> list[doctest.DocTest]:
    module = importlib.import_module(name)
    found = doctest.DocTestFinder(exclude_empty=True).find(module)
    return [test for test in found if test.examples]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if name.startswith("mmrag.server"):
        pytest.importorskip("fastapi")
    if name.endswith("mteb_encoder"):
        pytest.importorskip("mteb")
    if name.endswith("st_module"):
        pytest.importorskip("sentence_transformers")
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    for test in examples(name):
        report: list[str] = []
        runner.run(test, out=report.append, clear_globs=False)
        assert not report, "".join(report)


def test_every_public_class_has_an_example():
    classes = [
        (name, value)
        for name in mmrag.__all__
        if inspect.isclass(value := getattr(mmrag, name)) and not issubclass(value, Exception)
    ]
    without = [name for name, value in classes if ">>>" not in (value.__doc__ or "")]
    assert not without
