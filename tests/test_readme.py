"""The README keeps its word: every command and snippet in it runs."""

import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL)
PYTHON = [code for language, code in BLOCKS if language == "python"]
COMMANDS = [
    line.removeprefix("$ ")
    for language, code in BLOCKS
    if language == ""
    for line in code.splitlines()
    if line.startswith(("make ", "pip ", "mmrag ", "$ mmrag "))
]


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder as the README supposes: the sample PDFs under ``samples`` and ``papers``."""
    folder = tmp_path_factory.mktemp("desk")
    script = REPOSITORY / "docs" / "samples" / "make_samples.py"
    subprocess.run([sys.executable, str(script), str(folder / "samples")], check=True)
    (folder / "papers").symlink_to(folder / "samples")
    (folder / "notes.md").write_text("# Notes\n\nThe gate sticks in winter.\n")
    (folder / "scans").mkdir()
    return folder


def test_there_are_snippets_and_commands():
    assert len(PYTHON) == 2
    assert len(COMMANDS) >= 6


def test_the_python_of_the_readme_runs(desk, monkeypatch, capsys):
    monkeypatch.chdir(desk)
    from llama_index.core import Settings

    before = Settings._embed_model
    for code in PYTHON:
        exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    Settings._embed_model = before
    shown = capsys.readouterr().out
    assert "11 pages; 0 problems" in shown
    assert "handbook.pdf 4" in shown


def test_the_commands_of_the_readme_are_understood(desk, monkeypatch):
    """Commands of mmrag run for real; those that need a server are parsed."""
    from mmrag.cli.app import app

    monkeypatch.chdir(desk)
    runner = CliRunner()
    for line in COMMANDS:
        program, *words = shlex.split(line)
        if program != "mmrag":
            continue
        if "--base-url" in words:
            assert runner.invoke(app, [words[0], "--help"]).exit_code == 0
            options = [word for word in words if word.startswith("--")]
            text = runner.invoke(app, [words[0], "--help"], env={"COLUMNS": "200"}).output
            assert all(option in text for option in options)
            continue
        result = runner.invoke(app, words)
        assert result.exit_code in (0, 1), f"{line}: {result.output}"
        assert "Traceback" not in result.output


def test_the_answer_that_the_readme_shows_is_the_answer(desk, monkeypatch):
    from mmrag.cli.app import app

    monkeypatch.chdir(desk)
    runner = CliRunner()
    assert runner.invoke(app, ["index", "samples", "-c", "fresh"]).exit_code == 0
    question = "When may I water with the hose in summer?"
    result = runner.invoke(app, ["ask", question, "-c", "fresh", "--json"])
    found = json.loads(result.stdout)
    assert found["found"]
    first = found["sources"][0]
    assert (Path(first["file"]).name, first["page"]) == ("handbook.pdf", 3)
    plain = " ".join(README.split())
    assert " ".join(first["quote"].split()) in plain


def test_targets_and_extras_of_the_readme_exist():
    makefile = (REPOSITORY / "Makefile").read_text()
    for line in COMMANDS:
        program, target, *_ = line.split()
        if program == "make":
            assert f"\n{target}:" in makefile
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    for page in [README, *(p.read_text() for p in (REPOSITORY / "docs").glob("*.md"))]:
        for extras in re.findall(r"(?:mmrag|\.)\[([\w,]+)\]'?\"?", page):
            assert set(extras.split(",")) <= set(project["optional-dependencies"])


def test_links_of_the_readme_and_docs_lead_somewhere():
    pages = [REPOSITORY / "README.md", *(REPOSITORY / "docs").glob("*.md")]
    for page in pages:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_recipe_commands_of_the_docs_are_understood():
    """Every ``python -m mmrag_recipes ...`` line of the docs parses, with the files it names."""
    from mmrag_recipes.__main__ import RECIPES
    from mmrag_recipes.options import read_arguments

    lines = [
        line.strip()
        for page in (REPOSITORY / "docs").glob("*.md")
        for line in page.read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
        if line.strip().startswith("python -m mmrag_recipes ")
    ]
    assert len(lines) >= 5
    for line in lines:
        recipe, *words = shlex.split(line)[3:]
        assert read_arguments(RECIPES[recipe], words, recipe), line


def test_links_of_the_readme_work_on_pypi():
    pytest.importorskip("hatch_fancy_pypi_readme")
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "metadata", "readme"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    targets = re.findall(r"(!?)\[[^\]]*\]\(([^)]+)\)", done.stdout)
    assert len(targets) > 20
    for is_image, target in targets:
        assert target.startswith("https://"), target
        if is_image:
            assert target.startswith("https://raw.githubusercontent.com/"), target
        # What the address names on GitHub is there in the repository.
        path = re.split(r"/main/", target)[-1]
        assert not target.startswith("https://raw") or (REPOSITORY / path).is_file(), target
