"""The options of the recipes that train rerankers."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from mmrag_recipes.config import RunConfig
from mmrag_recipes.options import Options


class PromptConfig(Options):
    """The question that a chat model is asked about a pair."""

    template: str
    """The user's turn, with {query} and after it {document}."""
    answers: tuple[str, str] = ("True", "False")
    """The word for yes and the word for no, one token each."""
    system: str | None = None
    """The system turn; by default that of the model's template."""


class TrainRerankerConfig(RunConfig):
    """Fine-tune a reranker that answers with one of two words: pointwise or listwise, with LoRA."""

    model: str
    """Checkpoint to start from: Qwen3-VL-Reranker, or a chat model of the Qwen-VL families."""
    kind: str | None = None
    """Kind of reranker where it cannot be told from the checkpoint."""
    prompt: PromptConfig | None = None
    """Question to a chat model; by default the one that fits the query."""
    loss: Literal["listwise", "pointwise"] = "listwise"
    """listwise: softmax over a row's candidates; pointwise: each pair is right or wrong alone."""
    temperature: float = Field(1.0, gt=0)
    """Of the softmax over a row's candidates."""
    hard_negatives: int = Field(7, ge=1)
    """Mined negatives per row and step, judged beside its positive; they rotate over the passes."""
    batch_size: int = Field(8, ge=1)
    """Queries per step over all processes, each with its candidates."""


class ExportRerankerConfig(Options):
    """Turn a finished run of train_reranker into a checkpoint, and prove its scores."""

    positional: ClassVar[tuple[str, ...]] = ("run",)

    run: Path
    """Folder of a finished run."""
    out: Path
    """Checkpoint folder to write."""
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """Type of the weights."""


class EvaluateRerankerConfig(Options):
    """How well a reranker orders the positives and negatives of rows."""

    positional: ClassVar[tuple[str, ...]] = ("rows",)

    rows: Path
    """Mined rows to judge: held out of training."""
    model: str
    """Reranker to evaluate."""
    kind: str | None = None
    """Kind of reranker where it cannot be told from the checkpoint."""
    as_json: bool = False
    """Print JSON instead of a table."""
