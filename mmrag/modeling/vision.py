"""Running the vision towers of the Qwen-VL families fast, with the same results.

transformers attends image by image, asks the device for their lengths in every layer, which makes
it wait, and turns queries and keys by two dozen kernels in float32. Here all that depends on sizes
alone is computed on the CPU, once a size; images of one size attend together, or all images where
torch has attention of variable lengths; and the arithmetic is written in fewer kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import QuickGELUActivation
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

from mmrag.modeling.attention import PLANLESS
from mmrag.modeling.batching import send
from mmrag.modeling.image_rule import ImageRule
from mmrag.modeling.qwen_images import cut_patches

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # torch 2.9
    varlen_attn = None  # type: ignore[assignment]

_QUICK = 1.702  # of quick-GELU: x * sigmoid(1.702 * x)


def speed_up(visual: Any) -> None:
    """Replace the forward functions of a tower's parts by faster ones.

    Weights keep their names and shapes, so that checkpoints are saved as they were. Other
    attention than SDPA stays as it is: flash attention takes images of any length at once.
    """
    _replace_forward(visual.patch_embed, embed_patches)
    for block in visual.blocks:
        if visual.config._attn_implementation in ("sdpa", PLANLESS):
            _replace_forward(block.attn, attend_grouped)
        if isinstance(getattr(block.mlp, "act", None), QuickGELUActivation):
            _replace_forward(block.mlp, quick_gelu_mlp)


def _replace_forward(module: nn.Module, forward: Callable[..., Tensor]) -> None:
    # By its class: a forward of each module's own would have each block compiled anew, and after
    # eight of them the compiler gives up.
    module.__class__ = _with_forward(type(module), forward)


_classes: dict[tuple[type, Callable[..., Tensor]], type[nn.Module]] = {}


def _with_forward(base: type[nn.Module], forward: Callable[..., Tensor]) -> type[nn.Module]:
    """The one subclass with this forward, whose modules can be pickled."""

    def reduce(module: nn.Module) -> tuple[Any, ...]:
        return _blank, (base, forward), module.__dict__

    members = {"forward": forward, "__reduce__": reduce}
    return _classes.setdefault((base, forward), type(base.__name__, (base,), members))


def _blank(base: type[nn.Module], forward: Callable[..., Tensor]) -> nn.Module:
    made = _with_forward(base, forward)
    return made.__new__(made)


def run_tower(visual: Any, images: Sequence[Tensor], rule: ImageRule) -> Any:
    """What a tower makes of images, in order.

    Args:
        visual: the tower. One with ``kept_features`` may have its features from there: training
            keeps those of a frozen tower.
        images: (height, width, 3) each, uint8, on the CPU; pairs of frames of a clip have one axis
            more, (2, height, width, 3).

    Returns:
        The tower's output; ``pooler_output`` holds the visual tokens, (tokens, dim).
    """
    if (kept := getattr(visual, "kept_features", None)) is not None:
        return kept.forward(images, rule)
    return tower_output(visual, images, rule)


def tower_output(visual: Any, images: Sequence[Tensor], rule: ImageRule) -> Any:
    """As ``run_tower``, computed in any case."""
    weight = visual.patch_embed.proj.weight
    device = weight.device
    grids = [(i.shape[-3] // rule.patch, i.shape[-2] // rule.patch) for i in images]
    patches = device_patches(images, rule, device).to(weight.dtype)
    side = getattr(visual, "num_grid_per_side", None)
    tables = [_tables(*grid, rule.merge, side) for grid in grids]
    sizes = {name: send(torch.cat([table[name] for table in tables]), device) for name in tables[0]}
    thw = torch.tensor([(1, *grid) for grid in grids])
    grouped = type(visual.blocks[0].attn).forward is attend_grouped
    # Our attention wants lengths on the CPU, flash attention on the device.
    where = torch.device("cpu") if grouped else device
    sizes["cu_seqlens"] = get_vision_cu_seqlens(thw).to(where)
    if hasattr(visual, "window_size"):  # Qwen2.5-VL
        index, lengths = get_vision_window_index(
            thw, rule.merge, visual.window_size, visual.patch_size
        )
        sizes |= {"window_index": send(index, device), "cu_window_seqlens": lengths.to(where)}
    return visual(patches, grid_thw=send(thw, device), **sizes)


@lru_cache(maxsize=64)
def _tables(rows: int, columns: int, merge: int, side: int | None) -> dict[str, Tensor]:
    """Positions of the patches of one image, and where they lie in a learned table of ``side``.

    By the names that transformers' towers take them by; on the CPU.
    """
    grid = torch.tensor([(1, rows, columns)])
    tables = {"position_ids": get_vision_position_ids(grid, merge)}
    if side is not None:  # Qwen3-VL
        indices, weights = get_vision_interpolation_indices_and_weights(
            grid, side, align_corners=True, spatial_merge_size=merge
        )
        tables |= {"interp_indices": indices, "interp_weights": weights}
    return tables


def device_patches(images: Sequence[Tensor], rule: ImageRule, device: torch.device) -> Tensor:
    """Patches of images in order, float32, sent to ``device`` as bytes and cut there."""
    # A page has four times as many bytes once it is float32, and twice that as patches.
    flat = send(torch.cat([image.flatten() for image in images]), device)
    sent = [
        part.view(image.shape)
        for part, image in zip(torch.split(flat, [i.numel() for i in images]), images, strict=True)
    ]
    parts: list[Tensor] = [flat] * len(images)
    # Pages of one document have one size, so that a batch is usually one stack.
    for places in _by_key([tuple(image.shape) for image in images]).values():
        cut = cut_patches(torch.stack([sent[place] for place in places]), rule)
        for place, part in zip(places, cut.chunk(len(places)), strict=True):
            parts[place] = part
    return torch.cat(parts)


def embed_patches(patch_embed: Any, patches: Tensor) -> Tensor:
    """Patches (n, 3 * temporal * patch * patch) to (n, dim), by a matrix product.

    The convolution of a patch embedding never overlaps, so each output is one dot product; the
    convolution kernel is 10 to 20 times slower in some torch releases (pytorch issue 166122).
    """
    projection = patch_embed.proj
    weight = projection.weight.flatten(1)  # (dim, 3 * temporal * patch * patch)
    return F.linear(patches.to(weight.dtype).view(-1, weight.shape[1]), weight, projection.bias)


def quick_gelu_mlp(mlp: Any, x: Tensor) -> Tensor:
    """An MLP with quick-GELU, (n, dim) to (n, dim), in two kernels less.

    ``x * sigmoid(a * x)`` is ``silu(a * x) / a``, and both factors go into the matrix products.
    """
    first, second = mlp.fc1, mlp.fc2
    if type(first) is not nn.Linear or type(second) is not nn.Linear:  # adapters, quantised
        return torch.as_tensor(second(mlp.act(first(x))))
    inner = torch.addmm(first.bias * _QUICK, x, first.weight.T, alpha=_QUICK)
    inner = F.silu(inner, inplace=not inner.requires_grad)
    return torch.addmm(second.bias, inner, second.weight.T, alpha=1 / _QUICK)


def attend_grouped(
    attention: Any,
    hidden_states: Tensor,
    cu_seqlens: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    **kwargs: Any,
) -> Tensor:
    """A tower's attention, (patches, dim) in and out, segments of one length in one call.

    Args:
        cu_seqlens: where segments end, on the CPU.
    """
    qkv = attention.qkv(hidden_states).view(len(hidden_states), 3, attention.num_heads, -1)
    query, key = turned(qkv[:, :2], *position_embeddings).unbind(1)
    value = qkv[:, 2]  # (patches, heads, head_dim)
    attend = _attend_compiled if torch.compiler.is_compiling() else attend_segments
    attended = attend(query, key, value, cu_seqlens, attention.scaling)
    return torch.as_tensor(attention.proj(attended.flatten(1)))


def attend_segments(
    query: Tensor, key: Tensor, value: Tensor, ends: Tensor, scale: float
) -> Tensor:
    """As ``attend_by_length``, of segments by where they end: (segments + 1,), on the CPU."""
    lengths = [end - start for start, end in pairwise(ends.tolist())]
    return attend_by_length(query, key, value, lengths, scale)


# One operator to the compiler, which cannot look into lengths.
_attend_compiled = torch.library.custom_op(
    "mmrag::attend_segments", attend_segments, mutates_args=()
)


@_attend_compiled.register_fake
def _shape_of_attended(
    query: Tensor, key: Tensor, value: Tensor, ends: Tensor, scale: float
) -> Tensor:
    return query.new_empty(query.shape)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: computed in float32, as the published code does, in four kernels.

    Args:
        x: (patches, ..., head_dim), of any type.
        cos, sin: (patches, head_dim), float32; their halves are equal.

    Returns:
        As ``x``.
    """
    shape = (len(x), *(1,) * (x.ndim - 2), -1)
    half = x.shape[-1] // 2
    cos, sin = cos.view(shape), sin.view(shape)[..., :half]
    out = x * cos  # float32, whatever x is
    out[..., :half].addcmul_(x[..., half:], sin, value=-1)
    out[..., half:].addcmul_(x[..., :half], sin)
    return out.to(x.dtype)


