"""The layout holds: imports point one way, heavy libraries stay in their place, names exist."""

import ast
import importlib
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import mmrag

PACKAGE = Path(mmrag.__file__).parent

# Each imports only from those before it.
ORDER = [
    *("errors", "content", "instructions", "lexical", "prompting", "modeling", "embedders"),
    *("reading", "nodes", "queries", "llms", "rerankers", "embedding", "store", "ingest"),
    *("retrieval", "answering", "index", "testing", "cli"),
]

# Library: the only parts that may import it.
SEATS = {
    "pymupdf": {"reading"},
    "rapidocr": {"reading"},
    "qdrant_edge": {"store"},
    "qdrant_client": {"store", "index"},
}
WITHOUT_LLAMA_INDEX = {"errors", "content", "instructions", "lexical", "prompting"} | {
    "modeling",
    "embedders",
}
WITHOUT_TORCH = set(ORDER) - {"modeling", "embedders", "rerankers", "llms"}


def part(path: Path) -> str:
    """Top-level module or subpackage of a file: embedders/base.py is of embedders."""
    inside = path.relative_to(PACKAGE)
    return inside.parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Full names of all modules a file imports, in functions and for types too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write absolute imports"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


FILES = sorted(p for p in PACKAGE.rglob("*.py") if p.parent != PACKAGE or p.stem != "__init__")
PARTS = {part(path) for path in FILES}
IMPORTS = {path: imported(path) for path in FILES}


def parts_used(path: Path) -> set[str]:
    names = (name.split(".") for name in IMPORTS[path] if name.startswith("mmrag."))
    return {name[1] for name in names if name[1] in PARTS} - {part(path)}


def test_imports_are_seen():
    assert {"content", "errors", "embedders"} <= parts_used(PACKAGE / "embedding.py")
    assert len(FILES) > 20


def test_imports_point_one_way():
    wrong = [
        f"{path.relative_to(PACKAGE)} imports {used}"
        for path in FILES
        for used in parts_used(path)
        if {part(path), used} <= set(ORDER) and ORDER.index(used) >= ORDER.index(part(path))
    ]
    assert not wrong, "\n".join(wrong)


def test_imports_go_in_no_circle():
    graph: dict[str, set[str]] = {}
    for path in FILES:
        graph.setdefault(part(path), set()).update(parts_used(path))
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' -> '.join(error.args[1])}")


def test_no_part_imports_the_package_face():
    """``from mmrag import X`` would hide which part is used."""
    for path in FILES:
        own = [name for name in IMPORTS[path] if name.startswith("mmrag.")]
        named = {name.split(".")[1] for name in own}
        assert named <= PARTS | {"__version__"}, path


@pytest.mark.parametrize("library", SEATS)
def test_library_stays_in_its_seat(library):
    users = {part(path) for path in FILES if library in {n.split(".")[0] for n in IMPORTS[path]}}
    assert users <= SEATS[library]


def test_engine_needs_no_llama_index_and_the_rest_no_torch():
    for path in FILES:
        roots = {name.split(".")[0] for name in IMPORTS[path]}
        if part(path) in WITHOUT_LLAMA_INDEX:
            assert "llama_index" not in roots, path
        if part(path) in WITHOUT_TORCH:
            assert not roots & {"torch", "transformers", "peft"}, path


def test_public_names_are_sorted_importable_and_complete():
    assert mmrag.__all__ == sorted(set(mmrag.__all__))
    assert dir(mmrag) == mmrag.__all__
    assert {*mmrag._HOME, "__version__"} == set(mmrag.__all__)
    for name, home in mmrag._HOME.items():
        module = importlib.import_module(f"mmrag.{home}")
        assert mmrag.__getattr__(name) is getattr(module, name)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = mmrag.no_such_name


def test_no_public_name_hides_a_module():
    """``mmrag.x`` would be one or the other, depending on what was imported before."""
    assert not PARTS & set(mmrag._HOME)


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
