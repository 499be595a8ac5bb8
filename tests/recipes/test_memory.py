"""The memory estimate, against what libraries really keep."""

import pytest
import torch
from training import config_of

from mmrag.content import Content
from mmrag.embedders import load_backbone
from mmrag_recipes.config import LoraConfig
from mmrag_recipes.memory import memory_of, sizes_of
from mmrag_recipes.trainable import make_trainable


@pytest.fixture
def backbone(tiny_model):
    return load_backbone(tiny_model, family="gme", device="cpu", dtype="float32")


@pytest.mark.parametrize(
    "changes",
    [{}, {"freeze": ("visual",)}, {"lora": LoraConfig(r=3)}, {"lora": LoraConfig(r=2, dora=True)}],
)
def test_what_trains_is_counted(backbone, tiny_model, text_rows, tmp_path, changes):
    config = config_of(tiny_model, tmp_path, text_rows, **changes)
    sizes = sizes_of(backbone.model, config)
    assert sizes.weights == sum(p.numel() for p in backbone.model.parameters())
    assert sizes.trained == sum(p.numel() for p in make_trainable(backbone, config))


def test_activations_are_what_autograd_keeps(backbone, tiny_model, text_rows, tmp_path):
    config = config_of(tiny_model, tmp_path, text_rows)
    own = {p.untyped_storage().data_ptr() for p in backbone.model.parameters()}

    def kept(words):
        inputs = [backbone.prepare(backbone.plan(Content("word " * words), None))]
        seen = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            # The tensor is held too, or its address may be given to another.
            seen[storage.data_ptr()] = storage.nbytes(), tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = backbone.forward(inputs)
        size = sum(nbytes for place, (nbytes, _) in seen.items() if place not in own)
        return inputs[0].n_tokens, size, output

    (few, small, _), (many, large, _) = kept(60), kept(260)
    parts = memory_of(sizes_of(backbone.model, config), config, many - few)
    assert parts["activations"] == pytest.approx(large - small, rel=0.1)


@pytest.mark.parametrize("way", ["8bit", "4bit", "4bit-double"])
def test_quantised_weights_are_as_large_as_bitsandbytes_makes_them(way):
    from mmrag_recipes.memory import _QUANTISED

    bnb = pytest.importorskip("bitsandbytes")
    if way == "8bit":
        layer = bnb.nn.Linear8bitLt(1024, 1024, bias=False, has_fp16_weights=False).to("cpu")
        size = layer.weight.nbytes
    else:
        double = way == "4bit-double"
        layer = bnb.nn.LinearNF4(1024, 1024, bias=False, compress_statistics=double).to("cpu")
        state = layer.weight.quant_state
        size = layer.weight.nbytes + state.absmax.nbytes
        size += state.state2.absmax.nbytes if double else 0
    assert size == pytest.approx(_QUANTISED[way] * 1024**2, rel=1e-6)


def test_cards_share_what_is_split(backbone, tiny_model, text_rows, tmp_path):
    config = config_of(tiny_model, tmp_path, text_rows)
    sizes = sizes_of(backbone.model, config)
    one = memory_of(sizes, config, 0)
    assert one["weights"] + one["gradients"] + one["optimizer"] == 16 * sizes.weights
    four = memory_of(sizes, config.replace(shard=True), 0, cards=4)
    for name in ("weights", "gradients", "optimizer"):
        assert four[name] == one[name] / 4
    blocks = [*backbone.model.language_model.layers, *backbone.model.visual.blocks]
    largest = max(sum(p.numel() for p in block.parameters()) for block in blocks)
    rest = sizes.weights - sum(p.numel() for block in blocks for p in block.parameters())
    assert four["gathered"] == 8 * rest + 12 * largest
