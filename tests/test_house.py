"""The size and shape of the code: what a newcomer can read in one sitting.

Measured over ``mmrag/`` and ``recipes/``. Run this file to print the figures:
``python tests/test_house.py``.
"""

import ast
import io
import re
import tokenize
from collections import Counter
from pathlib import Path
from statistics import quantiles

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path for room in ("mmrag", "recipes") for path in (ROOT / room).rglob("*.py"))
TEXTS = {path: path.read_text(encoding="utf-8") for path in SOURCES}
TREES = {path: ast.parse(text) for path, text in TEXTS.items()}
FUNCTIONS = [
    (path, node)
    for path, tree in TREES.items()
    for node in ast.walk(tree)
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
]

BRANCHES = (ast.If, ast.IfExp, ast.For, ast.AsyncFor, ast.While, ast.ExceptHandler, ast.Assert)


def complexity(function: ast.AST) -> int:
    """Cyclomatic complexity that also counts each boolean operator and comprehension test."""
    count = 1
    for node in ast.walk(function):
        if isinstance(node, BRANCHES):
            count += 1
        elif isinstance(node, ast.BoolOp):
            count += len(node.values) - 1
        elif isinstance(node, ast.comprehension):
            count += len(node.ifs)
        elif isinstance(node, ast.Match):
            count += len(node.cases) - 1
    return count


def lines() -> list[int]:
    return [len(text.splitlines()) for text in TEXTS.values()]


def called_once() -> list[str]:
    """Private functions and methods that are named only once besides their definition."""
    used = Counter(word for text in TEXTS.values() for word in re.findall(r"\b_\w+\b", text))
    return [
        f"{path.relative_to(ROOT)}:{node.name}"
        for path, node in FUNCTIONS
        if node.name.startswith("_") and not node.name.startswith("__") and used[node.name] == 2
    ]


def comments() -> float:
    """Comment lines per 100 lines of code."""
    found = sum(
        token.type == tokenize.COMMENT
        for text in TEXTS.values()
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
    )
    return 100 * found / sum(lines())


def test_files_are_short():
    assert max(lines()) <= 600
    assert quantiles(lines(), n=10)[-1] <= 350


def test_no_function_has_more_than_twelve_conditions():
    tangled = {
        f"{path.relative_to(ROOT)}:{node.name}": complexity(node)
        for path, node in FUNCTIONS
        if complexity(node) > 12
    }
    assert not tangled


def test_helpers_serve_more_than_one_caller():
    assert len(called_once()) / len(FUNCTIONS) <= 0.15


def test_comments_give_reasons():
    """Their number alone, of course: reasons where a reader would ask why, not what a line does."""
    assert comments() >= 4


def raised(function: ast.AST) -> set[str]:
    """Classes of the errors that a function itself makes and raises."""
    inner = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    found = set()
    for child in ast.iter_child_nodes(function):
        if isinstance(child, ast.Raise) and isinstance(child.exc, ast.Call):
            name = ast.unparse(child.exc.func).split(".")[-1]
            found |= {name} if name[0].isupper() else set()
        if not isinstance(child, inner):
            found |= raised(child)
    return found


def unnamed_errors(node: ast.AST, where: str, documented: str = "") -> list[str]:
    """Errors that public functions below ``node`` raise, and no docstring there names."""
    found = []
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef) and not child.name.startswith("_"):
            text = documented + (ast.get_docstring(child) or "")
            found += unnamed_errors(child, where, text)
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            is_private = child.name.startswith("_") and child.name != "__init__"
            text = documented + (ast.get_docstring(child) or "")
            missing = set() if is_private else {name for name in raised(child) if name not in text}
            found += [f"{where}:{child.name}: {name}" for name in missing]
    return found


def test_docstrings_name_every_error():
    """The commands are left out: what they raise ends as a message on the terminal."""
    found = []
    for path, tree in TREES.items():
        if "cli" not in path.parts and ROOT / "mmrag" in path.parents:
            found += unnamed_errors(tree, str(path.relative_to(ROOT)))
    assert not found


if __name__ == "__main__":
    print(f"files {len(SOURCES)}, lines {sum(lines())}, functions {len(FUNCTIONS)}")
    print(f"file p90 {quantiles(lines(), n=10)[-1]:.0f}, longest {max(lines())}")
    print(f"helpers called once {len(called_once()) / len(FUNCTIONS):.1%}")
    print(f"comments per 100 lines {comments():.1f}")
    for path, node in FUNCTIONS:
        if complexity(node) > 12:
            print(f"  {complexity(node)} {path.relative_to(ROOT)}:{node.name}")
