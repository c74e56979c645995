"""The head with labels of several data sets: the rows of a data set are trained by that data set's clients alone.

    head.weight (L, D)    <->    head.weight[0] (L_0, D), head.weight[1] (L_1, D), ...    and the bias likewise

A client's gradient on the rows of other data sets is 0, so averaged over all clients these rows would move too little.
Rules therefore get the head in parts, and of each update only the parts of its client's data set (`weighting`); the
adapters are averaged over all clients. With one data set the head is not split.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from copra_fl.adapters.interpolation import combine
from copra_fl.adapters.state import Adapter, part_of


def is_part(name: str) -> bool:
    """Return whether `name` is the name of a part of a head's tensor."""
    return name.endswith("]")


def split(adapter: Mapping[str, Tensor], sizes: Sequence[int]) -> Adapter:
    """Return `adapter` with its head in parts: views of `sizes` rows, one per data set. Without `sizes` do nothing."""
    parts: Adapter = {}
    for name, tensor in adapter.items():
        if sizes and part_of(name) == "head":
            parts |= {f"{name}[{dataset}]": part for dataset, part in enumerate(tensor.split(list(sizes)))}
        else:
            parts[name] = tensor
    return parts


def join(adapter: Mapping[str, Tensor]) -> Adapter:
    """Return `adapter` with its head in one piece: the inverse of `split`."""
    parts_of: dict[str, list[Tensor]] = {}
    for name, tensor in adapter.items():
        parts_of.setdefault(name.partition("[")[0], []).append(tensor)
    return {name: parts[0] if len(parts) == 1 else torch.cat(parts) for name, parts in parts_of.items()}


def without_others(adapter: Mapping[str, Tensor], dataset: int) -> Adapter:
    """Return `adapter`, with its head in parts, without the parts of other data sets than number `dataset`."""
    return {name: part for name, part in adapter.items() if not is_part(name) or name.endswith(f"[{dataset}]")}


def lend(
    adapters: Sequence[Adapter], datasets: Sequence[int | None], weights: Sequence[float], sizes: Sequence[int]
) -> list[Adapter]:
    """Replace, in each adapter's head, the rows of other data sets by those that their clients in `adapters` trained.

    Rows of a data set with several clients are their average by `weights`; rows of a data set without clients stay
    unchanged. A weighted average of the result has the average of each data set's own clients in that data set's rows.

    Args:
        adapters: the clients' adapters.
        datasets: the number of each client's data set.
        weights: the weight of each client.
        sizes: number of rows of each data set in the head; empty with one data set.
    """
    lent_adapters = [split(adapter, sizes) for adapter in adapters]
    for dataset in dict.fromkeys(datasets) if sizes else ():
        lenders = [member for member, number in enumerate(datasets) if number == dataset]
        total = sum(weights[member] for member in lenders)
        shares = [weights[member] / total for member in lenders]
        lent = combine([_only(lent_adapters[member], dataset) for member in lenders], shares)
        lent_adapters = [
            adapter if number == dataset else adapter | lent
            for adapter, number in zip(lent_adapters, datasets, strict=True)
        ]
    return [join(adapter) for adapter in lent_adapters]


def _only(adapter: Adapter, dataset: int | None) -> Adapter:
    return {name: part for name, part in adapter.items() if name.endswith(f"[{dataset}]")}
