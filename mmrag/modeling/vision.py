"""Running the vision towers of the Qwen-VL families fast, with the same results.

transformers attends image by image, and asks the device for their lengths in every layer, which
makes it wait. Here all that depends on sizes alone is computed once a batch on the CPU, and
images of one size attend together.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_position_ids,
    get_vision_window_index,
)

from mmrag.modeling.batching import send
from mmrag.modeling.qwen_images import ImageRule, cut_patches


def speed_up(visual: Any) -> None:
    """Let a tower embed patches by a matrix product, and attend by groups of equal images.

    Weights keep their names and shapes, so that checkpoints are saved as they were. Other
    attention than SDPA stays as it is: flash attention takes images of any length at once.
    """
    visual.patch_embed.forward = MatmulPatchEmbed(visual.patch_embed)
    if visual.config._attn_implementation == "sdpa":
        for block in visual.blocks:
            block.attn.forward = GroupedAttention(block.attn)


def run_tower(visual: Any, images: Sequence[Tensor], rule: ImageRule) -> Any:
    """What a tower makes of images, in order.

    Args:
        images: (height, width, 3) each, uint8, on the CPU.

    Returns:
        The tower's output; ``pooler_output`` holds the visual tokens, (tokens, dim).
    """
    weight = visual.patch_embed.proj.weight
    device = weight.device
    grids = torch.tensor([(1, i.shape[0] // rule.patch, i.shape[1] // rule.patch) for i in images])
    patches = device_patches(images, rule, device).to(weight.dtype)
    sizes: dict[str, Any] = {"position_ids": get_vision_position_ids(grids, rule.merge).to(device)}
    grouped = isinstance(visual.blocks[0].attn.forward, GroupedAttention)
    # Our attention wants lengths on the CPU, flash attention on the device.
    where = torch.device("cpu") if grouped else device
    sizes["cu_seqlens"] = get_vision_cu_seqlens(grids).to(where)
    if hasattr(visual, "window_size"):  # Qwen2.5-VL
        index, lengths = get_vision_window_index(
            grids, rule.merge, visual.window_size, visual.patch_size
        )
        sizes |= {"window_index": index.to(device), "cu_window_seqlens": lengths.to(where)}
    return visual(patches, grid_thw=grids.to(device), **sizes)


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


class MatmulPatchEmbed:
    """A picklable forward for a patch embedding, as a matrix product.

    Its convolution never overlaps, so each output is one dot product; the convolution kernel
    is 10 to 20 times slower in some torch releases (pytorch issue 166122).
    """

    def __init__(self, patch_embed: nn.Module) -> None:
        self.patch_embed: Any = patch_embed

    def __call__(self, patches: Tensor) -> Tensor:
        """Patches (n, 3 * temporal * patch * patch) to (n, dim)."""
        projection = self.patch_embed.proj
        weight = projection.weight.flatten(1)  # (embed, 3 * temporal * patch * patch)
        return F.linear(patches.to(weight.dtype).view(-1, weight.shape[1]), weight, projection.bias)


class GroupedAttention:
    """A picklable forward for a tower's attention: segments of one length in one call."""

    def __init__(self, attention: nn.Module) -> None:
        self.attention: Any = attention

    def __call__(
        self,
        hidden_states: Tensor,
        cu_seqlens: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        **kwargs: Any,
    ) -> Tensor:
        """As the class it replaces: (patches, dim) in and out; ``cu_seqlens`` on the CPU."""
        attention = self.attention
        qkv = attention.qkv(hidden_states).view(len(hidden_states), 3, attention.num_heads, -1)
        query, key, value = qkv.unbind(1)  # (patches, heads, head_dim)
        query, key = apply_rotary_pos_emb_vision(query, key, *position_embeddings)
        ends = cu_seqlens.tolist()
        lengths = [end - start for start, end in pairwise(ends)]
        attended = attend_by_length(query, key, value, lengths, attention.scaling)
        return torch.as_tensor(attention.proj(attended.flatten(1)))


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
    groups = _by_key(lengths)
    if len(groups) == 1:  # no gathering is needed
        return _attend(query, key, value, len(lengths), scale)
    parts = [torch.split(tensor, list(lengths)) for tensor in (query, key, value)]
    attended: list[Tensor] = [query] * len(lengths)
    for places in groups.values():
        q, k, v = (torch.cat([part[place] for place in places]) for part in parts)
        together = _attend(q, k, v, len(places), scale)
        for place, part in zip(places, together.chunk(len(places)), strict=True):
            attended[place] = part
    return torch.cat(attended)


def _attend(query: Tensor, key: Tensor, value: Tensor, n: int, scale: float) -> Tensor:
    """Attention within ``n`` segments of one length, which lie one after the other."""
    q, k, v = (t.view(n, -1, *t.shape[1:]).transpose(1, 2) for t in (query, key, value))
    attended = F.scaled_dot_product_attention(q, k, v, scale=scale)  # (n, heads, length, dim)
    return attended.transpose(1, 2).reshape(query.shape)


def _by_key(keys: Sequence[Any]) -> dict[Any, list[int]]:
    """Places of equal keys."""
    places: dict[Any, list[int]] = {}
    for place, key in enumerate(keys):
        places.setdefault(key, []).append(place)
    return places
