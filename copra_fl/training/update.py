"""Build the update that a client sends after local training."""

from __future__ import annotations

from collections.abc import Mapping

from copra_fl.adapters.core import fold_scales
from copra_fl.adapters.state import Adapter, OptimizerState, Update, parts, trained
from copra_fl.training.batches import LocalSteps
from copra_fl.training.plan import Plan


def make_update(
    plan: Plan,
    steps: LocalSteps,
    adapter: Adapter,
    gradients: Adapter,
    optimizer: OptimizerState,
    group_of: Mapping[str, int],
    num_examples: int,
    metrics: dict[str, float],
    grams: Adapter,
) -> Update:
    """Return the client's update: the trained tensors of `adapter` whose gate groups were on, with its metrics.

    Scales of a core are folded into its blocks. `gradients` are summed over the steps; empty without control variates.
    `optimizer` is the state of the local optimizer, empty where none is kept. `grams` are empty unless the plan asks
    for them.
    """
    active_steps = tuple(steps.masks.sum(0).tolist())
    sent = trained(parts(fold_scales(adapter), plan.trained_parts), active_steps, group_of)
    steps_on = {name: active_steps[group_of[name]] if name in group_of else len(steps) for name in sent}
    mean = {name: gradients[name] / number for name, number in steps_on.items() if gradients}
    metrics = metrics | {"steps": float(len(steps))}
    return Update(steps.client, sent, num_examples, active_steps, metrics, mean, optimizer, grams)
