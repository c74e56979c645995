"""Prune adapters: switch off layers or modules, or set small values to zero.

A module is switched off by B = 0, so that B A = 0 and the adapters of all prunings have the same shapes and can be
evaluated together. The prunings are those of CoTo (arXiv 2506.05713): every other layer, thirds of the layers, large
values only.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from copra_fl.adapters.state import Adapter, by_number, part_of, parts
from copra_fl.aggregation import products
from copra_fl.copra.layer_names import LayerNames
from copra_fl.probes.open_run import rank_of

#: shares of the adapter's values that magnitude pruning sets to zero
SPARSITIES = tuple(tenth / 10 for tenth in range(1, 10))
#: shares of the layers, and of the rank, that the elastic score averages over (`probes.elastic`)
SHARES = (1.0, 0.75, 0.5, 0.25)


@dataclass(frozen=True)
class Pruned:
    """A pruned adapter. Its head is always kept.

    Attributes:
        family: the kind of pruning: ``ends``, ``layers``, ``module``, ``Shapley order``, ``magnitude``,
            ``rank as stored`` or ``rank in SVD order``.
        name: the part that is kept.
        kept: share of the values of A, B and R that are kept; the head does not count.
    """

    family: str
    name: str
    adapter: Adapter
    kept: float


def adapted_modules(adapter: Adapter) -> list[str]:
    """Return the adapted modules, blocks in the order of their numbers."""
    return sorted((name.partition(".lora_B")[0] for name in parts(adapter, {"B"})), key=by_number)


def layers(adapter: Adapter) -> dict[str, list[str]]:
    """Return the modules of each layer, in order; a module outside the blocks is a layer by itself."""
    modules_by_layer: dict[str, list[str]] = {}
    names = LayerNames({name.partition(".lora_B")[0]: len(tensor) for name, tensor in parts(adapter, {"B"}).items()})
    for module in adapted_modules(adapter):
        modules_by_layer.setdefault(names.of(module), []).append(module)
    return modules_by_layer


def kind(module: str, layer: str) -> str:
    """Return the name of a module within its `layer`.

    >>> kind("encoder.layer.3.attention.self.query", "encoder.layer.3")
    'attention.self.query'
    """
    return module.removeprefix(f"{layer}.")


def keep(adapter: Adapter, kept: Collection[str]) -> Adapter:
    """Return `adapter` with only the modules `kept` active: B of all others is zero."""
    off = {f"{module}.lora_B.weight" for module in adapted_modules(adapter) if module not in kept}
    return {name: torch.zeros_like(tensor) if name in off else tensor for name, tensor in adapter.items()}


def by_magnitude(adapter: Adapter, sparsity: float) -> Adapter:
    """Set a share `sparsity` of an adapter's values to zero: the smallest in magnitude over all of A, B and R.

    The number of zeros is exact: among equal values the first ones are set to zero.
    """
    factors = parts(adapter, "ABR")
    values = torch.cat([tensor.flatten() for tensor in factors.values()])
    smallest = values.abs().argsort(stable=True)[: round(sparsity * len(values))]
    values[smallest] = 0
    rows = values.split([tensor.numel() for tensor in factors.values()])
    return adapter | {name: row.view(factors[name].shape) for name, row in zip(factors, rows, strict=True)}


def size_of(share: float, number: int) -> int:
    """Return the number of parts that make up a `share` of `number` parts: rounded, at least 1."""
    return max(1, round(share * number))


def first_components(adapter: Adapter, size: int) -> Adapter:
    """Return `adapter` with only the first `size` components of each module, as stored: other columns of B are 0."""
    pruned = dict(adapter)
    for name, tensor in parts(adapter, "B").items():
        pruned[name] = tensor.clone()
        pruned[name][:, size:] = 0
    return pruned


def largest_components(adapter: Adapter, size: int) -> Adapter:
    """Return `adapter` with the `size` largest singular values of each module's B A (B R A), in the same shapes."""
    pruned, rank = dict(adapter), rank_of(adapter)
    for module in products.modules(adapter):
        b, a = products.best_rank(products.factors(adapter, module, scaling=1.0), size)
        pruned[products.b_of(module)] = F.pad(b, (0, rank - size)).float()
        pruned[products.a_of(module)] = F.pad(a, (0, 0, 0, rank - size)).float()
    identities = {
        name: torch.eye(blocks.shape[1]).repeat(rank // blocks.shape[1], 1)
        for name, blocks in parts(adapter, "R").items()
    }
    return pruned | identities


def ends(adapter: Adapter) -> Iterator[Pruned]:
    """Yield the adapter unpruned, and without any module."""
    yield Pruned("ends", "whole adapter", dict(adapter), 1.0)
    yield Pruned("ends", "head only", keep(adapter, ()), 0.0)


def layer_sets(adapter: Adapter) -> Iterator[Pruned]:
    """Yield the adapter with every other layer, and with each third of the layers; empty sets are left out."""
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
    """Yield the adapter with one of its target modules, in all layers; nothing if it has only one."""
    kinds: dict[str, list[str]] = {}
    for layer, modules in layers(adapter).items():
        for module in modules:
            kinds.setdefault(kind(module, layer), []).append(module)
    if len(kinds) > 1:
        for name, chosen in kinds.items():
            yield Pruned("module", f"{name} only", keep(adapter, chosen), _share(adapter, chosen))


def in_order(adapter: Adapter, values: Mapping[str, float]) -> Iterator[Pruned]:
    """Yield the adapter with its layers of largest `values` (layer -> Shapley value), from all but one down to one."""
    best = sorted(values, key=lambda layer: -values[layer])
    for count in range(len(best) - 1, 0, -1):
        name = f"{count} {'layer' if count == 1 else 'layers'} of largest value"
        yield _with_layers(adapter, "Shapley order", name, best[:count])


def magnitudes(adapter: Adapter) -> Iterator[Pruned]:
    """Yield the adapter with its largest values in magnitude, from 90 % of them down to 10 %."""
    for sparsity in SPARSITIES:
        kept = 1 - sparsity
        yield Pruned("magnitude", f"largest {100 * kept:.0f} %", by_magnitude(adapter, sparsity), kept)


def rank_prefixes(adapter: Adapter) -> Iterator[Pruned]:
    """Yield the adapter with the shares `SHARES` of its rank, as stored and in SVD order, without the whole rank."""
    rank = rank_of(adapter)
    for size in dict.fromkeys(size_of(share, rank) for share in SHARES):
        if size < rank:
            name, kept = f"first {size} of {rank} components", size / rank
            yield Pruned("rank as stored", f"{name}, as stored", first_components(adapter, size), kept)
            yield Pruned("rank in SVD order", f"{name}, SVD order", largest_components(adapter, size), kept)


def _with_layers(adapter: Adapter, family: str, name: str, chosen: Sequence[str]) -> Pruned:
    by_layer = layers(adapter)
    kept = [module for layer in chosen for module in by_layer[layer]]
    return Pruned(family, name, keep(adapter, kept), _share(adapter, kept))


def _share(adapter: Adapter, kept: Collection[str]) -> float:
    """Return the share of the values of A, B and R that belong to the modules `kept`."""
    sizes = {name: tensor.numel() for name, tensor in adapter.items() if part_of(name) != "head"}
    return sum(size for name, size in sizes.items() if name.partition(".lora_")[0] in kept) / sum(sizes.values())
