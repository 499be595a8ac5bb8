"""What a person looks at: the dry run before a training, and the plot after it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmrag.content import Content, image_size
from mmrag.instructions import resolve
from mmrag.modeling.batching import Sized
from mmrag_recipes.config import RunConfig
from mmrag_recipes.data import Dataset
from mmrag_recipes.memory import memory_of, sizes_of
from mmrag_recipes.run_log import read_log

logger = logging.getLogger("mmrag_recipes")

Prepare = Callable[[Content, str | None], Sized]
"""Makes the inputs of one item with the instruction of its query."""

_BAR = 40
_GIB = 2**30
_SAMPLE = 1000  # rows that are read to see which modality pairs there are


def dry_run(
    config: RunConfig,
    model: Any,
    datasets: Sequence[Dataset],
    prepare: Prepare,
    pairs: bool = False,
) -> str:
    """Describe a training without running it: examples, token histogram, memory estimate.

    Args:
        model: what trains, as it was loaded.
        prepare: makes the inputs of one item, as a step does.
        pairs: whether an input is a query with a document, as of rerankers.
    """
    parts = [_describe(dataset, prepare) for dataset in datasets]
    costs = [cost for dataset in datasets for cost in dataset.costs.tolist() if cost >= 0]
    parts.append("tokens per row (query and documents)\n" + histogram(costs))
    parts.append(memory_estimate(config, model, costs, pairs))
    return "\n\n".join(parts)


def _describe(dataset: Dataset, prepare: Prepare) -> str:
    first = int((dataset.costs >= 0).argmax())
    row = dataset.rows[first]
    negatives = np.diff(dataset.rows.keys.negatives.ends, prepend=0)
    pairs = sorted({r.pair for r in dataset.rows[:_SAMPLE]})
    lines = [
        f"data set {dataset.name}: {len(dataset.rows)} rows, {len(dataset.problems)} left out, "
        f"{', '.join(pairs)}, {negatives.min()} to {negatives.max()} negatives per row",
        f"  row {row.id}:",
        f"    instruction: {resolve(row.instruction)}",
    ]
    sides = [("query", row.query, row.instruction), ("positive", row.positives[0], None)]
    sides += [("negative", item, None) for item in row.negatives[:1]]
    for side, item, instruction in sides:
        # Really prepared, so that a broken image or prompt shows before a training is paid for.
        inputs = prepare(dataset.store.content(item), resolve(instruction))
        shown = repr(
            item.text if item.text is None or len(item.text) < 90 else item.text[:87] + "..."
        )
        size = ""
        for name in item.images:
            width, height = image_size(dataset.store.path(name))
            size += f", image {width}x{height}"
        if item.clip:
            width, height = image_size(dataset.store.path(item.clip.frames[0]))
            size += f", clip of {len(item.clip.frames)} frames of {width}x{height}"
        lines.append(f"    {side}: {shown}{size}, {inputs.n_tokens} tokens")
    return "\n".join(lines)


def histogram(values: Sequence[int], bins: int = 8) -> str:
    """Text histogram of positive integers in equal bins."""
    low, high = min(values), max(values)
    width = max(1, -(-(high - low + 1) // bins))
    counts = [0] * bins
    for value in values:
        counts[(value - low) // width] += 1
    top = max(counts)
    lines = []
    for index, count in enumerate(counts):
        start = low + index * width
        if start > high:
            break
        bar = "#" * round(_BAR * count / top)
        lines.append(f"  {start:>6} to {start + width - 1:<6} {count:>7}  {bar}")
    return "\n".join(lines)


def memory_estimate(
    config: RunConfig, model: Any, costs: Sequence[int], pairs: bool = False
) -> str:
    """Memory on each card by ``mmrag_recipes.memory``, for rows of these costs in tokens."""
    # A batch is padded to its longest row: nine tenths of them fit this.
    per_row = sorted(costs)[int(0.9 * (len(costs) - 1))]
    sides = 2 + config.hard_negatives
    inputs = config.batch_size * (sides - 1 if pairs else sides)
    at_once = min(config.chunk or inputs, inputs)
    tokens = at_once * (2 if pairs else 1) * per_row / sides
    sizes = sizes_of(model, config)
    # Quantised weights are bytes; what else there is, such as norms, has the type of the weights.
    width = next(p.element_size() for p in model.parameters() if p.is_floating_point())
    lines = ["memory estimate (order of magnitude)"]
    for cards in (2, 4, 8) if config.shard else (1,):
        # GradCache bounds what is in memory on each card; without it, cards share the batch.
        own = tokens if config.chunk else tokens / cards
        parts = memory_of(sizes, config, own, width, cards)
        shown = ", ".join(f"{name} {size / _GIB:.2f} GiB" for name, size in parts.items())
        where = f"each of {cards} cards: " if config.shard else ""
        lines.append(f"  {where}{shown}: {sum(parts.values()) / _GIB:.2f} GiB")
    return "\n".join(lines)


def plot_run(out: Path) -> Path | None:
    """Draw loss and metrics of ``log.jsonl`` as ``training.png``; None without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        logger.warning("No plot was drawn: pip install 'mmrag[train]' brings matplotlib.")
        return None
    # Servers have no display.
    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = read_log(out / "log.jsonl")
    steps = [r for r in records if "loss" in r]
    evaluations = [r for r in records if "metrics" in r]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4))
    losses = [r["loss"] for r in steps]
    left.plot([r["step"] + 1 for r in steps], losses, color="0.75", linewidth=0.8, label="step")
    # Batches differ in difficulty, so that the loss of single steps hides the trend.
    recent = [losses[max(0, i - 19) : i + 1] for i in range(len(losses))]
    means = [sum(values) / len(values) for values in recent]
    left.plot([r["step"] + 1 for r in steps], means, label="mean of 20 steps")
    left.set(xlabel="step", ylabel="loss", title="Training loss")
    left.legend()
    names = [n for n in (evaluations[0]["metrics"] if evaluations else {}) if n.endswith("ndcg@10")]
    for name in names:
        values = [r["metrics"][name] for r in evaluations]
        right.plot([r["step"] + 1 for r in evaluations], values, marker="o", label=name)
    right.set(xlabel="step", ylabel="nDCG@10", ylim=(0, 1), title="Evaluation")
    if names:
        right.legend()
    figure.tight_layout()
    path = out / "training.png"
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path
