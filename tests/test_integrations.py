"""The packages for other frameworks: what their wheels hold, and that they import.

Each has its own tests, of its framework's contract; pytest collects them as it does these.
"""

import doctest
import importlib
import importlib.util
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import mmrag

pytest.importorskip("hatchling")

ROOT = Path(__file__).parents[1] / "integrations"
# The modules of each package, and what it must stand beside.
PACKAGES = {
    "llama-index-embeddings-mmrag": (("llama_index.embeddings.mmrag",), "llama_index.core"),
    "llama-index-postprocessor-mmrag": (("llama_index.postprocessor.mmrag",), "llama_index.core"),
    "langchain-mmrag": (("langchain_mmrag",), "langchain_core"),
    "mmrag-haystack": (
        (
            "haystack_integrations.components.embedders.mmrag",
            "haystack_integrations.components.retrievers.mmrag",
        ),
        "haystack",
    ),
    "sentence-transformers-mmrag": (("sentence_transformers_mmrag",), "sentence_transformers"),
    "mteb-mmrag": (("mteb_mmrag",), "mteb"),
}
MODULES = [(package, name) for package, (names, _) in PACKAGES.items() for name in names]


def build(package: str, hook: str, folder: Path) -> Path:
    """Build by the standard hook, without pip: ``build_wheel`` or ``build_editable``."""
    code = f"from hatchling.build import {hook}; print({hook}({str(folder)!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / package, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return folder / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheels")
    return {package: build(package, "build_wheel", folder) for package in PACKAGES}


@pytest.mark.parametrize("package", PACKAGES)
def test_wheel_holds_its_modules_and_nothing_else(wheels, package):
    with zipfile.ZipFile(wheels[package]) as wheel:
        names = set(wheel.namelist())
        metadata = next(n for n in names if n.endswith("METADATA"))
        described = wheel.read(metadata).decode()
    expected = set()
    for module in PACKAGES[package][0]:
        folder = ROOT / package / module.replace(".", "/")
        files = [path for path in folder.rglob("*") if path.suffix in (".py", ".typed")]
        assert {"__init__.py", "py.typed"} <= {path.name for path in files}
        expected |= {path.relative_to(ROOT / package).as_posix() for path in files}
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert f"Name: {package}" in described
    assert "Requires-Dist: mmrag" in described
    assert "License-Expression: Apache-2.0" in described


def test_installed_wheels_import_beside_their_frameworks(wheels, tmp_path):
    """In one process, since each framework takes seconds to import."""
    here = [package for package in PACKAGES if importlib.util.find_spec(PACKAGES[package][1])]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    files = [str(wheels[package]) for package in here]
    subprocess.run([*pip, "--target", str(tmp_path), *files], check=True)
    modules = [module for package in here for module in PACKAGES[package][0]]
    code = f"""
import importlib, sys; sys.path.insert(0, {str(tmp_path)!r})
for framework in {[PACKAGES[package][1] for package in here]!r}:
    assert importlib.import_module(framework).__file__, framework
for name in {modules!r}:
    module = importlib.import_module(name)
    assert module.__file__.startswith({str(tmp_path)!r}), name
    assert module.__all__ and all(hasattr(module, each) for each in module.__all__), name
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("package", "kind", "home", "name"),
    [
        ("llama-index-embeddings-mmrag", "embeddings", "embedding", "UniversalEmbedding"),
        (
            "llama-index-postprocessor-mmrag",
            "postprocessor",
            "rerankers.postprocessor",
            "MLLMReranker",
        ),
    ],
)
def test_names_of_llamaindex_are_those_of_mmrag(package, kind, home, name, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / package))
    there = importlib.import_module(f"llama_index.{kind}.mmrag")
    assert getattr(there, name) is getattr(importlib.import_module(f"mmrag.{home}"), name)


@pytest.mark.parametrize("package", PACKAGES)
def test_editable_install_points_at_the_folder(package, tmp_path):
    with zipfile.ZipFile(build(package, "build_editable", tmp_path)) as wheel:
        (path,) = (name for name in wheel.namelist() if name.endswith(".pth"))
        assert Path(wheel.read(path).decode().strip()) == ROOT / package


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_carry_the_version_of_mmrag(package):
    project = tomllib.loads((ROOT / package / "pyproject.toml").read_text())["project"]
    assert project["version"] == mmrag.__version__


def test_every_package_is_checked_here():
    assert {path.parent.name for path in ROOT.glob("*/pyproject.toml")} == set(PACKAGES)


@pytest.mark.parametrize(("package", "module"), MODULES)
def test_no_init_file_shadows_a_namespace(package, module):
    """Of ``llama_index.embeddings.mmrag`` only the last part is a package of ours."""
    folder = (ROOT / package / module.replace(".", "/")).parent
    while folder != ROOT / package:
        assert not (folder / "__init__.py").exists()
        folder = folder.parent


@pytest.mark.parametrize(("package", "module"), MODULES)
def test_examples_run(package, module, tmp_path, monkeypatch):
    pytest.importorskip(PACKAGES[package][1])
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / package))
    folder = ROOT / package / module.replace(".", "/")
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    for path in sorted(folder.glob("*.py")):
        name = module if path.stem == "__init__" else f"{module}.{path.stem}"
        for test in doctest.DocTestFinder().find(importlib.import_module(name)):
            report: list[str] = []
            runner.run(test, out=report.append)
            assert not report, "".join(report)


def test_the_core_imports_no_integration():
    integration = re.compile(
        r"^\s*(from|import) (langchain|haystack|llama_index\.\w+\.mmrag|\w+_mmrag\b)", re.M
    )
    for path in (ROOT.parent / "mmrag").rglob("*.py"):
        assert not integration.search(path.read_text(encoding="utf-8")), path
