"""A head with labels of several data sets: its rows of a data set are of that data set's clients alone.

    head.weight (L, D)    <->    head.weight[0] (L_0, D), head.weight[1] (L_1, D), ...    and the bias likewise

A client's gradient on the rows of other data sets is 0: averaged over all clients they would move too little. So rules
get the head in parts, and of each update the parts of its client's data set alone (`weighting`); adapters are averaged
over all clients, as ever. With one data set the head is whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from copra_fl.adapters.interpolation import combine
from copra_fl.adapters.state import Adapter, part_of


def is_part(name: str) -> bool:
    """Whether `name` is that of a part of a head's tensor."""
    return name.endswith("]")


def split(adapter: Mapping[str, Tensor], sizes: Sequence[int]) -> Adapter:
    """`adapter` with its head in parts: views of `sizes` rows each, one a data set. Without `sizes` it is whole."""
    parts: Adapter = {}
    for name, tensor in adapter.items():
        if sizes and part_of(name) == "head":
            parts |= {f"{name}[{number}]": part for number, part in enumerate(tensor.split(list(sizes)))}
        else:
            parts[name] = tensor
    return parts


def join(adapter: Mapping[str, Tensor]) -> Adapter:
    """The inverse of `split`."""
    whole: dict[str, list[Tensor]] = {}
    for name, tensor in adapter.items():
        whole.setdefault(name.partition("[")[0], []).append(tensor)
    return {name: parts[0] if len(parts) == 1 else torch.cat(parts) for name, parts in whole.items()}


def without_others(adapter: Mapping[str, Tensor], number: int) -> Adapter:
    """`adapter`, in parts, without those of the head that are not of data set `number`."""
    return {name: part for name, part in adapter.items() if not is_part(name) or name.endswith(f"[{number}]")}


def lend(
    adapters: Sequence[Adapter], numbers: Sequence[int | None], weights: Sequence[float], sizes: Sequence[int]
) -> list[Adapter]:
    """The `adapters` of clients, where each one's head has for other data sets what their clients here have.

    `numbers` are the clients' data sets. Of several clients it is their average by `weights`; rows that nobody here has
    trained stay as they are. So a weighted average of what comes out has for each data set its own clients' average.
    """
    split_up = [split(adapter, sizes) for adapter in adapters]
    for number in dict.fromkeys(numbers) if sizes else ():
        lenders = [member for member, own in enumerate(numbers) if own == number]
        total = sum(weights[member] for member in lenders)
        shares = [weights[member] / total for member in lenders]
        lent = combine([_only(split_up[member], number) for member in lenders], shares)
        split_up = [
            adapter if own == number else adapter | lent for adapter, own in zip(split_up, numbers, strict=True)
        ]
    return [join(adapter) for adapter in split_up]


def _only(adapter: Adapter, number: int | None) -> Adapter:
    return {name: part for name, part in adapter.items() if name.endswith(f"[{number}]")}
