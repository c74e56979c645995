"""Placement of clients on nodes: cohorts of similar work."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from server.placement import place

NINE = set(range(9))


def largest_load(work: dict[int, float], cohorts: dict[int, list[int]]) -> float:
    return max(sum(work[client] for client in clients) for clients in cohorts.values())


def test_by_hand() -> None:
    """7 goes to node 100, 6 to node 200; 5 joins the 6, 4 joins the 7; both nodes have 11, so the first gets the 3."""
    work = {0: 3, 1: 4, 2: 5, 3: 6, 4: 7}
    clients = set(range(5))
    assert place(work, {100: clients, 200: clients}) == {100: [0, 1, 4], 200: [2, 3]}


def test_equal_work_is_split_evenly_and_idle_nodes_are_left_out() -> None:
    assert place(dict.fromkeys(range(5), 1), {7: NINE, 3: NINE}) == {7: [0, 2, 4], 3: [1, 3]}
    assert place({4: 1.0}, {7: NINE, 3: NINE}) == {7: [4]}


@pytest.mark.parametrize("num_nodes", [2, 3])
def test_the_largest_load_is_at_most_four_thirds_of_the_best_placement(num_nodes: int) -> None:
    """The best placement is found by trying all."""
    rng = np.random.default_rng(num_nodes)
    for _ in range(20):
        work = {client: float(amount) for client, amount in enumerate(rng.integers(1, 50, 7))}
        best = min(
            max(sum(work[client] for client, node in enumerate(nodes) if node == n) for n in range(num_nodes))
            for nodes in product(range(num_nodes), repeat=len(work))
        )
        cohorts = place(work, {node: set(range(7)) for node in range(num_nodes)})
        assert sorted(client for clients in cohorts.values() for client in clients) == list(work)
        assert largest_load(work, cohorts) <= (4 / 3 - 1 / (3 * num_nodes)) * best + 1e-9


def test_the_order_of_the_clients_is_irrelevant() -> None:
    work = {client: client % 4 for client in range(12)}
    hosts = dict.fromkeys((5, 6, 7), set(range(12)))
    assert place(dict(reversed(work.items())), hosts) == place(work, hosts)


def test_a_client_that_one_node_alone_can_host_goes_there() -> None:
    hosts = {node: set(range(node, 9, 3)) for node in range(3)}
    assert place({client: client for client in range(9)}, hosts) == {node: sorted(hosts[node]) for node in hosts}
