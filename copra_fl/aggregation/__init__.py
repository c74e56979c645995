"""Aggregation rules: updates in, next global adapter out. One file a rule.

To add a rule, write its file and name it in `RULES`; if it is linear in the updates, in `LINEAR` too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from copra_fl.adapter import Adapter, Update
from copra_fl.aggregation.fedavg import fedavg
from copra_fl.config import ConfigError, FederationConfig, unknown

#: (global adapter, updates, weighting, gate group of each tensor) -> next global adapter
Rule = Callable[[Adapter, Sequence[Update], str, Mapping[str, int]], Adapter]

RULES: dict[str, Rule] = {"fedavg": fedavg}

#: rules for which the pooled update of some clients (`pooling.pool`) does as much as their own updates
LINEAR = {"fedavg"}


def find_rule(name: str) -> Rule:
    """The rule of that name. Raises ConfigError with the names there are."""
    if name not in RULES:
        raise ConfigError(unknown("rule", name, RULES))
    return RULES[name]


def pools(federation: FederationConfig) -> bool:
    """Whether nodes may send a pooled update in place of their clients' own."""
    return federation.replies == "pooled" and federation.rule in LINEAR and federation.uplink == "float32"
