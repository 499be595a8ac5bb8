"""Turn a finished run into a checkpoint folder that loads everywhere, and prove it.

    python -m mmrag_recipes export runs/adapt --out my-embedder
    python -m mmrag_recipes export runs/adapt --out my-embedder --scores before.json after.json

Adapters are merged. The folder is then loaded in a fresh process and must give the vectors of
the run; ``UniversalEmbedding``, plain transformers and sentence-transformers read it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file

from mmrag.content import Clip, Content
from mmrag.embedders import load_backbone
from mmrag.embedders.local import LocalEmbedder
from mmrag.embedders.registry import find_folders, read_marker
from mmrag.embedders.saving import save_checkpoint
from mmrag.errors import ConfigError, ModelError
from mmrag.modeling.backbone import Backbone
from mmrag.modeling.loading import check_keys
from mmrag_recipes.config import ExportConfig, RunConfig, TrainConfig
from mmrag_recipes.evaluate import table
from mmrag_recipes.options import build, read_file
from mmrag_recipes.row_file import open_rows
from mmrag_recipes.trainable import HasModel, make_trainable, peft_config

C = TypeVar("C", bound=RunConfig)

LEAST_COSINE = 0.9999
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_RELOAD = """
import sys, numpy
from mmrag_recipes.export import probe_vectors
numpy.save(sys.argv[2], probe_vectors(sys.argv[1]))
"""


def read_config(run: Path, cls: type[C]) -> C:
    """The options of a finished run.

    Raises:
        ModelError: If the run is not finished.
        ConfigError: If it is a run of another recipe.
    """
    final = run / "final"
    if not (final / "trained.safetensors").is_file():
        raise ModelError(f"{run}: there are no final weights; let the training finish first.")
    return build(cls, read_file(final / "config.json"), str(final / "config.json"))


def load_trained(run: Path) -> tuple[Backbone, TrainConfig]:
    """Load the model of a finished run, adapters merged.

    Raises:
        ModelError: If the run is not finished, or a trained weight has no place.
    """
    config = read_config(run, TrainConfig)
    backbone = load_backbone(
        # Merging in half precision would round away what a small adapter learned.
        config.model,
        family=config.family,
        device="cpu",
        dtype="float32",
        **config.limits,
    )
    fill_trained(run, backbone, config)
    return backbone, config


def fill_trained(run: Path, trained: HasModel, config: RunConfig) -> None:
    """Put the final weights of a run into the model that it began at, adapters merged.

    Raises:
        ModelError: If a trained weight has no place, or is not finite.
    """
    final = run / "final"
    # As in training, so that the weights of adapters have a place.
    make_trainable(trained, config)
    weights = load_file(final / "trained.safetensors")
    parameters = {n: p for n, p in trained.model.named_parameters() if p.requires_grad}
    check_keys(
        final,
        missing=parameters.keys() - weights.keys(),
        unexpected=weights.keys() - parameters.keys(),
    )
    broken = [name for name, value in weights.items() if not bool(value.isfinite().all())]
    if broken:
        raise ModelError(
            f"{run}: {len(broken)} trained weights are not finite, such as {broken[0]}: the "
            "training diverged. Train again with a lower lr."
        )
    for name, value in weights.items():
        parameters[name].data.copy_(value)
    merge_adapters(trained.model)
    trained.model.eval()


def merge_adapters(model: torch.nn.Module) -> None:
    """Fold every adapter layer of peft into the weight under it."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge(safe_merge=True)  # refuses weights that are not finite
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.get_base_layer())


def probe_contents(modalities: frozenset[Any]) -> list[Content]:
    """Contents that tell two checkpoints apart, of the modalities given."""
    # Made here, with structure in both directions: a swapped side or channel shows.
    down, right = np.mgrid[:84, :112].astype(np.uint8)
    image = Image.fromarray(np.stack([2 * down, 2 * right, 255 - down - right], axis=-1))
    contents = {
        "text": [Content("Which plan covers eye exams?"), Content("A table of revenue by year.")],
        "image": [Content(image=image)],
        "fused": [Content("an image of shades", image)],
        "clip": [Content(clip=Clip([image, image.rotate(180)], [0.0, 1.0]))],
    }
    return [c for modality in sorted(modalities) for c in contents[modality]]


def probe_vectors(folder: str | Path, backbone: Backbone | None = None) -> NDArray[np.float32]:
    """Vectors of the probes: of a folder, or of a backbone in memory."""
    model = backbone or load_backbone(folder, device="cpu", dtype="float32")
    embedder = LocalEmbedder(model, name=str(folder), fingerprint="probe")
    return embedder.encode(probe_contents(model.modalities))


def export(run: Path, out: Path, dtype: str = "float16", scores: Sequence[Path] = ()) -> Path:
    """Write the checkpoint folder of a run and compare it in a fresh process.

    Raises:
        ModelError: If a key has no partner or the reloaded vectors differ.
    """
    backbone, config = load_trained(run)
    # Of an adapter, the folder of its base: what describes the merged weights lies there.
    folders = find_folders(config.model)
    # The limits it was trained with: others would move its vectors.
    marker = {**read_marker(folders), **config.limits, **trained_sizes(config)}
    save_checkpoint(backbone, folders[0], out, dtype=DTYPES[dtype], marker=marker)
    (out / "README.md").write_text(model_card(config, out.name, scores), encoding="utf-8")
    # A new process has nothing of this one: what is missing from the folder shows.
    check_in_fresh_process(out, probe_vectors(out, backbone))
    return out


