"""Any Backbone as a module of sentence-transformers, with the same vectors.

An exported checkpoint names this class in its ``modules.json``, so that
``SentenceTransformer(folder, trust_remote_code=True)`` loads it where mmrag is installed; the
flag is what sentence-transformers asks for every class that is not its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sentence_transformers.base.modules import InputModule
from torch import Tensor

from mmrag.content import as_content
from mmrag.embedders import load_backbone
from mmrag.modeling.backbone import inputs_of


class UniversalModule(InputModule):  # type: ignore[misc]
    """Prompt, images, model and pooling of a family in one module.

    Texts, images and ``{"text": ..., "image": ...}`` are taken; a prompt is the instruction.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.folder = Path(folder)
        # sentence-transformers moves and casts its modules itself, after they are made.
        self.backbone = load_backbone(folder, device="cpu", dtype="float32")
        self.auto_model = self.backbone.model  # a child, so that ``to`` moves it

    @property
    def modalities(self) -> list[Any]:
        """What it can embed, in sentence-transformers' words."""
        names: dict[str, Any] = {"text": "text", "image": "image", "fused": ("image", "text")}
        return [names[modality] for modality in sorted(self.backbone.modalities)]

    def preprocess(
        self, inputs: Sequence[Any], prompt: str | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Prepare inputs; they stay on the CPU until ``forward``."""
        contents = [as_content(value) for value in inputs]
        items = [inputs_of(self.backbone, content, prompt or None) for content in contents]
        return {"prepared": items}

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Add ``sentence_embedding``, (batch, dim), not normalised."""
        vectors: Tensor = self.backbone.forward(features["prepared"])
        features["sentence_embedding"] = vectors.float()
        return features

    def get_sentence_embedding_dimension(self) -> int:
        """Width of the vectors."""
        return self.backbone.dim

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        """Write the checkpoint in the layout that every loader of mmrag reads."""
        from mmrag.embedders.saving import save_checkpoint

        save_checkpoint(self.backbone, self.folder, Path(output_path))

    @classmethod
    def load(cls, model_name_or_path: str, **kwargs: Any) -> UniversalModule:
        """Load from an exported folder."""
        return cls(model_name_or_path)
