"""Commands of the recipes end with one line."""

import pytest

from mmrag.errors import ConfigError
from mmrag_recipes import evaluate
from mmrag_recipes.console import STOPPED, ends_cleanly


def test_bad_input_is_one_line():
    with pytest.raises(SystemExit, match="error: lr: not a number"), ends_cleanly():
        raise ConfigError("lr: not a number")


def test_ctrl_c_is_no_traceback(monkeypatch, capsys):
    def interrupted(*given, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "load_embedder", interrupted)
    with pytest.raises(SystemExit) as ended:
        evaluate.main(["rows.jsonl"])
    assert ended.value.code == STOPPED
    assert "what was finished is kept" in capsys.readouterr().err
