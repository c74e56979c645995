"""What an aggregation rule is: a pure function of a round, and what it asks of everybody else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from copra_fl.adapters.state import Adapter, Update, complete
from copra_fl.aggregation.weighting import tensor_weights
from copra_fl.config import AggregationConfig

#: adapters -> their metrics on the server's validation data, at least ``loss`` and ``accuracy``
Score = Callable[[Sequence[Adapter]], Sequence[Mapping[str, float]]]


@dataclass(frozen=True)
class Round:
    """What a rule may look at.

    Attributes:
        before: the global adapter that the clients started from.
        updates: sorted by client, in whatever order they come; all of the rank and scaling of `before`, a smaller
            adapter padded with zeros.
        group_of: gate group of each adapter tensor; the head's have none.
        scaling: s in W0 + s B A.
        settings: of the run.
        ranks: client -> rank of its adapter, before padding.
        fresh: a newly drawn adapter (B = 0), another one in each round; without the head.
        score: metrics of adapters on W0 as it is before the round.
    """

    before: Adapter
    updates: Sequence[Update]
    group_of: Mapping[str, int]
    scaling: float
    settings: AggregationConfig
    ranks: Mapping[int, int]
    fresh: Callable[[], Adapter]
    score: Score

    def __post_init__(self) -> None:
        object.__setattr__(self, "updates", sorted(self.updates, key=lambda update: update.client))

    @cached_property
    def adapters(self) -> list[Adapter]:
        """Each client's whole adapter after its training."""
        return [complete(update, self.before) for update in self.updates]

    def weights(self, name: str) -> np.ndarray:
        """(clients,) float64: what each client's tensor `name` weighs; sums to 1, or is 0 where nobody trained it."""
        return tensor_weights(name, self.updates, self.settings.weighting, self.group_of)


@dataclass(frozen=True)
class Outcome:
    """What a rule makes of a round.

    Attributes:
        adapter: the next global adapter.
        residual: what is added to W0, see `copra_fl.adapters.residual`.
        notes: for the journal, plain data.
    """

    adapter: Adapter
    residual: Adapter = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)


ALL = frozenset({"A", "B", "R", "head"})


def train_all(server_round: int) -> frozenset[str]:
    return ALL


@dataclass(frozen=True)
class Rule:
    """An aggregation rule and what it asks of everybody else.

    Attributes:
        aggregate: the rule itself.
        trains: round -> parts (`adapter.part_of`) that clients train; the others stay as they are, bit by bit.
        shares: parts that travel. What clients train besides is personal: it stays with them, and there is no
            global model.
        core: whether B and A are fixed by a first gradient, and an r x r matrix R between them is trained.
        linear: whether the pooled update of some clients (`pooling.pool`) does as much as their own updates.
        changes_base: whether W0 is changed, so that there is a residual.
        unequal_ranks: whether clients' adapters may have different ranks.
        averages: whether the next adapter is an average of the clients', which a server optimiser can take as a step.
        needs_data: whether the server must have data to evaluate or to start on.
        no_copra: why it does not combine with CopRA; empty where it does.
    """

    aggregate: Callable[[Round], Outcome]
    trains: Callable[[int], frozenset[str]] = train_all
    shares: frozenset[str] = ALL
    core: bool = False
    linear: bool = False
    changes_base: bool = False
    unequal_ranks: bool = False
    averages: bool = True
    needs_data: bool = False
    no_copra: str = ""

    def sends(self, server_round: int) -> frozenset[str]:
        """The parts that travel to the server in a round."""
        return self.trains(server_round) & self.shares

    @property
    def personal(self) -> bool:
        """Whether a part of each client's model stays with the client."""
        return self.shares < ALL

    @property
    def nodes_cache_state(self) -> bool:
        """Whether nodes should cache the server's state between rounds: a part of it does not change in each round."""
        return self.personal or self.changes_base or any(self.trains(server_round) < ALL for server_round in (1, 2))
