"""Fine-tune a reranker that answers with one of two words: pointwise or listwise, with LoRA.

    python -m mmrag_recipes train_reranker --config reranker
    python -m mmrag_recipes evaluate_reranker data/mine/dev-mined.jsonl --model my-reranker

Rows are those of ``mine``, each judged with its positive and its negatives. Prompts, images and
scores are those of inference; loop, checkpoints and guards are those of ``train``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor

from mmrag.content import Content
from mmrag.embedders.registry import find_folders
from mmrag.errors import ConfigError, ContentError
from mmrag.rerankers import RerankPrompt, load_scorer
from mmrag.rerankers.local import LocalScorer
from mmrag.rerankers.qwen import QwenAsker
from mmrag_recipes.batches import Batch
from mmrag_recipes.config_reranker import TrainRerankerConfig
from mmrag_recipes.data import Dataset, load_datasets
from mmrag_recipes.evaluate_reranker import evaluate_scorer
from mmrag_recipes.loop import fit
from mmrag_recipes.pair_steps import (
    PairFeeder,
    PairInput,
    PairPlanner,
    PairStep,
    encode_pairs,
    pair_loss,
    pair_of,
)
from mmrag_recipes.reports import dry_run
from mmrag_recipes.row_file import open_rows
from mmrag_recipes.rows import read_rows, store_of
from mmrag_recipes.run_log import Report
from mmrag_recipes.sharding import FILLERS
from mmrag_recipes.trainable import evaluating, quantization_of


def run(config: TrainRerankerConfig) -> None:
    """Command: train a reranker, or show what would be trained on."""
    if not config.dry_run:
        print(f"trained weights: {train_reranker(config)}")
        return
    config = with_negatives(config)
    task = RerankerTask(config, load_asker(config))
    datasets = load_datasets(config, task.planner)

    def prepare(content: Content, instruction: str | None) -> PairInput:
        # Each side alone, as the costs are counted.
        return pair_of(task.asker, content, None, instruction)

    print(dry_run(config, task.model, datasets, prepare, pairs=True))


def train_reranker(config: TrainRerankerConfig, hooks: Sequence[Report] = ()) -> Path:
    """Train a reranker, or resume; see ``mmrag_recipes.loop.fit`` for errors and ``hooks``.

    Returns:
        The folder with the final weights.

    Raises:
        ContentError: For rows of which none has a negative.
    """
    config = with_negatives(config)
    return fit(config, hooks, lambda: RerankerTask(config, load_asker(config)))


def with_negatives(config: TrainRerankerConfig) -> TrainRerankerConfig:
    """The options with rows that are judged alone. Raises ContentError without any negative."""
    # Nothing is known of two rows in one step.
    data = tuple(one.replace(in_batch_negatives=False) for one in config.data)
    for one in data:
        if not len(open_rows(one.rows).keys.negatives.values):
            raise ContentError(f"{one.rows}: no row has a negative to tell from; run mine first.")
    return config.replace(data=data)


def load_asker(config: TrainRerankerConfig) -> QwenAsker:
    """Load the starting model; weights that train are float32, adapters sit on any type.

    Raises:
        ConfigError: For a model that is no Qwen-VL model with a head, and for an adapter.
    """
    if len(find_folders(config.model)) > 1:
        raise ConfigError(f"{config.model} is an adapter: merge it into its base first.")
    scorer = load_scorer(
        config.model,
        kind=config.kind,
        prompt=prompt_of(config),
        # Shards go to the devices one by one, none of which may hold all weights.
        device="cpu" if config.shard else config.device,
        # Updates of full fine-tuning are smaller than bfloat16 can add.
        dtype=config.dtype if config.lora else "float32",
        quantize=quantization_of(config),
        **config.limits,
    )
    asker = scorer.asker if isinstance(scorer, LocalScorer) else None
    if not isinstance(asker, QwenAsker):
        raise ConfigError(
            f"{config.model}: train_reranker takes Qwen3-VL-Reranker and chat models of Qwen2-VL, "
            "Qwen2.5-VL and Qwen3-VL."
        )
    return asker


def prompt_of(config: TrainRerankerConfig) -> RerankPrompt | None:
    """The prompt of the options. Raises ConfigError for one that lacks a place."""
    return RerankPrompt(**dict(config.prompt)) if config.prompt else None


class RerankerTask:
    """A ``Task``: a reranker, judging rows' positives beside their negatives."""

    def __init__(self, config: TrainRerankerConfig, asker: QwenAsker) -> None:
        self.config = config
        self.asker = asker
        self.model: Any = asker.model
        settings = config.model_dump(include={"kind", "limits", "prompt"})
        self.planner = PairPlanner(asker, settings)
        self.refresh = None  # the candidates are those of the rows

    def steps(
        self, datasets: Sequence[Dataset], batches: Iterable[Batch]
    ) -> Iterator[tuple[Batch, PairStep]]:
        """See ``Task.steps``."""
        return PairFeeder(datasets, self.asker, self.config.hard_negatives).steps(batches)

    def encode(self, inputs: Sequence[Any]) -> Tensor:
        """Logits of pairs, (len(inputs), 1)."""
        return encode_pairs(self.asker, inputs)

    def loss(self, outputs: Tensor, step: PairStep) -> Tensor:
        """See ``mmrag_recipes.pair_steps.pair_loss``."""
        return pair_loss(outputs, step.counts, self.config.loss, self.config.temperature)

    def filler(self, pictured: bool) -> Any:
        """See ``Task.filler``."""
        return pair_of(self.asker, FILLERS[False], FILLERS[pictured], None)

    def alone(self) -> AbstractContextManager[None]:
        """See ``Task.alone``."""
        return nullcontext()

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Metrics of each row's candidates in the order of the scores."""
        scorer = LocalScorer(self.asker, name=self.config.model)
        path = self.config.evaluate
        with evaluating(self.model):
            return evaluate_scorer(scorer, read_rows(path), store_of(path))