def attend_by_length(
    query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], scale: float
) -> Tensor:
    """Attention within consecutive segments, both ways.

    Args:
        query, key, value: (total length, heads, head_dim).
        lengths: of the segments, in order.

    Returns:
        (total length, heads, head_dim).
    """
    groups, any_length = _by_key(lengths), has_varlen(query, scale)
    # No gathering is needed. PyTorch may build a plan for the shape, which pays for pages that come
    # in batches of one size, and not for the picture of a question.
    if len(groups) == 1 and not (any_length and len(lengths) == 1):
        return _attend(query, key, value, len(lengths), scale)
    if any_length:
        ends, longest = _ends(tuple(lengths), query.device), max(lengths)
        return torch.as_tensor(varlen_attn(query, key, value, ends, ends, longest, longest))
    parts = [torch.split(tensor, list(lengths)) for tensor in (query, key, value)]
    attended: list[Tensor] = [query] * len(lengths)
    for places in groups.values():
        q, k, v = (torch.cat([part[place] for place in places]) for part in parts)
        found = _attend(q, k, v, len(places), scale)
        for place, part in zip(places, found.chunk(len(places)), strict=True):
            attended[place] = part
    return torch.cat(attended)


def has_varlen(query: Tensor, scale: float) -> bool:
    """Whether torch attends segments of any length in one call: on CUDA, in half precision.

    From torch 2.10 on. Its kernel is flash attention's, which came with the Ampere generation;
    the scale is its own.
    """
    half = query.dtype in (torch.bfloat16, torch.float16)
    if varlen_attn is None or not query.is_cuda or not half or query.shape[-1] % 8:
        return False
    usual = abs(scale - query.shape[-1] ** -0.5) < 1e-6
    return usual and torch.cuda.get_device_capability(query.device) >= (8, 0)


