"""One adapter out of several by PEFT's `add_weighted_adapter`; heads are averaged.

PEFT multiplies each side of a factor merge by the root of a weight, so that "linear" with weights p_i is n times the
average for n adapters of p_i = 1/n. Here weights are p_i² where factors are summed and p_i where products are:

    factors     A = sum_i p_i A_i, B = sum_i p_i B_i        what federated averaging does
    products    B A = sum_i p_i B_i A_i                     exact at rank sum r_i (cat), best rank r of it (svd)

TIES takes the mean of the entries that agree in sign after trimming, so all weigh 1 there; task arithmetic adds
`scale` times each product.
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
class Merge:
    """A way to merge.

    Attributes:
        kind: PEFT's ``combination_type``.
        weigh: what each adapter weighs: its share, or the same for all.
        of_factors: whether factors are merged apart, which takes adapters of one rank.
    """

    kind: str
    weigh: Literal["share", "one", "scale"]
    of_factors: bool = False


MERGES = {
    "average of factors": Merge("linear", "share", of_factors=True),
    "average of products": Merge("cat", "share"),
    "average of products, best rank r": Merge("svd", "share"),
    "task arithmetic": Merge("cat", "scale"),
    "TIES of factors": Merge("ties", "one", of_factors=True),
    "TIES of products": Merge("ties_svd", "one"),
    "DARE of factors": Merge("dare_linear", "share", of_factors=True),
    "DARE of products": Merge("dare_linear_svd", "share"),
    "DARE and TIES of products": Merge("dare_ties_svd", "one"),
}


def merge(
    adapters: Sequence[Adapter], how: Merge, shares: Sequence[float], scale: float, density: float, seed: int
) -> Adapter:
    """The adapters, each plain with scaling 1 and a head, as one such adapter.

    `shares` sum to 1. `density` is what TIES and DARE keep of each adapter; DARE draws from `seed`'s ``merge`` stream.
    """
    model: Any = _model(adapters)
    weights = {"share": list(shares), "one": [1.0] * len(adapters), "scale": [scale] * len(adapters)}[how.weigh]
    if how.of_factors:
        weights = [weight**2 for weight in weights]
    names = [str(number) for number in range(len(adapters))]
    with torch_stream(torch.device("cpu"), seed, "merge"):
        model.add_weighted_adapter(
            names, weights, "merged", combination_type=how.kind, density=density, svd_full_matrices=False
        )
    merged = combine([parts(adapter, {"head"}) for adapter in adapters], shares)
    for module in modules(adapters[0]):
        layer = model.base_model.model.get_submodule(_flat(module))
        merged[a_of(module)] = layer.lora_A["merged"].weight.detach().clone()
        merged[b_of(module)] = layer.lora_B["merged"].weight.detach().clone()
    return merged


def _model(adapters: Sequence[Adapter]) -> PeftModel:
    """A PEFT model that is nothing but the adapted modules, their base weights empty, with the adapters 0, 1, ..."""
    root, names = nn.Module(), modules(adapters[0])
    for module in names:
        k, d = adapters[0][a_of(module)].shape[1], adapters[0][b_of(module)].shape[0]
        root.add_module(_flat(module), skip_init(nn.Linear, k, d, bias=False))
    ranks = [len(adapter[a_of(names[0])]) for adapter in adapters]
    targets = [_flat(module) for module in names]
    configs = [LoraConfig(r=rank, lora_alpha=rank, target_modules=targets) for rank in ranks]
    model: Any = get_peft_model(root, configs[0], "0")
    for number, config in enumerate(configs[1:], 1):
        model.add_adapter(str(number), config)
    for number, adapter in enumerate(adapters):
        for module in names:
            layer = model.base_model.model.get_submodule(_flat(module))
            layer.lora_A[str(number)].weight.data = adapter[a_of(module)]
            layer.lora_B[str(number)].weight.data = adapter[b_of(module)]
    return model


def _flat(module: str) -> str:
    """A module's name as that of a child."""
    return module.replace(".", "/")
