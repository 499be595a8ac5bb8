"""Options: TOML files, the command line over them, and errors that name the key."""

import pytest

from mmrag.errors import ConfigError
from mmrag_recipes.config import MineConfig, SynthesizeConfig, TrainConfig
from mmrag_recipes.options import build, find_config, read_arguments, read_file

TOML = 'model = "m"\nout = "o"\n[[data]]\nrows = "r"\n[lora]\nr = 8\n'


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text(TOML)
    return path


def test_the_command_line_overrides_the_file(file):
    words = ["--config", str(file), "--lora.r", "16", "--lr", "5e-5", "--out", "other"]
    words += ["--freeze", "visual", "lm", "--gradient-checkpointing", "--batch_size", "8"]
    words += ["--save_every=7", "--evaluate=dev_rows.jsonl"]
    config = read_arguments(TrainConfig, words, "train")
    assert (config.lora.r, config.lr, config.out) == (16, 5e-5, "other")
    assert (config.freeze, config.gradient_checkpointing) == (("visual", "lm"), True)
    assert (config.batch_size, config.save_every) == (8, 7)
    assert config.evaluate == "dev_rows.jsonl"
    assert config.data[0].rows == "r"


def test_a_table_may_be_given_on_the_command_line_alone(file):
    words = ["--model", "m", "--out", "1", "--data", "a.jsonl", "b.jsonl", "--lora.alpha", "4"]
    words += ["--limits", "{max_length = 9}"]
    config = read_arguments(TrainConfig, words, "train")
    assert [data.rows for data in config.data] == ["a.jsonl", "b.jsonl"]
    assert (config.out, config.lora.alpha, config.limits) == ("1", 4, {"max_length": 9})
    assert read_arguments(TrainConfig, words[:6], "train").lora is None


def test_positional_words(tmp_path):
    config = read_arguments(SynthesizeConfig, ["a", "--out", "o", "b", "--dev", "0.2"], "s")
    assert ([str(p) for p in config.paths], config.dev) == (["a", "b"], 0.2)
    assert str(read_arguments(MineConfig, ["r.jsonl", "--out", "o"], "m").rows) == "r.jsonl"


def test_what_is_saved_can_be_read_again(file, tmp_path):
    config = build(TrainConfig, read_file(file), "here")
    config.save(tmp_path / "config.json")
    words = ["--config", str(tmp_path / "config.json")]
    assert read_arguments(TrainConfig, words, "train") == config


def test_shipped_options_are_found_by_name():
    assert find_config("adapt").is_file()
    with pytest.raises(ConfigError, match="adpt: no such file, and not one of the shipped ones"):
        find_config("adpt")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"temprature": 0.1}, r"unknown key 'temprature'\. Did you mean 'temperature'"),
        ({"lora": {"rank": 3}}, r"unknown key 'lora\.rank'"),
        ({"data": [{"row": "x"}]}, r"unknown key 'data\.0\.row'\. Did you mean 'rows'"),
        ({"steps": "many"}, r"steps: Input should be a valid integer.*'many'"),
        ({"steps": True}, "steps: Input should be a valid integer"),
        ({"data": []}, "data: .*at least 1 item"),
    ],
)
def test_unknown_and_wrong_keys_are_errors_with_the_nearest_name(change, words):
    values = {"model": "m", "out": "o", "data": ["r"]}
    with pytest.raises(ConfigError, match=words):
        build(TrainConfig, values | change, "here")


def test_all_missing_keys_are_named():
    with pytest.raises(ConfigError, match="missing key 'out'; missing key 'data'"):
        build(TrainConfig, {"model": "m"}, "here")


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "bad.toml").write_text("steps = = 3")
    (tmp_path / "list.json").write_text("[1]")
    for name in ("bad.toml", "list.json", "none.toml"):
        with pytest.raises(ConfigError, match=name.split(".")[0]):
            read_file(tmp_path / name)
