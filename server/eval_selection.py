"""Whose own adapters the server looks at, decided before a round so that only those travel.

With a personal rule it looks at none, and evaluates nothing itself: what is shared is no whole model.

Every choice is drawn from its own stream among the clients of the round. Those that then
fail are not replaced.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

from copra_fl.aggregation import find_rule, pools
from copra_fl.config import Config
from copra_fl.seeding import generator


def evaluated(config: Config, server_round: int) -> bool:
    """Whether the server evaluates after this round: every eval-every rounds and after the last."""
    if find_rule(config.aggregation.rule).personal:
        return False
    return server_round % config.evaluation.eval_every == 0 or server_round == config.federation.num_rounds


def merge_gap_clients(config: Config, server_round: int, clients: Sequence[int]) -> list[int]:
    """Those of `clients` whose own adapters are evaluated for the merge gap."""
    if not (config.data.dataset and evaluated(config, server_round)):
        return []
    number, seed = config.evaluation.merge_gap_clients, config.federation.seed
    return _draw(clients, number, seed, "merge-gap", server_round)


def path_pairs(config: Config, server_round: int, clients: Sequence[int]) -> list[tuple[int, int]]:
    """Pairs of `clients` whose connecting line is evaluated; only after the last round."""
    is_last = server_round == config.federation.num_rounds
    if not (config.data.dataset and is_last) or find_rule(config.aggregation.rule).personal:
        return []
    pairs = list(combinations(clients, 2))
    return _draw(pairs, config.evaluation.path_pairs, config.federation.seed, "paths")


def kept_clients(config: Config, server_round: int, clients: Sequence[int]) -> set[int]:
    """Those of `clients` whose own adapters must reach the server: all of them where nodes do not pool."""
    if not pools(config):
        return set(clients)
    in_pairs = {client for pair in path_pairs(config, server_round, clients) for client in pair}
    return in_pairs.union(merge_gap_clients(config, server_round, clients))


def _draw(items: Sequence[Any], number: int, seed: int, *names: str | int) -> list[Any]:
    """At most `number` of `items`, in their order, drawn from the stream `names`."""
    chosen = generator(seed, *names).permutation(len(items))[:number]
    return [items[index] for index in sorted(chosen)]
