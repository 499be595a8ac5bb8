"""Questions for ``mmrag-nano`` without PyTorch, which takes seconds to import.

One question goes through the sentence encoder in milliseconds, so that a command which asks once
would wait for the import alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mmrag.content import ContentLike, Modality
from mmrag.embedders.base import Embedder, as_items, check_dim, truncate_normalise
from mmrag.errors import ModelError
from mmrag.modeling.image_rule import ImageRule

if TYPE_CHECKING:
    from mmrag.embedders.registry import Traits

Array = NDArray[np.float32]

MOST_TOKENS = 1024  # of a call; above it the import pays: NumPy reads texts one by one


class BertTexts:
    """BERT (arXiv 1810.04805) in NumPy, and the mean of its tokens; float32.

    Args:
        folder: a checkpoint of the family ``nano``, its weights in float16 or float32.
    """

    def __init__(self, folder: Path) -> None:
        from safetensors import safe_open
        from tokenizers import Tokenizer

        from mmrag.modeling.checkpoints import read_json

        config = read_json(folder / "config.json")
        self.n_layers = int(config["num_hidden_layers"])
        self.n_heads = int(config["num_attention_heads"])
        self.eps = float(config["layer_norm_eps"])
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        with safe_open(folder / "model.safetensors", framework="numpy") as file:
            names = [name for name in file.keys() if name.startswith(("embeddings", "encoder"))]  # noqa: SIM118
            self.weights = {name: file.get_tensor(name) for name in names}
        # Of the words only the rows that a text needs are converted.
        self.words = self.weights.pop("embeddings.word_embeddings.weight")
        self.weights = {name: array.astype(np.float32) for name, array in self.weights.items()}

    def ids(self, text: str) -> list[int]:
        """Token ids with those of the beginning and the end, not cut."""
        return list(self.tokenizer.encode(text).ids)

    def vector(self, ids: Sequence[int]) -> Array:
        """The mean of the tokens' vectors, (dim,), not normalised."""
        hidden = self.words[ids].astype(np.float32)
        hidden += self.weights["embeddings.position_embeddings.weight"][: len(ids)]
        hidden += self.weights["embeddings.token_type_embeddings.weight"][0]
        hidden = self._norm(hidden, "embeddings")
        for layer in range(self.n_layers):
            hidden = self._layer(hidden, f"encoder.layer.{layer}")
        return np.asarray(hidden.mean(axis=0), np.float32)

    def _layer(self, hidden: Array, name: str) -> Array:
        heads = (len(hidden), self.n_heads, -1)
        query, key, value = (
            self._linear(hidden, f"{name}.attention.self.{part}").reshape(heads).swapaxes(0, 1)
            for part in ("query", "key", "value")
        )
        scores = query @ key.swapaxes(1, 2) / np.float32(np.sqrt(query.shape[-1]))
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        context = (weights @ value).swapaxes(0, 1).reshape(hidden.shape)
        added = self._linear(context, f"{name}.attention.output.dense")
        hidden = self._norm(hidden + added, f"{name}.attention.output")
        inner = gelu(self._linear(hidden, f"{name}.intermediate.dense"))
        return self._norm(hidden + self._linear(inner, f"{name}.output.dense"), f"{name}.output")

    def _linear(self, hidden: Array, name: str) -> Array:
        added = hidden @ self.weights[f"{name}.weight"].T
        return np.asarray(added + self.weights[f"{name}.bias"], np.float32)

    def _norm(self, hidden: Array, name: str) -> Array:
        centred = hidden - hidden.mean(axis=-1, keepdims=True)
        scale = np.sqrt((centred**2).mean(axis=-1, keepdims=True) + np.float32(self.eps))
        weight, bias = (self.weights[f"{name}.LayerNorm.{part}"] for part in ("weight", "bias"))
        return np.asarray(centred / scale * weight + bias, np.float32)


def gelu(x: Array) -> Array:
    """GELU (arXiv 1606.08415) by erf, which NumPy lacks.

    Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26: off by 1.5e-7 at most.
    """
    z = np.abs(x) * np.float32(np.sqrt(0.5))
    t = 1 / (1 + np.float32(0.3275911) * z)
    series = np.zeros_like(t)
    for factor in (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592):
        series = (series + np.float32(factor)) * t
    erf = np.sign(x) * (1 - series * np.exp(-z * z))
    return np.asarray(0.5 * x * (1 + erf), np.float32)


