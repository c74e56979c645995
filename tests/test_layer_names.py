"""Layers of real architectures with random weights: which number of a module's path is that of its layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import transformers as tf
from peft import LoraConfig, get_peft_model

from copra_fl.adapters.state import PEFT_PREFIX
from copra_fl.copra.gates import Gates
from copra_fl.copra.layer_names import LayerNames
from copra_fl.probes import pruned_adapters

STAGES = {"depths": [2, 2, 2]}
SIZES: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
TOKENS = {"vocab_size": 30, "num_key_value_heads": 2, "pad_token_id": 0}
EXPERTS = {"num_experts": 3, "num_local_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
T5 = {"vocab_size": 30, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 3, "num_heads": 2}
PVT = {"num_encoder_blocks": 3, "depths": [2, 2, 2], "hidden_sizes": [8, 16, 32], "num_attention_heads": [1, 2, 4],
       "sr_ratios": [4, 2, 1], "mlp_ratios": [2, 2, 2], "patch_sizes": [7, 3, 3], "strides": [4, 2, 2]}  # fmt: skip
HIERA = {"embed_dim": 8, "image_size": [32, 32], "depths": [1, 2, 3], "num_heads": [1, 2, 4], "num_query_pool": 2,
         "masked_unit_size": [4, 4]}  # fmt: skip
RESNET = {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [2, 3], "layer_type": "bottleneck"}


def paths(form: str, *depths: int) -> list[str]:
    """Return `form` with S for the stage and N for the block in it, of stages of these depths."""
    return [
        form.replace("S", str(stage)).replace("N", str(block))
        for stage, depth in enumerate(depths)
        for block in range(depth)
    ]


#: name -> model, target modules, its layers
CASES: dict[str, tuple[Callable[[], Any], list[str], list[str]]] = {
    "BERT": (lambda: tf.BertModel(tf.BertConfig(**SIZES, vocab_size=30)), ["query", "value"],
             paths("encoder.layer.N", 3)),
    "ViT": (lambda: tf.ViTModel(tf.ViTConfig(**SIZES, image_size=8, patch_size=4)), ["q_proj", "v_proj"],
            paths("layers.N", 3)),
    "Llama": (lambda: tf.LlamaModel(tf.LlamaConfig(**SIZES, **TOKENS)), ["q_proj", "down_proj"], paths("layers.N", 3)),
    "Mixtral": (lambda: tf.MixtralModel(tf.MixtralConfig(**SIZES, **TOKENS, **EXPERTS)), ["q_proj", "v_proj"],
                paths("layers.N", 3)),
    "Qwen2-MoE": (lambda: tf.Qwen2MoeModel(tf.Qwen2MoeConfig(**SIZES, **TOKENS, **EXPERTS)), ["q_proj", "up_proj"],
                  paths("layers.N", 3)),
    "T5": (lambda: tf.T5Model(tf.T5Config(**T5)), ["q", "v", "k", "o", "wi", "wo"],
           paths("encoder.block.N", 3) + paths("decoder.block.N", 3)),
    "Swin": (lambda: tf.SwinModel(tf.SwinConfig(embed_dim=8, image_size=32, num_heads=[1, 2, 4], window_size=2,
                                                **STAGES)),
             ["q_proj", "fc1"], paths("encoder.layers.S.blocks.N", 2, 2, 2)),
    "PVTv2": (lambda: tf.PvtV2Model(tf.PvtV2Config(**PVT)), ["query", "value"],
              paths("encoder.layers.S.blocks.N", 2, 2, 2)),
    "Hiera": (lambda: tf.HieraModel(tf.HieraConfig(**HIERA)), ["qkv", "fc1"],
              paths("encoder.stages.S.layers.N", 1, 2, 3)),
    "ResNet": (lambda: tf.ResNetModel(tf.ResNetConfig(**RESNET)), ["convolution"],
               ["embedder.embedder.convolution", *paths("encoder.stages.S.layers.N", 2, 3)]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_layers_are_what_repeats(name: str) -> None:
    make, targets, layers = CASES[name]
    base = make()
    peft = get_peft_model(base, LoraConfig(r=2, target_modules=targets))
    gates = Gates(base, "layer")
    assert gates.names == layers
    assert len(Gates(base, "module").names) == len(gates.group_of) > len(layers)
    adapter = {n.replace(".default", ""): t.detach() for n, t in peft.named_parameters() if ".lora_" in n}
    of_adapter = pruned_adapters.layers(adapter)
    assert {layer.removeprefix(PEFT_PREFIX) for layer in of_adapter} == set(layers), "the same without the model"


def test_experts_in_a_list_are_not_layers() -> None:
    """Each expert is a module of its own, as in models whose experts are not one tensor."""
    experts = {f"layers.{layer}.mlp.experts.{expert}.up_proj": 8 for layer in range(3) for expert in range(4)}
    assert {LayerNames(experts).of(name) for name in experts} == {f"layers.{layer}" for layer in range(3)}
    dense_first = {name: width for name, width in experts.items() if ".0.mlp" not in name} | {"layers.0.mlp.up": 8}
    assert LayerNames(dense_first | {"layers.1.mlp.gate": 3}).of("layers.2.mlp.experts.3.up_proj") == "layers.2"


def test_layers_that_all_differ_are_layers_if_no_other_number_repeats() -> None:
    widths = {f"layers.{layer}.mlp.{part}": 8 + layer for layer in range(3) for part in ("up", "down")}
    assert {LayerNames(widths).of(name) for name in widths} == {f"layers.{layer}" for layer in range(3)}


def test_a_module_between_the_stages_is_a_layer_by_itself() -> None:
    blocks = {f"layers.{stage}.blocks.{block}.query": 8 * 2**stage for stage in range(2) for block in range(2)}
    names = LayerNames(blocks | {"layers.0.downsample.reduction": 16})
    assert names.of("layers.0.downsample.reduction") == "layers.0.downsample.reduction"
    assert names.of("layers.1.blocks.0.query") == "layers.1.blocks.0"