def trained_sizes(config: TrainConfig) -> dict[str, Any]:
    """The widths and depths that vectors may be cut to, as ``mmrag.json`` has them."""
    # Inner layers that this run did not train have moved away from what they were trained for.
    sizes: dict[str, Any] = {"matryoshka_layers": [list(pair) for pair in config.matryoshka_layers]}
    if config.matryoshka_dims:
        sizes["matryoshka_dims"] = sorted(config.matryoshka_dims)
    return sizes


def write_adapter(run: Path, out: Path) -> Path:
    """Write the adapter of a LoRA run in PEFT's layout, beside its base instead of merged.

    Raises:
        ConfigError: If the run has no adapter, or began at one: PEFT cannot stack them.
    """
    config = build(TrainConfig, read_file(run / "final" / "config.json"), str(run))
    if config.lora is None or len(find_folders(config.model)) > 1:
        began = "began at an adapter" if config.lora else "trained all weights"
        raise ConfigError(f"{run} {began}: only its merged weights can be exported.")
    trained = load_file(run / "final" / "trained.safetensors")
    # peft puts the adapter's name into the names of a live model, but not into its files.
    named = {
        f"base_model.model.{name.replace('.default', '')}".replace(
            "magnitude_vector.weight", "magnitude_vector"
        ): value
        for name, value in trained.items()
    }
    adapter = peft_config(config.lora)
    adapter.base_model_name_or_path = config.model
    # peft loads an adapter frozen then, as readers of a published one expect.
    adapter.inference_mode = True
    out.mkdir(parents=True, exist_ok=True)
    adapter.save_pretrained(str(out))
    save_file(named, out / "adapter_model.safetensors", metadata={"format": "pt"})
    return out


def check_in_fresh_process(folder: Path, expected: NDArray[np.float32]) -> None:
    """Load a folder in a new process and compare its vectors with those expected.

    Raises:
        ModelError: If it does not load, or a cosine is below 0.9999.
    """
    vectors = in_fresh_process(_RELOAD, folder)
    worst = float((vectors * expected).sum(axis=1).min())
    if not worst >= LEAST_COSINE:  # NaN is not
        raise ModelError(f"{folder}: reloaded vectors differ (cosine {worst:.6f}).")


def in_fresh_process(program: str, folder: Path) -> NDArray[np.float32]:
    """What a program saves that gets a folder and the path of a NumPy file as its arguments.

    Raises:
        ModelError: If it fails.
    """
    result = folder / "probe.npy"
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder), str(result)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise ModelError(f"{folder}: does not load in a fresh process: {done.stderr[-800:]}")
    saved: NDArray[np.float32] = np.load(result)
    result.unlink()
    return saved


def model_card(config: TrainConfig, name: str, scores: Sequence[Path]) -> str:
    """Write the card: base, data with sources and licenses, settings, scores."""
    lines = [f"# {name}", "", f"Fine-tuned from `{config.model}` with mmrag's recipes.", ""]
    lines += ["## Data", "", "| data set | rows | sources | licenses |", "|---|---|---|---|"]
    for data in config.data:
        rows = open_rows(data.rows)
        about = {(row.source.partition("#")[0], row.license or "not stated") for row in rows}
        sources = sorted({source for source, _ in about if source})
        shown = ", ".join(sources[:6]) + (
            f" and {len(sources) - 6} more" if len(sources) > 6 else ""
        )
        licenses = ", ".join(sorted({license_ for _, license_ in about}))
        label = data.name or Path(data.rows).stem
        lines.append(f"| {label} | {len(rows)} | {shown or 'not stated'} | {licenses} |")
    lines += ["", "## Training", ""]
    lines += [
        f"{config.steps} steps of {config.batch_size} rows, learning rate {config.lr}, "
        f"temperature {config.temperature}, {config.hard_negatives} hard negatives, "
        + (f"LoRA of rank {config.lora.r}." if config.lora else "all weights trained."),
    ]
    if scores:
        lines += ["", "## Scores", ""]
        for path in scores:
            results = json.loads(path.read_text(encoding="utf-8"))
            scores_table = table(results, ["hit@1", "hit@5", "ndcg@10"])
            lines += [f"### {path.stem}", "", scores_table, ""]
    lines += ["", "## Use", "", "```python", "from mmrag import UniversalEmbedding", ""]
    lines += [f'embed_model = UniversalEmbedding("{name}")', "```", ""]
    return "\n".join(lines)


def run(options: ExportConfig) -> None:
    """Command: export a run."""
    print(f"exported: {export(options.run, options.out, options.dtype, options.scores)}")
    if options.adapter:
        print(f"adapter: {write_adapter(options.run, options.adapter)}")
