"""Every recipe as a command.

python -m mmrag_recipes                      list the recipes
python -m mmrag_recipes train --help         options of one
python -m mmrag_recipes train --config adapt --lr 1e-3
torchrun --nproc_per_node 8 -m mmrag_recipes train --config gme-lora
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Sequence

from mmrag_recipes import config, config_generator, config_models, config_reranker
from mmrag_recipes.console import ends_cleanly
from mmrag_recipes.options import Options, read_arguments

# A recipe's module has one function run(options). It is imported once its options are read, so
# that --help and a mistyped option need no torch.
RECIPES: dict[str, type[Options]] = {
    "synthesize": config.SynthesizeConfig,
    "draft_questions": config.DraftQuestionsConfig,
    "convert": config.ConvertConfig,
    "mine": config.MineConfig,
    "train": config.TrainConfig,
    "export": config.ExportConfig,
    "train_reranker": config_reranker.TrainRerankerConfig,
    "export_reranker": config_reranker.ExportRerankerConfig,
    "evaluate_reranker": config_reranker.EvaluateRerankerConfig,
    "generator_rows": config_generator.GeneratorRowsConfig,
    "merge": config_models.MergeConfig,
    "project": config_models.ProjectConfig,
    "route": config_models.RouteConfig,
    "evaluate": config.EvaluateConfig,
    "evaluate_pages": config.EvaluatePagesConfig,
    "evaluate_answers": config.EvaluateAnswersConfig,
    "calibrate": config.CalibrateConfig,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the recipe that the first word names."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] not in RECIPES:
        listing = [f"  {name:<19}{cls.__doc__}" for name, cls in RECIPES.items()]
        print("\n".join(["usage: python -m mmrag_recipes RECIPE [options]", "", *listing]))
        raise SystemExit(0 if words in ([], ["--help"]) else f"error: no recipe {words[0]!r}")
    name = words[0]
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    # httpx logs every request at INFO: thousands of lines when queries are written.
    logging.getLogger("httpx").setLevel(logging.WARNING)
    with ends_cleanly():
        options = read_arguments(RECIPES[name], words[1:], f"mmrag_recipes {name}")
        importlib.import_module(f"mmrag_recipes.{name}").run(options)


if __name__ == "__main__":
    main()
