"""Recipe configurations: TOML files read into frozen dataclasses, every key accounted for."""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from mmrag.errors import ConfigError

T = TypeVar("T")


@dataclass(frozen=True)
class DataConfig:
    """One data set of a training mix."""

    rows: str
    """JSON lines as in ``mmrag_recipes.rows``; the images are in ``images`` beside it."""
    name: str = ""
    """Name in logs; by default the file's."""
    weight: float = 1.0
    """How often its batches come up, relative to the other data sets' rows."""
    in_batch_negatives: bool = True
    """Whether documents of other rows serve as negatives. Off for classification."""


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters instead of full fine-tuning."""

    r: int = 8
    """Rank; GME found 8 best (arXiv 2412.16855, section 5)."""
    alpha: int = 16
    """Scale of the update is alpha / r."""
    dropout: float = 0.0
    """Dropout before the adapters."""
    targets: str = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
    """Regular expression of the modules that get an adapter."""
    dora: bool = False
    """Learn magnitudes too (arXiv 2402.09353): slower, sometimes better."""


@dataclass(frozen=True)
class TrainConfig:
    """Everything that one training run depends on."""

    model: str
    """Checkpoint to start from: a folder, ``mmrag-nano``, or a name on the hub."""
    out: str
    """Folder of the run: configuration, logs, checkpoints, plot, and the final weights."""
    data: tuple[DataConfig, ...]
    """The mix; each batch comes from one data set."""
    family: str | None = None
    """Recipe of the model where it cannot be told from the checkpoint."""
    limits: dict[str, Any] = field(default_factory=dict)
    """Limits of the family, such as max_length and max_image_tokens."""
    steps: int = 1000
    """Optimizer steps in all."""
    batch_size: int = 64
    """Queries per step over all processes."""
    chunk: int = 0
    """GradCache: inputs run at a time with a graph; 0 runs the batch at once."""
    hard_negatives: int = 0
    """Mined negatives taken per row and step; they rotate over the passes."""
    temperature: float = 0.03
    """Of the softmax over cosines."""
    false_negative_margin: float = 0.1
    """In-batch documents that beat the positive by more than this are left out; 2 keeps all."""
    matryoshka_dims: tuple[int, ...] = ()
    """Also train these prefixes of the vectors; the full width is always trained."""
    distil_weight: float = 0.0
    """Share of the loss that follows the teacher's scores in the rows."""
    distil_temperature: float = 1.0
    """Of the softmax over the teacher's scores."""
    lora: LoraConfig | None = None
    """Adapters; without this table all weights train."""
    freeze: tuple[str, ...] = ()
    """Prefixes of weights that stay as they are, such as ``visual``."""
    lr: float = 1e-4
    """Peak learning rate of AdamW."""
    warmup: float = 0.06
    """Share of the steps over which the rate rises; then it falls linearly to zero."""
    weight_decay: float = 0.0
    """Of AdamW."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    seed: int = 0
    """Of batches, adapters and dropout."""
    device: str = "auto"
    """Where to train."""
    dtype: str = "auto"
    """Type of the weights under the adapters; full fine-tuning keeps float32 weights."""
    gradient_checkpointing: bool = False
    """Trade time for memory: activations are computed again."""
    evaluate: str = ""
    """Rows to evaluate on during training, metrics per modality pair; empty for none."""
    evaluate_every: int = 200
    """Steps between evaluations."""
    save_every: int = 200
    """Steps between checkpoints that a run can resume from."""
    log_every: int = 10
    """Steps between lines of the log."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "evaluate_every", "save_every", "log_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: at least 1 is needed.")
        for name in ("chunk", "hard_negatives"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)}: it cannot be below 0.")
        for name in ("temperature", "distil_temperature"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name}={getattr(self, name)}: it must be above 0.")


def load_config(cls: type[T], path: str | Path | None, overrides: Sequence[str] = ()) -> T:
    """Read a TOML file, if any, into a dataclass; ``overrides`` are ``key=value``, the last word.

    Raises: ConfigError for a key that the dataclass does not have (with the nearest one), a
        missing key, or a value of the wrong type.
    """
    values: dict[str, Any] = {}
    if path is not None:
        try:
            values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, tomllib.TOMLDecodeError) as error:
            raise ConfigError(f"{path}: the configuration cannot be read ({error}).") from error
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(f"{override!r}: an override looks like key=value.")
        _set(values, key.split("."), text)
    return build(cls, values, str(path or "command line"))


def _set(values: dict[str, Any], keys: list[str], text: str) -> None:
    """Set a value by its dotted key; the text is read as TOML, or taken as a string."""
    *tables, last = keys
    for table in tables:
        inner = values.setdefault(table, {})
        if not isinstance(inner, dict):
            whole = ".".join(keys)
            raise ConfigError(f"{whole}: {table!r} is no table; change it in the file.")
        values = inner
    try:
        values[last] = tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        values[last] = text


def build(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """Make a dataclass from plain values, checking every key and type."""
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"{where}: unknown key {key!r}.{hint}")
    missing = [name for name, f in fields.items() if name not in values and _required(f)]
    if missing:
        raise ConfigError(f"{where}: missing key {', '.join(map(repr, missing))}.")
    made = {key: _convert(hints[key], value, f"{where}: {key}") for key, value in values.items()}
    return cls(**made)


def _required(f: dataclasses.Field[Any]) -> bool:
    return f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        inner = [a for a in arguments if a is not type(None)]
        return None if value is None else _convert(inner[0], value, where)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}: a table is expected, got {value!r}.")
        return build(hint, value, where)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{where}: a list is expected, got {value!r}.")
        return tuple(_convert(arguments[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if origin is dict:
        hint = dict
    truth = isinstance(value, bool) and hint in (int, float)  # Python takes True for 1
    if hint is float and isinstance(value, int) and not truth:
        return float(value)
    if hint is not Any and (truth or not isinstance(value, hint)):
        raise ConfigError(f"{where}: {hint.__name__} is expected, got {value!r}.")
    return value
