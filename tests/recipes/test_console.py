"""Commands of the recipes end with one line."""

import subprocess
import sys

import pytest

from mmrag.errors import ConfigError
from mmrag_recipes import console, evaluate
from mmrag_recipes.__main__ import RECIPES, main
from mmrag_recipes.console import STOPPED, ends_cleanly, track


def test_bad_input_is_one_line():
    with pytest.raises(SystemExit, match="error: lr: not a number"), ends_cleanly():
        raise ConfigError("lr: not a number")


def test_ctrl_c_is_no_traceback(monkeypatch, capsys):
    def interrupted(*given, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "load_embedder", interrupted)
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", "rows.jsonl"])
    assert ended.value.code == STOPPED
    assert "what was finished is kept" in capsys.readouterr().err


def test_recipes_are_listed_and_a_wrong_one_is_named(capsys):
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in RECIPES)
    with pytest.raises(SystemExit, match="no recipe 'trian'"):
        main(["trian"])


def test_help_needs_no_torch():
    code = (
        "import sys\n"
        "from mmrag_recipes.__main__ import RECIPES, main\n"
        "for name in RECIPES:\n"
        "    try: main([name, '--help'])\n"
        "    except SystemExit as ended: assert ended.code == 0\n"
        "assert not {'torch', 'transformers', 'llama_index'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "GradCache: inputs run at a time" in " ".join(done.stdout.split())


def test_progress_is_a_line_where_there_is_no_terminal(monkeypatch, caplog):
    monkeypatch.setattr(console, "_SECONDS_BETWEEN_LINES", 0.0)
    with caplog.at_level("INFO", "mmrag_recipes"):
        assert list(track("abc", 3, "reading")) == ["a", "b", "c"]
    assert "reading: 2 of 3" in caplog.text
