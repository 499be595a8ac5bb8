"""``mmrag tune``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmrag.cli.console import errors, print_json, show
from mmrag.cli.options import (
    DEFAULT_COLLECTION,
    CollectionOption,
    DebugOption,
    EmbedderOption,
    JsonOption,
    open_library,
)
from mmrag.cli.progress import working


def tune(
    questions: Annotated[
        Path,
        typer.Argument(
            metavar="QUESTIONS.jsonl",
            exists=True,
            dir_okay=False,
            help='Lines of {"question": ..., "pages": [{"file": ..., "page": 7}]}.',
        ),
    ],
    collection: CollectionOption = DEFAULT_COLLECTION,
    embedder: EmbedderOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the weights without saving them.")
    ] = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Fit the weights of the rankings to your questions, and keep them with the collection.

    The gain is measured on documents left out of the fit.
    """
    with errors(debug):
        with working() as step:
            step(f"Opening {collection}")
            from mmrag.evaluation.questions import read_questions
            from mmrag.evaluation.tuning import tune as fit

            asked = read_questions(questions)
            with open_library(collection, embedder) as library:
                step("Asking the questions")
                tuning = fit(library.as_retriever(), asked)
                if not dry_run:
                    library.collection.save_weights(tuning.weights)
        if as_json:
            found = vars(tuning) | {"within_noise": tuning.within_noise, "saved": not dry_run}
            print_json(found)
            return
        weights = ", ".join(f"{name} {weight:.2f}" for name, weight in tuning.weights.items())
        show(
            f"{tuning.n_questions} questions about {tuning.n_documents} documents",
            f"nDCG@10 on documents left out of the fit: {tuning.before:.3f} before, "
            f"{tuning.after:.3f} after (gain {tuning.after - tuning.before:+.3f}, 95 % interval "
            f"{tuning.low:+.3f} to {tuning.high:+.3f})",
            f"weights: {weights}" + ("" if dry_run else " (saved with the collection)"),
        )
        # Saved all the same: within noise does not say that the old weights are better.
        if tuning.within_noise:
            show("The gain is within noise: more questions, about more documents, would tell.")
