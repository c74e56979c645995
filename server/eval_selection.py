"""Selection of what the server evaluates in a round, made before the round so that only the needed adapters travel.

With a personal rule the server evaluates nothing itself, because the shared part is no whole model.

Each selection is drawn from its own stream among the clients of the round. Selected clients that fail are not replaced.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import TypeVar

from copra_fl.aggregation import find_rule, pools
from copra_fl.config import Config
from copra_fl.seeding import generator

Item = TypeVar("Item")

#: pairs are drawn from all pairs of so many clients, because the number of pairs grows with the square
MAX_PAIRED = 1000


def is_evaluated(config: Config, server_round: int) -> bool:
    """Return whether the server evaluates after this round: every eval-every rounds, and after the last round."""
    if find_rule(config.aggregation.rule).personal:
        return False
    return server_round % config.evaluation.eval_every == 0 or server_round == config.federation.num_rounds


def merge_gap_clients(config: Config, server_round: int, clients: Sequence[int]) -> list[int]:
    """Return those of `clients` whose own adapters are evaluated for the merge gap."""
    if not (config.data.dataset and is_evaluated(config, server_round)):
        return []
    number, seed = config.evaluation.merge_gap_clients, config.federation.seed
    return _draw(clients, number, seed, "merge-gap", server_round)


def path_pairs(config: Config, clients: Sequence[int]) -> list[tuple[int, int]]:
    """Return pairs of `clients` whose connecting line is evaluated after the run's last round."""
    if not config.data.dataset or find_rule(config.aggregation.rule).personal:
        return []
    number, seed = config.evaluation.path_pairs, config.federation.seed
    if len(clients) > MAX_PAIRED:
        clients = _draw(clients, MAX_PAIRED, seed, "paths", "clients")
    return _draw(list(combinations(clients, 2)), number, seed, "paths")


def evaluating_clients(config: Config, clients: Iterable[int]) -> list[int]:
    """Return those of the `clients` with validation examples that evaluate the global adapter on them, sorted.

    They are the same at each evaluation of a run, so that differences between rounds are not those of the draw.
    """
    number, seed = config.evaluation.client_eval_clients, config.federation.seed
    return _draw(sorted(clients), number, seed, "client-eval") if number else sorted(clients)


def inspected_clients(config: Config, server_round: int, clients: Sequence[int]) -> set[int]:
    """Return those of `clients` whose own adapters the server needs: all of them if nodes do not pool.

    If they pool, those on lines are among them in the last of num-rounds only: an early end is not known in advance.
    """
    if not pools(config):
        return set(clients)
    is_last = server_round == config.federation.num_rounds
    in_pairs = {client for pair in path_pairs(config, clients) for client in pair} if is_last else set()
    return in_pairs.union(merge_gap_clients(config, server_round, clients))


def _draw(items: Sequence[Item], number: int, seed: int, *stream: str | int) -> list[Item]:
    """Draw at most `number` of `items` from a stream, and return them in their order."""
    chosen = generator(seed, *stream).permutation(len(items))[:number]
    return [items[index] for index in sorted(chosen)]
