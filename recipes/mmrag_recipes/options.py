"""Options of a recipe: one pydantic model each, filled from a TOML file and the command line.

The docstring under a field is its help on the command line. A TOML file has the fields as keys;
``--key value`` overrides a key, ``--lora.r 16`` one of a table.
"""

from __future__ import annotations

import argparse
import difflib
import json
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from mmrag.errors import ConfigError

SHIPPED = Path(__file__).parent / "configs"


class Options(BaseModel):
    """Base of all options: immutable, and every key is known."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    positional: ClassVar[tuple[str, ...]] = ()
    """Fields that the command line takes without ``--key``, in this order."""

    def replace(self, **changes: Any) -> Self:
        """A validated copy with other values."""
        return type(self).model_validate({**dict(self), **changes})

    def save(self, path: Path) -> None:
        """Write all values as JSON, which ``--config`` reads again."""
        path.write_text(self.model_dump_json(indent=1, exclude_none=True), encoding="utf-8")


O = TypeVar("O", bound=Options)  # noqa: E741


def read_arguments(cls: type[O], arguments: Sequence[str], prog: str) -> O:
    """Options from the words of a command line and the file that ``--config`` names.

    Raises:
        ConfigError: For bad values; SystemExit for words that are no options, and for --help.
    """
    description = (cls.__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(
        prog=prog,
        description=description,
        # What is not given must not hide the value of the file.
        argument_default=argparse.SUPPRESS,
        # Abbreviations would change their meaning when an option is added.
        allow_abbrev=False,
    )
    shipped = ", ".join(sorted(path.stem for path in SHIPPED.glob("*.toml")))
    parser.add_argument(
        "--config", metavar="FILE", help=f"TOML file of these options; shipped for train: {shipped}"
    )
    for name, field in _flags(cls):
        _add(parser, name, field, positional=name in cls.positional)
    # TOML keys have underscores, and are understood here too.
    words = [_dashed(word) if word.startswith("--") else word for word in arguments]
    # Intermixed: options may stand between the positional words.
    given = vars(parser.parse_intermixed_args(words))
    file = given.pop("config", None)
    values = read_file(find_config(file)) if file else {}
    for name, value in given.items():
        *tables, last = name.split(".")
        inner = values
        for table in tables:
            inner = inner.setdefault(table, {})
        inner[last] = value
    return build(cls, values, file or "command line")


def _dashed(word: str) -> str:
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value


def find_config(name: str) -> Path:
    """A file of options by its path, or a shipped one by its name.

    Raises:
        ConfigError: If there is neither.
    """
    shipped = SHIPPED / f"{name}.toml"
    if not Path(name).is_file() and not shipped.is_file():
        names = ", ".join(sorted(path.stem for path in SHIPPED.glob("*.toml")))
        raise ConfigError(f"{name}: no such file, and not one of the shipped ones: {names}.")
    return Path(name) if Path(name).is_file() else shipped


def read_file(path: Path) -> dict[str, Any]:
    """Values of a TOML file, or of a JSON file that ``Options.save`` wrote.

    Raises:
        ConfigError: If it cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot read the options ({error}).") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a table of options.")
    return values


def build(cls: type[O], values: Mapping[str, Any], where: str) -> O:
    """Validate plain values; numbers are not made from text, nor from true and false.

    Raises:
        ConfigError: Naming each bad key, with the nearest known key for an unknown one.
    """
    try:
        # As JSON, lists become tuples and texts become paths even in strict mode.
        return cls.model_validate_json(json.dumps(values, default=str), strict=True)
    except ValidationError as error:
        problems = [_problem(cls, dict(one)) for one in error.errors()]
        raise ConfigError(f"{where}: {'; '.join(problems)}") from error


def _problem(cls: type[Options], error: dict[str, Any]) -> str:
    """One validation error in words."""
    # pydantic names the branch of a union, such as tuple[DataConfig, ...]; users do not know it.
    path = [part for part in error["loc"] if not isinstance(part, str) or "[" not in part]
    *tables, key = path or ["options"]
    name = ".".join(map(str, path))
    if error["type"] == "extra_forbidden":
        model: Any = cls
        for table in tables:
            if isinstance(table, str):
                model = _table(model.model_fields[table].annotation) or model
        near = difflib.get_close_matches(str(key), model.model_fields, n=1)
        return f"unknown key {name!r}." + (f" Did you mean {near[0]!r}?" if near else "")
    if error["type"] == "missing":
        return f"missing key {name!r}"
    message = error["msg"].removeprefix("Value error, ")
    # Of options that contradict each other: the message names them, and the input is all options.
    return f"{name}: {message} (got {error['input']!r})" if name else message


def _flags(model: type[Options], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every field with its dotted name; tables are opened."""
    for name, field in model.model_fields.items():
        table = _table(field.annotation)
        if table and typing.get_origin(field.annotation) is not tuple:
            yield from _flags(table, f"{prefix}{name}.")
        else:
            yield prefix + name, field


def _add(parser: argparse.ArgumentParser, name: str, field: FieldInfo, positional: bool) -> None:
    kind = _plain(field.annotation)
    text = " ".join((field.description or "").split()).replace("%", "%%")
    default = field.get_default(call_default_factory=True)
    if not field.is_required() and default not in (None, "", (), {}):
        text += f" [{default}]".replace("%", "%%")
    named: dict[str, Any] = {"help": text}
    if not positional:
        named |= {"dest": name, "metavar": name.rpartition(".")[2].upper()}
    flag = name if positional else "--" + name.replace("_", "-")
    if kind is bool:
        action = argparse.BooleanOptionalAction
        parser.add_argument(flag, action=action, dest=name, help=text)
        return
    several = typing.get_origin(kind) is tuple
    one = typing.get_args(kind)[0] if several else kind
    # Texts as they are: a folder called 2024 must not become a number.
    is_text = one in (str, Path) or typing.get_origin(one) is typing.Literal
    optional = "?" if positional else None
    parser.add_argument(
        flag, nargs="*" if several else optional, type=str if is_text else _read_value, **named
    )


def _plain(annotation: Any) -> Any:
    """An annotation without ``| None``."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        kept = [a for a in typing.get_args(annotation) if a is not type(None)]
        return kept[0]
    return annotation


def _table(annotation: Any) -> type[Options] | None:
    """The model that an annotation holds, alone or in a tuple."""
    plain = _plain(annotation)
    if typing.get_origin(plain) is tuple:
        plain = typing.get_args(plain)[0]
    return plain if isinstance(plain, type) and issubclass(plain, Options) else None


def _read_value(text: str) -> Any:
    """A word of the command line as TOML, or as text where it is none."""
    try:
        # One syntax for file and command line: 1e-3, [1, 2], {a = 1}.
        return tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        return text
