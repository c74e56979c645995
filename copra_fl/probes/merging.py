"""Merge several adapters into one with PEFT's `add_weighted_adapter`; heads are averaged.

PEFT multiplies each side of a factor merge by the root of a weight, so that "linear" with weights p_i is n times the
average for n adapters of p_i = 1/n. Here weights are p_i² where factors are summed and p_i where products are:

    factors     A = sum_i p_i A_i, B = sum_i p_i B_i        as in federated averaging
    products    B A = sum_i p_i B_i A_i                     exact at rank sum r_i (cat), or the best rank r of it (svd)

Task arithmetic (Ilharco et al., arXiv 2212.04089) adds `scale` times each product. TIES (Yadav et al.,
arXiv 2306.01708) takes the mean of the entries that agree in sign after trimming, so each adapter has weight 1. DARE
(Yu et al., arXiv 2311.03099) drops entries at random and rescales the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn.utils import skip_init

from copra_fl.adapters.interpolation import combine
from copra_fl.adapters.state import Adapter, parts
from copra_fl.aggregation.products import a_of, b_of, modules
from copra_fl.seeding import torch_stream


@dataclass(frozen=True)
class MergeMethod:
    """A method to merge adapters.

    Attributes:
        kind: PEFT's ``combination_type``.
        weighting: the weight of each adapter: its share p_i, 1, or `scale`.
        of_factors: A and B are merged separately, which requires adapters of one rank.
    """

    kind: str
    weighting: Literal["share", "one", "scale"]
    of_factors: bool = False


MERGE_METHODS = {
    "average of factors": MergeMethod("linear", "share", of_factors=True),
    "average of products": MergeMethod("cat", "share"),
    "average of products, best rank r": MergeMethod("svd", "share"),
    "task arithmetic": MergeMethod("cat", "scale"),
    "TIES of factors": MergeMethod("ties", "one", of_factors=True),
    "TIES of products": MergeMethod("ties_svd", "one"),
    "DARE of factors": MergeMethod("dare_linear", "share", of_factors=True),
    "DARE of products": MergeMethod("dare_linear_svd", "share"),
    "DARE and TIES of products": MergeMethod("dare_ties_svd", "one"),
}


def merge(
    adapters: Sequence[Adapter],
    method: MergeMethod,
    shares: Sequence[float],
    scale: float,
    density: float,
    seed: int,
) -> Adapter:
    """Merge plain adapters (scaling 1, with head) into one plain adapter.

    `shares` are the p_i and sum to 1. `density` is the share of each adapter's entries that TIES and DARE keep. DARE
    draws from the ``merge`` stream of `seed`.
    """
    model: Any = _peft_model(adapters)
    equal = {"one": 1.0, "scale": scale}
    weights = list(shares) if method.weighting == "share" else [equal[method.weighting]] * len(adapters)
    if method.of_factors:
        weights = [weight**2 for weight in weights]
    names = [str(number) for number in range(len(adapters))]
    with torch_stream(torch.device("cpu"), seed, "merge"):
        model.add_weighted_adapter(
            names, weights, "merged", combination_type=method.kind, density=density, svd_full_matrices=False
        )
    merged = combine([parts(adapter, {"head"}) for adapter in adapters], shares)
    for module in modules(adapters[0]):
        layer = model.base_model.model.get_submodule(_child_name(module))
        merged[a_of(module)] = layer.lora_A["merged"].weight.detach().clone()
        merged[b_of(module)] = layer.lora_B["merged"].weight.detach().clone()
    return merged


def _peft_model(adapters: Sequence[Adapter]) -> PeftModel:
    """Return a PEFT model of the adapted modules only, without base weights, with the adapters named 0, 1, ..."""
    root, names = nn.Module(), modules(adapters[0])
    for module in names:
        k, d = adapters[0][a_of(module)].shape[1], adapters[0][b_of(module)].shape[0]
        root.add_module(_child_name(module), skip_init(nn.Linear, k, d, bias=False))
    ranks = [len(adapter[a_of(names[0])]) for adapter in adapters]
    targets = [_child_name(module) for module in names]
    configs = [LoraConfig(r=rank, lora_alpha=rank, target_modules=targets) for rank in ranks]
    model: Any = get_peft_model(root, configs[0], "0")
    for number, config in enumerate(configs[1:], 1):
        model.add_adapter(str(number), config)
    for number, adapter in enumerate(adapters):
        for module in names:
            layer = model.base_model.model.get_submodule(_child_name(module))
            layer.lora_A[str(number)].weight.data = adapter[a_of(module)]
            layer.lora_B[str(number)].weight.data = adapter[b_of(module)]
    return model


def _child_name(module: str) -> str:
    """Return a module's name without dots, as a direct child of the model must be named."""
    return module.replace(".", "/")
