"""Training rows of all modalities, for the tests of the recipes."""

from pathlib import Path

import numpy as np
from PIL import Image

from mmrag_recipes.rows import ImageStore, Item, Row, write_rows


def make_rows(folder: Path, count: int, negatives: int = 1, kind: str = "mixed") -> Path:
    """Rows text->text, text->image, text->fused and fused->text in turn, with negatives."""
    store = ImageStore(folder / "images")
    chance = np.random.default_rng(count)

    def image() -> str:
        height, width = 28 * chance.integers(2, 5), 28 * chance.integers(2, 5)
        return store.add(Image.fromarray(chance.integers(0, 255, (height, width, 3), np.uint8)))

    rows = []
    for n in range(count):
        turn = 0 if kind == "text" else n % 4
        words = " ".join(chance.choice(["page", "find", "answer", "user", "the"], 1 + n % 7))
        positive = [
            Item(text=f"document {n} {words}"),
            Item(image=image()) if turn else Item(text="-"),
            Item(text=f"both {n}", image=image()) if turn else Item(text="-"),
            Item(text=f"answer {n}"),
        ][turn]
        query = Item(text=f"{words} {n}?", image=image() if turn == 3 else None)
        others = [Item(text=f"no {n} {k}") for k in range(negatives)]
        rows.append(
            Row(
                id=f"r{n}",
                instruction="Find a page." if n % 2 else None,
                query=query,
                positives=[positive],
                negatives=others,
            )
        )
    write_rows(folder / "rows.jsonl", rows)
    return folder / "rows.jsonl"
