"""What of a model trains, in which groups, and how fast."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn

from mmrag.errors import ConfigError
from mmrag.modeling.loading import Quantization
from mmrag_recipes.config import LoraConfig, RunConfig

# Modules of the families that take pixels alone. What they give depends on no other weights.
_TOWERS = ("visual", "vision_tower", "vision_embed_tokens")


class HasModel(Protocol):
    """A ``Backbone`` or a ``Task``."""

    model: nn.Module


def make_trainable(trained: HasModel, config: RunConfig) -> list[nn.Parameter]:
    """Choose what trains: adapters, or all weights; less what is frozen. float32 masters.

    Raises:
        ConfigError: If a frozen prefix names nothing, or nothing is left to train.
    """
    model: Any = trained.model
    if config.lora:
        _add_adapters(model, config.lora)
    for prefix in config.freeze:
        _freeze(model, prefix)
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise ConfigError("Nothing is left to train: loosen `freeze` or the adapters' `targets`.")
    if config.lora:
        for parameter in trainable:
            # Adapters in bfloat16 would round small updates away; they are few.
            parameter.data = parameter.data.float()
    model.train()
    if config.gradient_checkpointing:
        # transformers renames the method in version 5.23.
        enable = getattr(model, "activation_checkpointing_enable", None)
        # The reentrant kind gives no gradient where no input requires one, as with frozen
        # embeddings.
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
        # transformers lets inputs require a gradient for the sake of the other kind. A frozen tower
        # would then keep a graph of all that it computes.
        model.disable_input_require_grads()
    for tower in frozen_towers(model):
        # No graph is kept of what is frozen, so that there is nothing to compute again.
        for module in tower.modules():
            if hasattr(module, "gradient_checkpointing"):
                setattr(module, "gradient_checkpointing", False)  # noqa: B010
        tower.eval()
    return trainable


def _freeze(model: nn.Module, prefix: str) -> None:
    frozen = [p for name, p in model.named_parameters() if name.startswith(prefix)]
    if not frozen:
        raise ConfigError(f"freeze: no weight begins with {prefix!r}.")
    for parameter in frozen:
        parameter.requires_grad_(False)


def _add_adapters(model: nn.Module, lora: LoraConfig) -> None:
    from peft import inject_adapter_in_model, prepare_model_for_kbit_training
    from peft.tuners.tuners_utils import BaseTunerLayer

    if getattr(model, "is_quantized", False):
        # Norms, embeddings and biases become float32. Checkpointing is turned on later, of the kind
        # that needs no gradient of the inputs.
        prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        packing: Any
        for packing in model.modules():
            if hasattr(packing, "support_avx512bf16_for_cpu"):
                # On some CPUs, bitsandbytes packs weights anew at the first evaluation, and what is
                # packed gives no gradient afterwards.
                packing.support_avx512bf16_for_cpu = False
    try:
        # Without peft's wrapper, which would change the names and the forward of the model.
        inject_adapter_in_model(peft_config(lora), model)
    except ValueError as error:
        raise ConfigError(f"lora.targets: {error}") from error
    if next(model.parameters()).is_cuda:
        # Training casts automatically there. peft would make float32 of all that goes into an
        # adapter, only for it to become bfloat16 again.
        for adapter in (each for each in model.modules() if isinstance(each, BaseTunerLayer)):
            adapter.cast_input_dtype_enabled = False


def quantization_of(config: RunConfig) -> Quantization | None:
    """How the weights under the adapters are held in training."""
    return config.lora.quantize if config.lora else None


def peft_config(lora: LoraConfig) -> Any:
    """The options of the adapters as peft's own."""
    from peft import LoraConfig as PeftLora

    return PeftLora(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.targets,
        use_dora=lora.dora,
    )


def frozen_towers(model: nn.Module) -> list[nn.Module]:
    """Vision towers of which no weight trains."""
    named = ((name, module) for name, module in model.named_modules() if module is not model)
    return [
        module
        for name, module in named
        if name.rpartition(".")[2] in _TOWERS
        and not any(parameter.requires_grad for parameter in module.parameters())
    ]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and then each module's own again."""
    # Frozen towers are in evaluation mode all along, so train() for all would be wrong.
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def make_optimizer(model: nn.Module, config: RunConfig) -> torch.optim.Optimizer:
    """AdamW over what trains; each group of ``config.groups`` has its own rate.

    Raises:
        ConfigError: For a group of which nothing trains.
    """
    left = {name: p for name, p in model.named_parameters() if p.requires_grad}
    groups: list[dict[str, Any]] = []
    for group in config.groups:
        taken = [name for name in left if name.startswith(group.prefix)]
        if not taken:
            raise ConfigError(f"groups: nothing that trains begins with {group.prefix!r}.")
        decay = config.weight_decay if group.weight_decay is None else group.weight_decay
        # Relative, so that one schedule serves all groups.
        scale = 1.0 if group.lr is None else group.lr / config.lr
        # The first group that fits takes a weight: a weight must not be in two.
        parameters = [left.pop(name) for name in taken]
        groups.append({"params": parameters, "weight_decay": decay, "scale": scale})
    if left:
        groups.append(
            {"params": list(left.values()), "weight_decay": config.weight_decay, "scale": 1.0}
        )
    return torch.optim.AdamW(groups, lr=config.lr)


def learning_rate(step: int, config: RunConfig) -> float:
    """Linear warm-up, then as ``schedule`` says: linear or cosine to zero, or constant."""
    warmup = max(1, round(config.warmup * config.steps))
    if step < warmup:
        # From 1 on: a first step of rate 0 would be wasted.
        return config.lr * (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, config.steps - warmup))
    match config.schedule:
        case "constant":
            return config.lr
        case "cosine":
            return config.lr * (1 + math.cos(math.pi * done)) / 2
    return config.lr * (1 - done)
