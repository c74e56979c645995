"""Several data sets in one federation: each is a task of its own on the common base, and a client has one of them.

    examples    of data set 0 | of data set 1 | ...      clients and labels likewise
    logits      (targets, all labels), -inf for labels of other data sets (`models.adapted.mask_other_datasets`)

Loss, accuracy and prediction therefore use the labels of one data set, and the gradient of all other rows of the head
is exactly 0. `aggregation.heads` aggregates these rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from copra_fl.tasks import Examples


@dataclass(frozen=True)
class DatasetRanges:
    """The labels, examples and clients of one of several data sets.

    Attributes:
        name: name of the data set (`tables.dataset_name`).
        labels: its rows of the head.
        examples: its indices into all examples.
        clients: its clients.
    """

    name: str
    labels: range
    examples: range
    clients: range

    def among(self, indices: np.ndarray) -> np.ndarray:
        """Return those of `indices` that belong to this data set."""
        return indices[(indices >= self.examples.start) & (indices < self.examples.stop)]


def split_evenly(total: int, parts: int) -> list[int]:
    """Split `total` into `parts` sizes that differ by at most 1; the first ones get the remainder.

    >>> split_evenly(5, 2)
    [3, 2]
    """
    return [total // parts + (part < total % parts) for part in range(parts)]


def consecutive_ranges(sizes: Sequence[int]) -> list[range]:
    """Return ranges of these sizes, each starting where the previous one ends.

    >>> consecutive_ranges([3, 2])
    [range(0, 3), range(3, 5)]
    """
    ends = np.cumsum(sizes).tolist()
    return [range(end - size, end) for end, size in zip(ends, sizes, strict=True)]


@dataclass(frozen=True)
class MultiDatasetExamples:
    """`Examples` of several data sets, with one label each.

    Attributes:
        examples: the examples of all data sets; ``labels`` are indices into the list of all labels.
        outputs: (L, L) bool: row l marks the labels of the data set that label l belongs to.
    """

    examples: Examples
    outputs: Tensor

    @classmethod
    def of(cls, examples: Examples, labels: Sequence[range]) -> MultiDatasetExamples:
        """Return `examples` of data sets with these ranges of labels."""
        blocks = [torch.ones(len(dataset_labels), len(dataset_labels)) for dataset_labels in labels]
        return cls(examples, torch.block_diag(*blocks).bool())

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
        """Return the batch of `examples`, and ``outputs`` (B, L) bool: the labels of each example's data set."""
        batch = self.examples.batch(indices, device)
        return batch | {"outputs": self.outputs.to(device)[batch["labels"]]}
