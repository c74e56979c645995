"""Interface of an aggregation rule: a pure function of a round, and its requirements on clients, transport and base.

Each file of `copra_fl.aggregation.rules` ends in ``RULE = Rule(...)`` and is the one place for that rule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from copra_fl.adapters.state import Adapter, Update, complete
from copra_fl.aggregation.weighting import tensor_weights
from copra_fl.config import AggregationConfig, Key, keys_of

#: adapters -> their metrics on the server's validation data, at least ``loss`` and ``accuracy``
Score = Callable[[Sequence[Adapter]], Sequence[Mapping[str, float]]]


@dataclass(frozen=True)
class NoParameters:
    """The parameters of a rule without parameters."""


@dataclass(frozen=True)
class Round:
    """The inputs of a rule in one round.

    Attributes:
        before: the global adapter from which the clients started. With own starts or stale clients
            (`aggregation.starts`) a client's whole adapter is in its update, in place of the tensors that it trained.
        updates: the clients' updates, sorted by client. All have the rank and scaling of `before`; adapters of smaller
            rank are padded with zeros.
        group_of: adapter tensor -> index of its gate group; the head's tensors are not in it.
        scaling: s in W0 + s B A.
        settings: section ``aggregation`` of the run's configuration.
        ranks: client -> rank of its adapter before padding.
        fresh: return newly drawn factors (A random, B = 0, no head), different in each round.
        score: return metrics of adapters on W0 as it was before the round.
        parameters: an instance of the rule's `Rule.parameters`.
    """

    before: Adapter
    updates: Sequence[Update]
    group_of: Mapping[str, int]
    scaling: float
    settings: AggregationConfig
    ranks: Mapping[int, int]
    fresh: Callable[[], Adapter]
    score: Score
    parameters: Any = NoParameters()

    def __post_init__(self) -> None:
        object.__setattr__(self, "updates", sorted(self.updates, key=lambda update: update.client))

    @cached_property
    def adapters(self) -> list[Adapter]:
        """Each client's complete adapter after its training."""
        return [complete(update, self.before) for update in self.updates]

    def weights(self, name: str) -> np.ndarray:
        """Return (clients,) float64 weights of the tensor `name`: they sum to 1, or are 0 if no client trained it."""
        return tensor_weights(name, self.updates, self.settings.weighting, self.group_of)


@dataclass(frozen=True)
class Outcome:
    """The result of a rule in one round.

    Attributes:
        adapter: the next global adapter.
        residual: addition to W0 (`copra_fl.adapters.residual`).
        notes: plain data for the journal.
    """

    adapter: Adapter
    residual: Adapter = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)


ALL = frozenset({"A", "B", "R", "m", "head"})


def train_all(server_round: int) -> frozenset[str]:
    """Return all parts of the model, in every round."""
    return ALL


@dataclass(frozen=True)
class Rule:
    """An aggregation rule and its requirements.

    Attributes:
        name: value of the configuration key ``rule``.
        aggregate: the rule as a function.
        parameters: dataclass of the rule's own parameters, declared with `config.option`.
        trains: server round -> parts (`adapters.state.part_of`) that clients train; all others stay bitwise unchanged
            in local training. The scales S of a core never travel: a client folds them into R.
        refactor: (adapter, modules) -> the adapter with other factors of the same products in these modules; None if
            factors keep their meaning. `aggregate` calls it after its average, the server after a private average.
        shares: parts that travel. Trained parts that do not travel are personal: they stay with the client, and there
            is no global model.
        core: B and A are fixed, and a matrix R between them is trained (`adapters.core`). ``gradient``: their values
            come from the first gradient on the server's data, ``orthogonal``: they are random; empty: no core.
        grams: clients that train B but not A also send a Gram matrix per module (`aggregation.grams`).
        linear: the pooled update of several clients (`pooling.pool`) has the same effect as their individual updates.
        changes_base: W0 changes, so that there is a residual.
        unequal_ranks: the clients' adapters may have different ranks.
        averages: the next adapter is an average of the clients' adapters, so a server optimizer can treat its change
            as a gradient step.
        keeps_factors: the clients' factors keep their meaning from round to round, so that moments of an earlier round
            fit them: the rule neither draws nor recomputes them.
        takes_magnitudes: DoRA's magnitudes can be aggregated like every other tensor, because the rule does not compute
            products B A.
        needs_data: the server needs validation data.
        no_copra: the reason why the rule does not combine with CopRA; empty if it does.
        no_several_datasets: the reason why it does not combine with several data sets; empty if it does.
    """

    name: str
    aggregate: Callable[[Round], Outcome]
    parameters: type = NoParameters
    trains: Callable[[int], frozenset[str]] = train_all
    shares: frozenset[str] = ALL
    refactor: Callable[[Adapter, Sequence[str]], Adapter] | None = None
    core: str = ""
    grams: bool = False
    linear: bool = False
    changes_base: bool = False
    unequal_ranks: bool = False
    averages: bool = True
    keeps_factors: bool = True
    takes_magnitudes: bool = False
    needs_data: bool = False
    no_copra: str = ""
    no_several_datasets: str = ""

    @cached_property
    def keys(self) -> dict[str, Key]:
        """The configuration keys of the rule's parameters, RULE.KEY, by name."""
        return keys_of(self.name, self.parameters, prefix=f"{self.name}.")

    def sends(self, server_round: int) -> frozenset[str]:
        """Return the parts that clients send to the server in a round."""
        return self.trains(server_round) & self.shares

    def sends_grams(self, server_round: int) -> bool:
        """Return whether clients send Gram matrices in a round."""
        return self.grams and "A" not in self.trains(server_round)

    def changes(self, server_round: int) -> frozenset[str]:
        """Return the shared parts that differ after a round: those that clients send, and refactored ones."""
        return self.sends(server_round) | (frozenset("AB") if self.refactor else frozenset())

    @property
    def personal(self) -> bool:
        """True if a part of each client's model stays with the client."""
        return self.shares < ALL

    @property
    def nodes_cache_state(self) -> bool:
        """True if a part of the model is unchanged after a round, so that nodes should cache the server's state."""
        return self.changes_base or any(self.changes(server_round) < ALL for server_round in (1, 2))