@lru_cache(maxsize=8)
def _ends(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Where segments end, from 0 on, int32: sent once a batch, and found again by each layer."""
    with torch.inference_mode(False):  # the next to ask may be a training step
        return send(torch.tensor([0, *accumulate(lengths)], dtype=torch.int32), device)


def _attend(query: Tensor, key: Tensor, value: Tensor, n: int, scale: float) -> Tensor:
    """Attention within ``n`` segments of one length, which lie one after the other."""
    q, k, v = (t.view(n, -1, *t.shape[1:]).transpose(1, 2) for t in (query, key, value))
    attended = F.scaled_dot_product_attention(q, k, v, scale=scale)  # (n, heads, length, dim)
    return attended.transpose(1, 2).reshape(query.shape)


def add_features(hidden: Tensor, places: Tensor, features: Tensor) -> Tensor:
    """States with visual features added at the visual tokens, as DeepStack does.

    transformers looks up the places, for which it has to wait for the device.

    Args:
        hidden: (batch, length, dim).
        places: (batch, length), bool.
        features: (visual tokens, dim).
    """
    mask = places.unsqueeze(-1).expand_as(hidden)
    return hidden + torch.zeros_like(hidden).masked_scatter(mask, features.to(hidden.dtype))


def _by_key(keys: Sequence[Any]) -> dict[Any, list[int]]:
    """Places of equal keys."""
    places: dict[Any, list[int]] = {}
    for place, key in enumerate(keys):
        places.setdefault(key, []).append(place)
    return places
