"""mmrag's embedders as models of sentence-transformers."""

from __future__ import annotations

from pathlib import Path

from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize

from mmrag.embedders.base import check_dim
from mmrag.embedders.known import find_known
from mmrag.embedders.registry import read_marker, traits_of
from mmrag.embedders.st_module import UniversalModule
from mmrag.instructions import resolve

__all__ = ["UniversalModule", "load"]


def load(
    model: str | Path = "mmrag-nano",
    *,
    instruction: str | None = "page_for_question",
    truncate_dim: int | None = None,
    device: str | None = None,
) -> SentenceTransformer:
    """Load an embedder of mmrag as a ``SentenceTransformer``, with the same vectors in float32.

    Its ``encode_query`` gives queries the instruction, and ``encode_document`` none. Every vector
    has L2 norm 1, but those that sentence-transformers has cut: with ``truncate_dim``, pass
    ``normalize_embeddings=True`` to ``encode`` where they are compared by other than cosine.

    Args:
        model: ``mmrag-nano``, a checkpoint folder or a name on the hub; an adapter is merged.
        instruction: the task of queries: a name in ``mmrag.instructions`` or a sentence. None
            embeds them as documents.
        truncate_dim: leading dimensions to keep (Matryoshka); by default all.
        device: ``cpu``, ``cuda``, ``cuda:1`` or ``mps``; by default the best that there is.

    Raises:
        ModelError: For a checkpoint that is missing or cannot be loaded exactly.
        ConfigError: For the name of a task that does not exist, and for dimensions that the model
            does not have or was not trained for.

    Examples:
        >>> model = load("mmrag-nano", device="cpu")
        >>> questions = model.encode_query(["How deep is the well?"])
        >>> texts = model.encode_document(["The well is nine metres deep.", "Bananas are yellow."])
        >>> model.similarity(questions, texts).argmax().item()
        0
    """
    # For its error: a misspelt task should fail here and not at the first query.
    resolve(instruction)
    module = UniversalModule(model)
    traits = traits_of(module.folders, read_marker(module.folders), find_known(str(model)))
    check_dim(truncate_dim, module.backbone.dim, traits["matryoshka_dims"])
    # To sentence-transformers an empty prompt is none; a blank one marks a query without a task.
    prompts = None if instruction is None else {"query": instruction or " "}
    return SentenceTransformer(
        modules=[module, Normalize()],
        prompts=prompts,
        truncate_dim=truncate_dim,
        device=device,
    )
