"""What an update must be before it is averaged.

A node checks each of its clients, so that one that diverged does not spoil the pooled update;
the server checks whatever arrives.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from copra_fl.adapter import Adapter, Update, trained


class BadUpdate(ValueError):
    """An update that must not be averaged, with the reason."""


def check_update(
    update: Update, global_adapter: Adapter, group_of: Mapping[str, int], num_groups: int, num_examples: int
) -> None:
    """Raise BadUpdate unless `update` is what a client of `num_examples` examples can have trained."""
    check_scalars(update, num_groups, num_examples)
    check_tensors(update, global_adapter, group_of)


def check_scalars(update: Update, num_groups: int, num_examples: int) -> None:
    """`check_update` of all but the tensors."""
    who = f"client {update.client}"
    if update.num_examples <= 0 or update.num_examples != num_examples:
        raise BadUpdate(f"{who} claims {update.num_examples} examples; at the start it had {num_examples}")
    if len(update.active_steps) != num_groups or min(update.active_steps, default=0) < 0:
        raise BadUpdate(f"{who} has active steps {update.active_steps}, not {num_groups} counts, one per gate group")
    if not math.isfinite(update.metrics.get("loss", math.nan)):
        raise BadUpdate(f"{who} has a training loss of {update.metrics.get('loss')}")


def check_tensors(update: Update, global_adapter: Adapter, group_of: Mapping[str, int]) -> None:
    """`check_update` of the tensors alone; their active steps are taken to be good."""
    who = f"client {update.client}"
    expected = trained(global_adapter, update.active_steps, group_of)
    if update.adapter.keys() != expected.keys():
        unknown, missing = sorted(update.adapter.keys() - expected), sorted(expected.keys() - update.adapter)
        raise BadUpdate(f"{who}: tensors {missing[:3]} are missing and {unknown[:3]} are not known or not trained")
    for name, tensor in expected.items():
        got = update.adapter[name]
        if got.shape != tensor.shape or got.dtype != tensor.dtype:
            raise BadUpdate(
                f"{who}: {name} is {got.dtype} of shape {tuple(got.shape)}, not {tensor.dtype} of {tuple(tensor.shape)}"
            )
        if not torch.isfinite(got).all():
            raise BadUpdate(f"{who}: {name} has values that are not finite; a lower learning rate may help")
