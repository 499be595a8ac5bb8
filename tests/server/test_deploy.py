"""The Dockerfile and the compose file, as far as they can be checked without Docker."""

import re
from pathlib import Path

import pytest
import typer
import yaml

from mmrag.cli.app import app

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not (ROOT / "Dockerfile").exists(), reason="not in the sdist")


def options_of(command):
    """All option names of a command of mmrag."""
    found = typer.main.get_command(app).commands[command]
    return {name for parameter in found.params for name in parameter.opts}


def test_the_commands_of_the_containers_exist():
    dockerfile = (ROOT / "Dockerfile").read_text()
    default = re.findall(r'"([^"]+)"', re.search(r"^CMD (\[.*\])", dockerfile, re.MULTILINE)[1])
    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    for command in (default, services["mmrag"]["command"]):
        given = {word.split("=")[0] for word in command if word.startswith("--")}
        assert command[0] == "serve"
        assert given <= options_of("serve"), given


def test_services_refer_to_each_other_and_keep_their_data():
    compose = yaml.safe_load((ROOT / "compose.yaml").read_text())
    services = compose["services"]
    text = " ".join(services["mmrag"]["command"])
    for name in re.findall(r"http://(\w+):", text):
        assert name in services
        assert name in services["mmrag"]["depends_on"]
    for service in services.values():
        for volume in service.get("volumes", ()):
            assert volume.split(":")[0] in compose["volumes"]
    assert services["mmrag"]["ports"] == ["127.0.0.1:8321:8321"]
    assert "?" in services["mmrag"]["environment"]["MMRAG_API_KEYS"]  # compose refuses without


def test_what_is_copied_into_the_image_is_what_the_wheel_needs():
    kept = {
        line[1:]
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    build = (ROOT / "pyproject.toml").read_text()
    needed = set(re.search(r"^packages = \[(.*)\]", build, re.MULTILINE)[1].split(", "))
    folders = {name.strip('"').split("/")[0] for name in needed}
    assert folders | {"pyproject.toml", "README.md", "LICENSE"} <= kept
    assert all((ROOT / name).exists() for name in kept)
