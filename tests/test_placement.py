"""Cohorts of like work."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from server.placement import place


def most(work: dict[int, float], cohorts: dict[int, list[int]]) -> float:
    return max(sum(work[client] for client in clients) for clients in cohorts.values())


def test_by_hand() -> None:
    """7 and 6 open the nodes, 5 joins the 6, 4 the 7, and of 11 and 11 the first gets the 3."""
    work = {0: 3, 1: 4, 2: 5, 3: 6, 4: 7}
    everyone = range(5)
    assert place(work, {100: everyone, 200: everyone}) == {100: [0, 1, 4], 200: [2, 3]}


def test_equal_work_is_dealt_out_and_idle_nodes_get_no_message() -> None:
    assert place(dict.fromkeys(range(5), 1), {7: range(9), 3: range(9)}) == {7: [0, 2, 4], 3: [1, 3]}
    assert place({4: 1.0}, {7: range(9), 3: range(9)}) == {7: [4]}


@pytest.mark.parametrize("num_nodes", [2, 3])
def test_never_worse_than_four_thirds_of_the_best(num_nodes: int) -> None:
    """The best of all placements, tried one by one."""
    rng = np.random.default_rng(num_nodes)
    for _ in range(20):
        work = {client: float(amount) for client, amount in enumerate(rng.integers(1, 50, 7))}
        best = min(
            max(sum(work[c] for c, node in enumerate(nodes) if node == n) for n in range(num_nodes))
            for nodes in product(range(num_nodes), repeat=len(work))
        )
        cohorts = place(work, {node: range(7) for node in range(num_nodes)})
        assert sorted(client for clients in cohorts.values() for client in clients) == list(work)
        assert most(work, cohorts) <= (4 / 3 - 1 / (3 * num_nodes)) * best + 1e-9


def test_order_of_the_clients_is_irrelevant() -> None:
    work = {client: client % 4 for client in range(12)}
    hosts = {5: range(12), 6: range(12), 7: range(12)}
    assert place(dict(reversed(work.items())), hosts) == place(work, hosts)


def test_clients_stay_where_only_one_node_can_host_them() -> None:
    homes = {node: range(node, 9, 3) for node in range(3)}
    assert place({c: c for c in range(9)}, homes) == {node: list(home) for node, home in homes.items()}
