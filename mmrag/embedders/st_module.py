"""Any Backbone as a module of sentence-transformers, with the same vectors.

An exported checkpoint names this class in its ``modules.json``, so that
``SentenceTransformer(folder, trust_remote_code=True)`` loads it where mmrag is installed; the
flag is what sentence-transformers asks for every class that is not its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from sentence_transformers.base.modality import infer_modality
from sentence_transformers.base.modules import InputModule
from torch import Tensor

from mmrag.content import Content, as_content
from mmrag.embedders import load_backbone
from mmrag.embedders.registry import find_folders, read_marker
from mmrag.embedders.sentence_transformers import MODALITIES
from mmrag.instructions import resolve
from mmrag.modeling.backbone import inputs_of


class UniversalModule(InputModule):  # type: ignore[misc]
    """Prompt, images, model and pooling of a family in one module.

    Texts, images and ``{"text": ..., "image": ...}`` are taken, one kind in a call of ``encode``. A
    prompt is the instruction: a sentence, or a name in ``mmrag.instructions``. A ``str`` that names
    an image file is an image, as everywhere in sentence-transformers.

    Args:
        folder: ``mmrag-nano``, a checkpoint folder or a name on the hub.

    Raises:
        ModelError: For a checkpoint that is missing or cannot be loaded exactly.

    Examples:
        >>> from sentence_transformers import SentenceTransformer
        >>> from sentence_transformers.sentence_transformer.modules import Normalize
        >>> modules = [UniversalModule("mmrag-nano"), Normalize()]
        >>> model = SentenceTransformer(modules=modules, device="cpu")
        >>> model.encode_document(["The deductible is $500."]).shape
        (1, 384)
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.folders = [path.resolve() for path in find_folders(folder)]
        # sentence-transformers moves and casts its modules itself, after they are made.
        self.backbone = load_backbone(folder, device="cpu", dtype="float32")
        self.auto_model = self.backbone.model  # a child, so that ``to`` moves it

    @property
    def modalities(self) -> list[Any]:
        """What it can embed, in sentence-transformers' words."""
        return [MODALITIES[one] for one in sorted(self.backbone.modalities) if one in MODALITIES]

    def preprocess(
        self, inputs: Sequence[Any], prompt: str | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Prepare inputs; they stay on the CPU until ``forward``.

        Returns:
            ``prepared``, a list of the inputs, and ``input_ids``, the places in it of those to
            embed, an int64 tensor of shape (inputs,).

        Raises:
            ContentError: For an input that cannot be used.
            ConfigError: For the name of a task that does not exist.
        """
        instruction = resolve(prompt or None)
        # sentence-transformers counts a str that names an image file or address as an image.
        contents = [
            Content(image=value)
            if isinstance(value, str) and infer_modality(value, self.modalities) == "image"
            else as_content(value)
            for value in inputs
        ]
        items = [inputs_of(self.backbone, content, instruction) for content in contents]
        # The trainer knows a column of inputs by this name, and GradCache cuts tensors alone.
        return {"input_ids": torch.arange(len(items)), "prepared": items}

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Add ``sentence_embedding``, (batch, dim), not normalised."""
        chosen = [features["prepared"][index] for index in features["input_ids"].tolist()]
        vectors: Tensor = self.backbone.forward(chosen)
        features["sentence_embedding"] = vectors.float()
        return features

    def get_embedding_dimension(self) -> int:
        """Width of the vectors."""
        return self.backbone.dim

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        """Write the checkpoint in the layout that every loader of mmrag reads.

        Raises:
            ModelError: If the target is the folder that it was loaded from.
        """
        from mmrag.embedders.saving import save_checkpoint

        # Of an adapter, which is merged by now, the base has the tokenizer and configuration.
        marker = read_marker(self.folders)
        save_checkpoint(self.backbone, self.folders[0], Path(output_path), marker=marker)

    @classmethod
    def load(cls, model_name_or_path: str, **kwargs: Any) -> UniversalModule:
        """Load from an exported folder."""
        return cls(model_name_or_path)
