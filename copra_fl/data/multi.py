"""Several data sets in one federation: each is learnt as a task of its own, on one base; a client has one of them.

    examples    those of data set 0 | of data set 1 | ...      and clients and labels in the same order
    logits      (targets, all labels), -inf where a label is not of the example's data set (`models.own_outputs`)

So loss, accuracy and prediction look at the labels of one data set, and on all other rows of the head the gradient is
exactly 0. What the server makes of the rows is in `aggregation.heads`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from copra_fl.tasks import Examples


@dataclass(frozen=True)
class DataSet:
    """One of several.

    Attributes:
        name: what it is called (`tables.called`).
        labels: its rows of the head.
        examples: its indices among all examples.
        clients: those that have it.
    """

    name: str
    labels: range
    examples: range
    clients: range

    def among(self, indices: np.ndarray) -> np.ndarray:
        """Those of `indices` that are of this data set."""
        return indices[(indices >= self.examples.start) & (indices < self.examples.stop)]


def deal(num_clients: int, number: int) -> list[int]:
    """How many clients each of `number` data sets gets: as many as another, the first ones one more."""
    return [num_clients // number + (place < num_clients % number) for place in range(number)]


def in_turn(sizes: Sequence[int]) -> list[range]:
    """Ranges of these sizes, one after the other."""
    ends = np.cumsum(sizes).tolist()
    return [range(end - size, end) for end, size in zip(ends, sizes, strict=True)]


@dataclass(frozen=True)
class JoinedExamples:
    """`Examples` of several data sets, with one label each.

    Attributes:
        examples: all of them, ``labels`` being places in the list of all labels.
        outputs: (L, L) bool: the labels of the data set that each label is of.
    """

    examples: Examples
    outputs: Tensor

    @classmethod
    def of(cls, examples: Examples, labels: Sequence[range]) -> JoinedExamples:
        """`labels` are those of each data set."""
        return cls(examples, torch.block_diag(*(torch.ones(len(own), len(own)) for own in labels)).bool())

    @property
    def lengths(self) -> np.ndarray:
        return self.examples.lengths

    @property
    def num_targets(self) -> np.ndarray:
        return self.examples.num_targets

    @property
    def max_length(self) -> int:
        return self.examples.max_length

    def __len__(self) -> int:
        return len(self.examples)

    def batch(self, indices: np.ndarray, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """As of `examples`, and ``outputs`` (B, L) bool: the labels of each example's own data set."""
        batch = self.examples.batch(indices, device)
        return batch | {"outputs": self.outputs.to(device)[batch["labels"]]}
