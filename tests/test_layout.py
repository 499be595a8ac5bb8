"""The house stands: the import contracts hold, and every public name exists."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mmrag

PACKAGE = Path(mmrag.__file__).parent
FILES = sorted(p for p in PACKAGE.rglob("*.py") if p.parent != PACKAGE or p.stem != "__init__")
ROOMS = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in FILES}


def test_the_import_contracts_of_pyproject_hold():
    program = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([program], cwd=PACKAGE.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "0 broken" in done.stdout


def test_modules_import_from_the_room_that_defines_a_name():
    """``from mmrag import X`` inside the package would hide which room is used."""
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: write absolute imports"
                if node.module == "mmrag":
                    names = {alias.name for alias in node.names}
                    assert names <= ROOMS | {"__version__"}, path


def test_public_names_are_sorted_importable_and_complete():
    assert mmrag.__all__ == sorted(set(mmrag.__all__))
    assert dir(mmrag) == mmrag.__all__
    assert {*mmrag._HOME, "__version__"} == set(mmrag.__all__)
    for name, home in mmrag._HOME.items():
        module = importlib.import_module(f"mmrag.{home}")
        assert mmrag.__getattr__(name) is getattr(module, name)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = mmrag.no_such_name


def test_every_public_name_is_on_the_api_page():
    page = (PACKAGE.parent / "docs" / "api.md").read_text(encoding="utf-8")
    listed = re.findall(r"^::: mmrag\.(\w+)$", page, re.MULTILINE)
    assert sorted(listed) == sorted(set(mmrag.__all__) - {"__version__"})


def test_no_public_name_hides_a_module():
    """``mmrag.x`` would be one or the other, depending on what was imported before."""
    assert not ROOMS & set(mmrag._HOME)


def test_type_checkers_see_the_same_names():
    source = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    seen = {
        alias.name: node.module.removeprefix("mmrag.")
        for node in ast.walk(source)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mmrag.")
        for alias in node.names
    }
    assert seen == mmrag._HOME


def test_every_part_has_what_its_all_names():
    listing = [path for path in FILES if "__all__" in path.read_text(encoding="utf-8")]
    for path in listing:
        name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        module = importlib.import_module(name.removesuffix(".__init__"))
        assert len(set(module.__all__)) == len(module.__all__), name
        assert all(hasattr(module, public) for public in module.__all__), name


def test_importing_the_package_is_cheap():
    code = (
        "import sys, mmrag; dir(mmrag)\n"
        "heavy = {'torch', 'transformers', 'llama_index', 'numpy', 'pymupdf', 'qdrant_client'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
