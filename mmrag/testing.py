"""The contract of an embedder, as a check that anyone can run on theirs.

>>> from mmrag.testing import check_embedder
>>> check_embedder(my_embedder)  # doctest: +SKIP
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageDraw

from mmrag.content import Clip, Content
from mmrag.embedders.base import Embedder
from mmrag.errors import ConfigError

Check = Callable[[Embedder, Sequence[Content]], None]

LEAST_COSINE = 0.99999
# Longer than any model's context: it must be cut, and not raise or run out of memory.
_LONG_TEXT = "every word of this sentence is repeated until nothing more fits " * 2000


def check_embedder(embedder: Embedder, *, least_cosine: float = LEAST_COSINE) -> None:
    """Run the whole contract on an embedder; meant for tiny checkpoints in float32.

    Checked: shape, dtype and norm; one item alone against the same item in any batch; order;
    mixed modalities; empty and over-long texts; tiny, large, extremely long and grey images;
    determinism; pickling; the Matryoshka prefix property; refusal of impossible dimensions.

    ``least_cosine`` is what a vector alone and in a batch must share; lower it below float32.

    Raises:
        AssertionError: That lists every part of the contract that does not hold.
    """
    contents = awkward_contents(embedder)
    failures = []
    for check in (
        _shapes,
        lambda e, c: _batch_invariance(e, c, least_cosine),
        _order,
        _different_contents_differ,
        _determinism,
        _pickling,
        _matryoshka,
        _impossible_dims,
        _nothing,
    ):
        try:
            check(embedder, contents)
        except AssertionError as error:
            failures.append(str(error))
    assert not failures, f"{embedder.name}: " + "; ".join(failures)


def awkward_contents(embedder: Embedder) -> list[Content]:
    """Inputs that tell a right implementation from a nearly right one, of its modalities."""
    texts = ["a", "", "   spaces   ", "Ünïcödé — 北京 🚗\ttabs\nlines", "word " * 90, _LONG_TEXT]
    images = {
        "page": _page(380, 500),
        "tiny": Image.new("RGB", (3, 2), "red"),
        "large": _page(1500, 1100),
        "wide": _page(900, 30),
        "tall": _page(25, 700),
        "grey": _page(200, 120).convert("L"),
        "clear": Image.new("RGBA", (60, 60), (0, 0, 255, 90)),
    }
    contents = []
    if "text" in embedder.modalities:
        contents += [Content(text) for text in texts]
    if "image" in embedder.modalities:
        contents += [Content(image=image) for image in images.values()]
    if "fused" in embedder.modalities:
        contents += [
            Content("the second line of this page", images["page"]),
            Content("at night", images["grey"], "Find the same place with this change."),
        ]
    if "clip" in embedder.modalities:
        clip = Clip([_page(90, 60), _page(80, 60).resize((90, 60))], [0.0, 1.0])
        contents += [Content(clip=clip), Content("what happens", clip=clip)]
    return contents


def _page(width: int, height: int) -> Image.Image:
    """A white image with black bars like lines of print, different at every size."""
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    for number, top in enumerate(range(4, height - 6, 14)):
        right = width - 4 - (number * 37 + width) % max(1, width // 2)
        draw.rectangle((4, top, max(5, right), top + 6), fill=(number * 9 % 90, 0, 40))
    return image


def _shapes(embedder: Embedder, contents: Sequence[Content]) -> None:
    vectors = embedder.encode(contents)
    assert vectors.shape == (len(contents), embedder.dim), f"shape {vectors.shape} is wrong"
    assert vectors.dtype == np.float32, f"dtype {vectors.dtype} is not float32"
    assert np.isfinite(vectors).all(), "a vector is not finite"
    norms = np.linalg.norm(vectors, axis=1)
    assert np.allclose(norms, 1, atol=1e-5), f"norms go from {norms.min()} to {norms.max()}"


def _batch_invariance(embedder: Embedder, contents: Sequence[Content], least: float) -> None:
    together = embedder.encode(contents)
    alone = np.concatenate([embedder.encode([content]) for content in contents])
    by_three = np.concatenate(
        [embedder.encode(contents[start : start + 3]) for start in range(0, len(contents), 3)]
    )
    for name, other in (("alone", alone), ("in threes", by_three)):
        # In float64: the rounding of float32 is as large as what is looked for.
        a, b = together.astype(np.float64), other.astype(np.float64)
        cosines = (a * b).sum(axis=1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
        worst = int(cosines.argmin())
        assert cosines[worst] >= least, (
            f"input {worst} together and {name} differ: cosine {cosines[worst]:.6f}"
        )


def _order(embedder: Embedder, contents: Sequence[Content]) -> None:
    forward = embedder.encode(contents)
    backward = embedder.encode(list(reversed(contents)))[::-1]
    assert np.allclose(forward, backward, atol=1e-4), "vectors come back in another order"


def _different_contents_differ(embedder: Embedder, contents: Sequence[Content]) -> None:
    vectors = embedder.encode(contents)
    # Less 2 on the diagonal, where each vector meets itself.
    similarity = vectors @ vectors.T - 2 * np.eye(len(contents), dtype=np.float32)
    first, second = np.unravel_index(int(similarity.argmax()), similarity.shape)
    equal = np.array_equal(vectors[first], vectors[second])
    assert not equal, f"inputs {first} and {second} have the same vector"


def _determinism(embedder: Embedder, contents: Sequence[Content]) -> None:
    first, second = embedder.encode(contents), embedder.encode(contents)
    assert np.array_equal(first, second), "two equal calls give different vectors"


def _pickling(embedder: Embedder, contents: Sequence[Content]) -> None:
    copy = pickle.loads(pickle.dumps(embedder))
    first, second = embedder.encode(contents[:2]), copy.encode(contents[:2])
    assert np.allclose(first, second, atol=1e-6), "a pickled copy gives different vectors"


def _matryoshka(embedder: Embedder, contents: Sequence[Content]) -> None:
    half = max(1, embedder.dim // 2)
    full = embedder.encode(contents)
    short = embedder.encode(contents, dim=half)
    assert short.shape == (len(contents), half), f"dim={half} gives shape {short.shape}"
    prefix = full[:, :half] / np.linalg.norm(full[:, :half], axis=1, keepdims=True)
    assert np.allclose(short, prefix, atol=1e-5), "dim= is not the normalised prefix"


def _impossible_dims(embedder: Embedder, contents: Sequence[Content]) -> None:
    for dim in (0, -1, embedder.dim + 1):
        try:
            embedder.encode(contents[:1], dim=dim)
        except ConfigError:
            continue
        raise AssertionError(f"dim={dim} is not refused with a ConfigError")


def _nothing(embedder: Embedder, contents: Sequence[Content]) -> None:
    shape = embedder.encode([]).shape
    assert shape == (0, embedder.dim), f"no contents give shape {shape}"
