"""mteb's command, where ``-m`` is a model of mmrag.

python -m mteb_mmrag run -m mmrag-nano -t NFCorpus
python -m mteb_mmrag mock-run -m my-checkpoint
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from mteb.cli.build_cli import build_cli

from mmrag.embedders import load_embedder
from mmrag.errors import MMRagError
from mmrag.evaluation.mteb_encoder import MTEBEncoder
from mteb_mmrag.registry import register


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command of mteb; ``-m`` takes the names and folders that ``load_embedder`` takes."""
    logging.basicConfig(format="%(message)s")
    options = build_cli().parse_args(arguments)
    if getattr(options, "model", None):
        # ``run`` takes the number of a CUDA device, ``mock-run`` a name.
        device = f"cuda:{options.device}" if isinstance(options.device, int) else options.device
        try:
            embedder = load_embedder(
                options.model, device=device or "auto", revision=options.model_revision
            )
        except MMRagError as error:
            raise SystemExit(f"error: {error}") from error
        # mteb's revision is the fingerprint of what was loaded.
        options.model, options.model_revision = register(MTEBEncoder(embedder)).name, None
    options.func(options)


if __name__ == "__main__":
    main()
