"""Settings of a run that stay the same in all rounds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from copra_fl.adapters.state import Adapter
from copra_fl.aggregation import find_rule
from copra_fl.aggregation.rule import Rule
from copra_fl.config import Config
from copra_fl.data.multi import DatasetRanges

#: (adapters, residual) -> metrics of each adapter on W0 + residual, on the server's validation data
Validate = Callable[[Sequence[Adapter], Adapter], Sequence[Mapping[str, float]]]


@dataclass(frozen=True)
class RunContext:
    """Settings of a run that stay the same in all rounds.

    Attributes:
        run: id of the run; nodes store their caches and their clients' states under it.
        directory: the run's folder.
        config: the configuration; dtype, attention, labels and number of clients are resolved.
        group_of: adapter tensor name -> index of its gate group; the head's tensors have none.
        num_groups: number of gate groups.
        score: evaluates adapters for rules that need it.
        datasets: the data sets, if there are several.
    """

    run: str
    directory: Path
    config: Config
    group_of: Mapping[str, int]
    num_groups: int
    score: Validate
    datasets: Sequence[DatasetRanges] = ()

    @property
    def rule(self) -> Rule:
        return find_rule(self.config.aggregation.rule)

    @property
    def head_sizes(self) -> list[int]:
        """Rows of the head of each data set; empty with one data set."""
        return [len(dataset.labels) for dataset in self.datasets]
