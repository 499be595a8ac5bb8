"""Turn a finished run of train_reranker into a checkpoint, and prove its scores.

    python -m mmrag_recipes export_reranker runs/reranker --out my-reranker

Adapters are merged. The folder says which kind of reranker it is, its limits and its prompt, so
that ``MLLMReranker("my-reranker")`` asks as the training did; a fresh process loads it and must
give the scores of the run.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mmrag.embedders.registry import find_folders
from mmrag.embedders.saving import save_model
from mmrag.errors import ModelError
from mmrag.modeling.checkpoints import MARKER
from mmrag.rerankers.local import LocalScorer
from mmrag.rerankers.qwen import QwenAsker
from mmrag.rerankers.registry import kind_of
from mmrag_recipes.config_reranker import ExportRerankerConfig, TrainRerankerConfig
from mmrag_recipes.export import DTYPES, fill_trained, in_fresh_process, probe_contents, read_config
from mmrag_recipes.train_reranker import load_asker

# Of a probability; half precision moves it by less.
MOST_DIFFERENCE = 0.01
_RELOAD = """
import sys, numpy
from mmrag.rerankers import load_scorer
from mmrag_recipes.export_reranker import probe_scores
scorer = load_scorer(sys.argv[1], device="cpu", dtype="float32")
numpy.save(sys.argv[2], probe_scores(scorer))
"""


def load_trained_reranker(run: Path) -> tuple[QwenAsker, TrainRerankerConfig]:
    """Load the model of a finished run, adapters merged; errors as in ``load_trained``."""
    config = read_config(run, TrainRerankerConfig)
    # Merging in half precision would round away what a small adapter learned.
    lora = config.lora and config.lora.replace(quantize=None)
    asker = load_asker(config.replace(device="cpu", dtype="float32", lora=lora))
    fill_trained(run, asker, config)
    return asker, config


def export_reranker(run: Path, out: Path, dtype: str = "float16") -> Path:
    """Write the checkpoint folder of a run and compare its scores in a fresh process.

    Raises:
        ModelError: If a weight has no place, or the reloaded scores differ.
    """
    asker, config = load_trained_reranker(run)
    (folder,) = find_folders(config.model)
    save_model(asker.model, folder, out, DTYPES[dtype])
    kind = config.kind or kind_of(config.model, folder)
    prompt = {"prompt": config.prompt.model_dump()} if config.prompt else {}
    marker = {"family": kind, **config.limits, **prompt}
    (out / MARKER).write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")
    check_scores(out, probe_scores(LocalScorer(asker, name=str(run))))
    return out


def probe_scores(scorer: LocalScorer) -> NDArray[np.float32]:
    """Scores of every probe as a query with every probe as a document."""
    probes = probe_contents(frozenset({"text", "image", "fused"}))
    return scorer.score([(query, document) for query in probes for document in probes])


def check_scores(folder: Path, expected: NDArray[np.float32]) -> None:
    """Load a folder in a new process and compare its scores with those expected.

    Raises:
        ModelError: If it does not load, or a score differs by more than 0.01.
    """
    scores = in_fresh_process(_RELOAD, folder)
    worst = float(np.abs(scores - expected).max())
    if not worst <= MOST_DIFFERENCE:  # NaN is not
        raise ModelError(f"{folder}: reloaded scores differ by {worst:.4f}.")


def run(options: ExportRerankerConfig) -> None:
    """Command: export a run of train_reranker."""
    print(f"exported: {export_reranker(options.run, options.out, options.dtype)}")
