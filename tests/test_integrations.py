"""The packages in LlamaIndex's namespace: what their wheels hold, and that they import."""

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import mmrag

pytest.importorskip("hatchling")

ROOT = Path(__file__).parents[1] / "integrations"
PACKAGES = {
    "llama-index-embeddings-mmrag": ("embeddings", "embedding", "UniversalEmbedding"),
    "llama-index-postprocessor-mmrag": ("postprocessor", "rerankers.postprocessor", "MLLMReranker"),
}


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
def test_wheel_holds_its_module_and_nothing_else(wheels, package):
    kind = PACKAGES[package][0]
    with zipfile.ZipFile(wheels[package]) as wheel:
        names = set(wheel.namelist())
        metadata = next(n for n in names if n.endswith("METADATA"))
        described = wheel.read(metadata).decode()
    module = {name for name in names if ".dist-info/" not in name}
    assert module == {f"llama_index/{kind}/mmrag/{file}" for file in ("__init__.py", "py.typed")}
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert f"Name: {package}" in described
    assert "Requires-Dist: mmrag" in described
    assert "License-Expression: Apache-2.0" in described


@pytest.mark.parametrize("package", PACKAGES)
def test_installed_wheel_imports_beside_llama_index_core(wheels, package, tmp_path):
    kind, module, name = PACKAGES[package]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--target", str(tmp_path), str(wheels[package])], check=True)
    code = f"""
import sys; sys.path.insert(0, {str(tmp_path)!r})
import llama_index.core
from llama_index.{kind}.mmrag import {name}
import llama_index.{kind}.mmrag as installed
from mmrag.{module} import {name} as ours
assert {name} is ours and installed.__file__.startswith({str(tmp_path)!r})
assert llama_index.core.__file__ and len(llama_index.__path__) > 1
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("package", PACKAGES)
def test_editable_install_points_at_the_folder(package, tmp_path):
    with zipfile.ZipFile(build(package, "build_editable", tmp_path)) as wheel:
        (path,) = (name for name in wheel.namelist() if name.endswith(".pth"))
        assert Path(wheel.read(path).decode().strip()) == ROOT / package


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_carry_the_version_of_mmrag(package):
    project = tomllib.loads((ROOT / package / "pyproject.toml").read_text())["project"]
    assert project["version"] == mmrag.__version__


def test_no_init_file_shadows_the_namespace():
    for package, (kind, *_) in PACKAGES.items():
        for folder in (ROOT / package / "llama_index", ROOT / package / "llama_index" / kind):
            assert folder.is_dir()
            assert not (folder / "__init__.py").exists()


def test_the_core_imports_no_integration():
    for path in (ROOT.parent / "mmrag").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        for kind, *_ in PACKAGES.values():
            assert f"llama_index.{kind}.mmrag" not in text, path
