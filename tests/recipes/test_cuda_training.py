"""Training on a card gives what training on the CPU gives."""

import numpy as np
import pytest
import torch
from training import config_of, log_of

from mmrag_recipes.config import LoraConfig
from mmrag_recipes.export import load_trained, probe_vectors
from mmrag_recipes.train import train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("lora", [None, LoraConfig(r=2)])
def test_losses_and_weights_are_those_of_the_cpu(tiny_model, mixed_rows, tmp_path, lora):
    losses, vectors = [], []
    for device in ("cpu", "cuda"):
        options = {"lora": lora, "freeze": ("visual",), "chunk": 2, "dtype": "float32"}
        out = tmp_path / device
        train(config_of(tiny_model, out, mixed_rows, device=device, **options))
        losses.append([record["loss"] for record in log_of(out)])
        vectors.append(probe_vectors("trained", load_trained(out)[0]))
    np.testing.assert_allclose(losses[1], losses[0], rtol=0.1)  # bfloat16 on the card
    assert (vectors[0] * vectors[1]).sum(1).min() > 0.999


def test_half_precision_with_checkpointing_learns(tiny_model, text_rows, tmp_path):
    options = {"lora": LoraConfig(r=4), "gradient_checkpointing": True, "dtype": "bfloat16"}
    options |= {"steps": 25, "lr": 0.02, "device": "cuda", "chunk": 3}
    train(config_of(tiny_model, tmp_path, text_rows, **options))
    losses = [record["loss"] for record in log_of(tmp_path)]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_adapters_on_quantised_weights_learn(tiny_model, text_rows, tmp_path):
    pytest.importorskip("bitsandbytes")
    options = {"lora": LoraConfig(r=4, quantize="4bit-double"), "dtype": "bfloat16"}
    options |= {"gradient_checkpointing": True, "steps": 25, "lr": 0.02, "device": "cuda"}
    train(config_of(tiny_model, tmp_path, text_rows, **options))
    losses = [record["loss"] for record in log_of(tmp_path)]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
