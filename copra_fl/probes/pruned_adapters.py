"""Pruned adapters: what is left when layers, modules or small values are taken away.

A module is off when its B is zero: then so is its product B A, and adapters of any pruning can be evaluated stacked.
After CoTo (arXiv 2506.05713), which keeps every other layer, thirds of the layers, or large values only.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from copra_fl.adapters.state import Adapter, by_number, part_of, parts
from copra_fl.copra.gates import group_name

#: shares of the adapter's values that are set to zero
SPARSITIES = tuple(tenth / 10 for tenth in range(1, 10))


@dataclass(frozen=True)
class Pruned:
    """
    Attributes:
        family: how it was pruned: ``ends``, ``layers``, ``module``, ``Shapley order`` or ``magnitude``.
        name: what is kept.
        kept: share of the values of A, B and R that are kept; the head always is and does not count.
    """

    family: str
    name: str
    adapter: Adapter
    kept: float


def modules(adapter: Adapter) -> list[str]:
    """The adapted modules, blocks in the order of their numbers."""
    return sorted((name.partition(".lora_B")[0] for name in parts(adapter, {"B"})), key=by_number)


def layers(adapter: Adapter) -> dict[str, list[str]]:
    """Layer -> its modules, in order; a module outside the blocks is a layer of its own."""
    found: dict[str, list[str]] = {}
    for module in modules(adapter):
        found.setdefault(group_name(module, "layer"), []).append(module)
    return found


def kind(module: str) -> str:
    """Which of its layer's modules it is.

    >>> kind("base_model.model.encoder.layer.3.attention.self.query")
    'attention.self.query'
    """
    return module.removeprefix(f"{group_name(module, 'layer')}.")


def keep(adapter: Adapter, kept: Collection[str]) -> Adapter:
    """`adapter` with only the modules `kept` on: the B of all others is zero."""
    off = {f"{module}.lora_B.weight" for module in modules(adapter) if module not in kept}
    return {name: torch.zeros_like(tensor) if name in off else tensor for name, tensor in adapter.items()}


def by_magnitude(adapter: Adapter, sparsity: float) -> Adapter:
    """`adapter` with this share of its values, those smallest in magnitude over all of A, B and R, set to zero.

    The number is exact: of equal values the first go.
    """
    factors = parts(adapter, "ABR")
    values = torch.cat([tensor.flatten() for tensor in factors.values()])
    smallest = values.abs().argsort(stable=True)[: round(sparsity * len(values))]
    values[smallest] = 0
    rows = values.split([tensor.numel() for tensor in factors.values()])
    return adapter | {name: row.view(factors[name].shape) for name, row in zip(factors, rows, strict=True)}


def ends(adapter: Adapter) -> Iterator[Pruned]:
    """Nothing and everything pruned."""
    yield Pruned("ends", "everything", dict(adapter), 1.0)
    yield Pruned("ends", "head alone", keep(adapter, ()), 0.0)


def layer_sets(adapter: Adapter) -> Iterator[Pruned]:
    """Every other layer, and each third of the layers."""
    names = list(layers(adapter))
    low, middle, high = (list(third) for third in np.array_split(names, 3))
    sets = {
        "every other layer": names[::2],
        "every other layer, from the second": names[1::2],
        "low third": low,
        "middle third": middle,
        "high third": high,
    }
    for name, chosen in sets.items():
        if chosen:
            yield _with_layers(adapter, "layers", name, chosen)


def single_modules(adapter: Adapter) -> Iterator[Pruned]:
    """Only one of the target modules, in all layers; nothing where there is but one."""
    kinds: dict[str, list[str]] = {}
    for module in modules(adapter):
        kinds.setdefault(kind(module), []).append(module)
    if len(kinds) > 1:
        for name, chosen in kinds.items():
            yield Pruned("module", f"{name} alone", keep(adapter, chosen), _share(adapter, chosen))


def in_order(adapter: Adapter, values: Mapping[str, float]) -> Iterator[Pruned]:
    """The layers of the largest `values` (layer -> Shapley value), from all but one down to one."""
    best = sorted(values, key=lambda layer: -values[layer])
    for count in range(len(best) - 1, 0, -1):
        name = f"{count} {'layer' if count == 1 else 'layers'} of the largest value"
        yield _with_layers(adapter, "Shapley order", name, best[:count])


def magnitudes(adapter: Adapter) -> Iterator[Pruned]:
    """The largest values over the whole adapter, from 90 % of them to 10 %."""
    for sparsity in SPARSITIES:
        yield Pruned("magnitude", f"largest {1 - sparsity:.0%}", by_magnitude(adapter, sparsity), 1 - sparsity)


def _with_layers(adapter: Adapter, family: str, name: str, chosen: Sequence[str]) -> Pruned:
    by_layer = layers(adapter)
    kept = [module for layer in chosen for module in by_layer[layer]]
    return Pruned(family, name, keep(adapter, kept), _share(adapter, kept))


def _share(adapter: Adapter, kept: Collection[str]) -> float:
    """The share of the values of A, B and R that belong to the modules `kept`."""
    sizes = {name: tensor.numel() for name, tensor in adapter.items() if part_of(name) != "head"}
    return sum(size for name, size in sizes.items() if name.partition(".lora_")[0] in kept) / sum(sizes.values())
