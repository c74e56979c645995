"""Aggregation: from the clients' updates to the next global adapter, in pure functions.

`rules` has one file per rule; docs/aggregation.md says where each comes from and when to use it. To add a rule, write
its file and add it to `rules.RULES`. `compatibility` has the one table of settings that do not combine.
"""

from copra_fl.aggregation.pooling import pools
from copra_fl.aggregation.ranks import client_ranks
from copra_fl.aggregation.rule import ALL, Rule
from copra_fl.aggregation.rules import RULES, find_rule

__all__ = ["ALL", "RULES", "Rule", "client_ranks", "find_rule", "pools"]
