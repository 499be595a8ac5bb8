"""The options of the recipe that makes training rows for the model that answers."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from mmrag_recipes.options import Options


class GeneratorRowsConfig(Options):
    """Make rows to train the model that answers: right pages, irrelevant ones, and refusals."""

    positional: ClassVar[tuple[str, ...]] = ("questions",)

    questions: Path
    """Questions with their answers and pages."""
    pdfs: Path
    """Folder of the PDFs."""
    out: Path
    """Folder of the rows and their images."""
    layout: Literal["swift", "llava", "transformers"] = "swift"
    """Layout of the rows: ms-swift, LLaVA, or chat templates of transformers."""
    items: Literal["image", "text", "fused"] = "image"
    """What is shown of a page."""
    pages: int = Field(4, ge=2)
    """Pages shown where some are irrelevant."""
    noise: float = Field(0.6, ge=0, le=1)
    """Share of the questions shown with irrelevant pages beside the right ones."""
    refuse: float = Field(0.2, ge=0, le=1)
    """Share of the questions shown with irrelevant pages alone; their answer is a refusal."""
    refusal: str = ""
    """The answer where no right page is shown; by default what mmrag's engine understands."""
    template: str = "{question}\nAnswer from the pages above, or reply with {refusal}."
    """What is asked after the pages, with {question} and {refusal}."""
    cite: bool = True
    """End answers with the numbers of the right pages, as in [2]."""
    model: str = "mmrag-nano"
    """Embedder that finds irrelevant pages that look right."""
    depth: int = Field(20, ge=1)
    """Irrelevant pages are drawn from this many that are most like the question."""
    seed: int = 0
    """Of the kinds of rows, the pages and their order."""

    @model_validator(mode="after")
    def _shares_fit(self) -> GeneratorRowsConfig:
        if self.noise + self.refuse > 1:
            raise ValueError("noise and refuse are shares of the same questions: at most 1 in all")
        if "{question}" not in self.template:
            raise ValueError("template must hold {question}")
        return self