class QuestionEmbedder:
    """An Embedder that reads a few short texts in NumPy, and loads the model for all else.

    Vectors of the two differ by less than 0.0001 in cosine. Made by ``open_question_embedder``.

    >>> from mmrag import load_embedder
    >>> nano = load_embedder("mmrag-nano", device="cpu")
    >>> quick = open_question_embedder("mmrag-nano", nano.fingerprint, lambda: nano)
    >>> float(quick.encode(["wind"])[0] @ nano.encode(["wind"])[0]) > 0.999
    True
    """

    family = "nano"

    def __init__(
        self,
        folder: Path,
        marker: dict[str, Any],
        traits: Traits,
        name: str,
        fingerprint: str,
        load: Callable[[], Embedder],
    ) -> None:
        self.name = name
        self.fingerprint = fingerprint
        self.modalities: frozenset[Modality] = frozenset(marker["modalities"])
        self.prefers_text = traits["prefers_text"]
        self.prefers_passages = traits["prefers_passages"]
        self.matryoshka_dims = traits["matryoshka_dims"]
        self.calibration = traits["calibration"]
        self._max_length = int(marker["max_length"])
        self._texts = BertTexts(folder)
        self.dim = int(self._texts.words.shape[1])
        self._load = load
        self._loaded: Embedder | None = None
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        # As in LocalEmbedder: a lock cannot be pickled.
        return {key: value for key, value in self.__dict__.items() if key != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    @property
    def whole(self) -> Embedder:
        """The model itself, loaded when it is first needed."""
        with self._lock:
            if self._loaded is None:
                self._loaded = self._load()
            return self._loaded

    def encode(
        self,
        contents: Sequence[ContentLike],
        instruction: str | None = None,
        dim: int | None = None,
        progress: bool = False,
    ) -> Array:
        """Embed contents of any mix of modalities; see ``Embedder.encode``."""
        kept = check_dim(dim, self.dim, self.matryoshka_dims)
        items = as_items(self, contents, instruction)
        texts = [item.text for item in items if item.text is not None and not item.images]
        # A token has a letter at least: what is longer need not be cut into tokens to be refused.
        if self._loaded is None and len(texts) == len(items) and sum(map(len, texts)) < 16_384:
            ids = [self._texts.ids(text) for text in texts]
            lengths = [len(each) for each in ids]
            if max(lengths, default=0) <= self._max_length and sum(lengths) <= MOST_TOKENS:
                rows = [self._texts.vector(each) for each in ids]
                return truncate_normalise(np.array(rows).reshape(-1, self.dim), kept)
        return self.whole.encode(items, instruction, dim, progress)


def open_question_embedder(
    name: str | Path, fingerprint: str, load: Callable[[], Embedder]
) -> Embedder | None:
    """The embedder of that fingerprint for questions, where it is of the family ``nano``.

    Args:
        name: of the checkpoint, on this machine.
        fingerprint: of the model as a collection was built with it, in float32.
        load: loads the model itself.

    Returns:
        None for another family, other weights or another precision: only ``load`` will do.
    """
    from mmrag.embedders.known import find_known
    from mmrag.embedders.registry import find_folders, read_marker, traits_of
    from mmrag.modeling.checkpoints import fingerprint as fingerprint_of
    from mmrag.modeling.image_rule import read_image_rule

    try:
        folders = find_folders(name, download=False)
    except ModelError:  # ``load`` says what is missing
        return None
    marker = read_marker(folders)
    if marker.get("family") != QuestionEmbedder.family or len(folders) > 1:
        return None
    # Without these the loader's defaults hold, which are not known here.
    if not {"modalities", "max_length", "min_image_tokens", "max_image_tokens"} <= set(marker):
        return None
    bounds = marker["min_image_tokens"], marker["max_image_tokens"]
    rule = read_image_rule(folders[0]).with_tokens(*bounds)
    moves = {
        "dtype": "torch.float32",
        "quantize": None,
        **nano_settings(marker["max_length"], rule),
    }
    if fingerprint_of(folders, moves) != fingerprint:
        return None
    traits = traits_of(folders, marker, find_known(str(name)))
    return QuestionEmbedder(folders[0], marker, traits, str(name), fingerprint, load)


def nano_settings(max_length: int, rule: ImageRule) -> dict[str, Any]:
    """The limits of the family ``nano``, which move vectors of long texts and large images."""
    return {
        "family": QuestionEmbedder.family,
        "max_length": max_length,
        "pixels": [rule.min_pixels, rule.max_pixels],
    }
