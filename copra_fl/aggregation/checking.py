"""Checks of an update before it is averaged.

A node checks each of its clients, so that a diverged client does not spoil the pooled update. The server checks
everything that it receives.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

import torch

from copra_fl.adapters.state import Adapter, Update, difference, norm, trained
from copra_fl.aggregation.grams import templates

#: names of the metrics that clients report
METRICS = {"loss", "steps", "seconds", "distance", "flops"}
#: those of them that say nothing of the examples but their number, and how long they took
COUNTS = {"steps", "seconds"}
#: names of the metrics that clients report with some settings only
OPTIONAL_METRICS = {"memory"}
#: updates that `outliers` needs
MIN_FOR_MEDIAN = 3
#: largest number that a client may report, so that sums over clients stay finite; seconds since the Big Bang: 4e17
MAX_METRIC = 1e24


class BadUpdate(ValueError):
    """An update that must not be averaged. The message names the client and the reason."""


@dataclass(frozen=True)
class Expected:
    """Known properties of a client's update before it arrives.

    Attributes:
        num_groups: number of gate groups of the model.
        num_examples: number of training examples that the client reported at the start of the run.
        num_steps: number of optimizer steps of the client in a round.
        max_norm: largest accepted norm of the change; 0: no limit.
        has_loss: whether the client reports its training loss.
    """

    num_groups: int
    num_examples: int
    num_steps: int
    max_norm: float = 0.0
    has_loss: bool = True


def check_update(update: Update, start: Adapter, group_of: Mapping[str, int], expected: Expected) -> None:
    """Raise BadUpdate unless a client with the properties `expected` can have trained `update` from `start`."""
    check_scalars(update, expected)
    check_tensors(update, start, group_of, expected.max_norm)


def check_scalars(update: Update, expected: Expected) -> None:
    """Check everything but the tensors, as `check_update` does."""
    who, num_groups = f"client {update.client}", expected.num_groups
    if update.num_examples <= 0 or update.num_examples != expected.num_examples:
        raise BadUpdate(f"{who} claims {update.num_examples} examples; at the start it had {expected.num_examples}")
    if len(update.active_steps) != num_groups or min(update.active_steps, default=0) < 0:
        raise BadUpdate(f"{who} has active steps {update.active_steps}, not {num_groups} counts, one per gate group")
    if not all(steps <= expected.num_steps for steps in update.active_steps):
        raise BadUpdate(
            f"{who} claims {max(update.active_steps)} active steps of a layer; a round has {expected.num_steps} steps"
        )
    if not math.isfinite(update.metrics.get("loss", math.nan if expected.has_loss else 0.0)):
        raise BadUpdate(f"{who} has a training loss of {update.metrics.get('loss')}, which is not finite")
    if unknown := sorted(update.metrics.keys() - METRICS - OPTIONAL_METRICS):
        raise BadUpdate(f"{who} reports {', '.join(unknown[:3])}; known are {', '.join(sorted(METRICS))}")
    for name, value in sorted(update.metrics.items()):
        if not (math.isfinite(value) and abs(value) <= MAX_METRIC):
            raise BadUpdate(f"{who} reports {name} = {value}, which is not finite or far too large")
        if name != "loss" and value < 0:
            raise BadUpdate(f"{who} reports {name} = {value}, which is below 0")


def check_tensors(update: Update, start: Adapter, group_of: Mapping[str, int], max_norm: float = 0.0) -> None:
    """Check the tensors, as `check_update` does; the active steps must have passed `check_scalars`."""
    who = f"client {update.client}"
    expected = trained(start, update.active_steps, group_of)
    if update.adapter.keys() != expected.keys():
        unknown, missing = sorted(update.adapter.keys() - expected), sorted(expected.keys() - update.adapter)
        raise BadUpdate(f"{who}: tensors {missing[:3]} are missing and {unknown[:3]} are not known or not trained")
    for name, tensor in expected.items():
        sent = update.adapter[name]
        if sent.shape != tensor.shape or sent.dtype != tensor.dtype:
            raise BadUpdate(
                f"{who}: {name} is {sent.dtype} of shape {tuple(sent.shape)}, not {tensor.dtype} of "
                f"{tuple(tensor.shape)}"
            )
        if not torch.isfinite(sent).all():
            raise BadUpdate(f"{who}: {name} has values that are not finite; a lower learning rate may help")
    distance = norm(difference(update.adapter, expected)) if max_norm else 0.0
    if distance > max_norm:
        raise BadUpdate(f"{who} has moved by {distance:.4g}, more than max-update-norm = {max_norm:g}")


def outliers(norms: Mapping[int, float], factor: float) -> dict[int, float]:
    """Return client -> its norm in medians of all `norms`, for those above `factor`.

    Fewer than three say nothing about each other; `factor` 0: none.
    """
    if not factor or len(norms) < MIN_FOR_MEDIAN:
        return {}
    middle = median(norms.values())
    return {client: length / middle for client, length in norms.items() if middle and length > factor * middle}


def check_moments(update: Update) -> None:
    """Raise BadUpdate for a second moment below 0, whose root the next optimizer step would take."""
    for name, tensor in update.optimizer.get("exp_avg_sq", {}).items():
        if (tensor < 0).any():
            raise BadUpdate(f"client {update.client}: the second moment of {name} has negative values")


def check_grams(update: Update, start: Adapter, group_of: Mapping[str, int]) -> None:
    """Raise BadUpdate unless there is a Gram matrix for each B that the client trained, and no other.

    A Gram matrix is symmetric, and its eigenvalues are at least 0, up to the rounding of float32.
    """
    who = f"client {update.client}"
    expected = trained(templates(start), update.active_steps, group_of)
    if update.grams.keys() != expected.keys():
        unknown, missing = sorted(update.grams.keys() - expected), sorted(expected.keys() - update.grams)
        raise BadUpdate(f"{who}: Gram matrices for {missing[:3]} are missing and {unknown[:3]} are not known")
    for name, template in expected.items():
        gram = update.grams[name]
        if gram.shape != template.shape or gram.dtype != template.dtype:
            raise BadUpdate(f"{who}: the Gram matrix for {name} is {gram.dtype} of shape {tuple(gram.shape)}")
        if not torch.isfinite(gram).all():
            raise BadUpdate(f"{who}: the Gram matrix for {name} has values that are not finite")
        if not torch.equal(gram, gram.T):
            raise BadUpdate(f"{who}: the Gram matrix for {name} is not symmetric")
        eigenvalues = torch.linalg.eigvalsh(gram.double())
        if eigenvalues[0] < -1e-5 * eigenvalues.abs().max():
            raise BadUpdate(f"{who}: the Gram matrix for {name} has the eigenvalue {float(eigenvalues[0]):.4g} below 0")
