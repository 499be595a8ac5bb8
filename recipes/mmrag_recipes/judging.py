"""Which evaluation of a run is the best: by what it is judged, and what has to be there for it."""

from __future__ import annotations

import hashlib
import logging
import math
from pathlib import Path

from mmrag.errors import ConfigError, ContentError
from mmrag.evaluation.metrics import metrics_of
from mmrag_recipes.checkpoints import Progress
from mmrag_recipes.config import RunConfig
from mmrag_recipes.rows import check_rows, store_of

logger = logging.getLogger("mmrag_recipes")


def check_evaluation(config: RunConfig) -> None:
    """Raise what would otherwise end the run at its first evaluation."""
    rows, problems = check_rows(config.evaluate, store_of(config.evaluate))
    if problems or not rows:
        raise ContentError("\n".join(problems) or f"{config.evaluate}: there are no rows.")
    pairs = ["all", *sorted({row.pair for row in rows})]
    metric_of(dict.fromkeys(pairs, metrics_of([0], {0: 1.0})), config.best_metric)


def judge_by(progress: Progress, config: RunConfig) -> None:
    """Forget the best evaluation of a resumed run if it measured something else."""
    digest = hashlib.sha256(Path(config.evaluate).read_bytes()).hexdigest()
    now = f"{config.best_metric} on {digest}"
    if progress.judged not in ("", now):  # runs of earlier versions do not say
        logger.info("evaluated by %s from here on; earlier evaluations do not count", now)
        progress.best, progress.evaluations_since = math.nan, 0
    progress.judged = now


def metric_of(results: dict[str, dict[str, float]], name: str) -> float:
    """The value of a metric such as ``all/ndcg@10``. Raises ConfigError for an unknown one."""
    pair, _, metric = name.rpartition("/")
    try:
        return results[pair][metric]
    except KeyError as error:
        names = ", ".join(f"{p}/{m}" for p, found in results.items() for m in found)
        raise ConfigError(f"best_metric={name!r} is unknown; there are {names}.") from error
