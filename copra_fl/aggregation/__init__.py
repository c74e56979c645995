"""Aggregation rules: updates in, next global adapter out. One file a rule.

To add a rule, write its file and name it in `RULES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from copra_fl.adapter import Adapter, Update
from copra_fl.aggregation.fedavg import fedavg
from copra_fl.config import ConfigError, unknown

#: (global adapter, updates, weighting, gate group of each tensor) -> next global adapter
Rule = Callable[[Adapter, Sequence[Update], str, Mapping[str, int]], Adapter]

RULES: dict[str, Rule] = {"fedavg": fedavg}


def find_rule(name: str) -> Rule:
    """The rule of that name. Raises ConfigError with the names there are."""
    if name not in RULES:
        raise ConfigError(unknown("rule", name, RULES))
    return RULES[name]
