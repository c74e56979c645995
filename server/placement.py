"""Placement of clients on nodes: longest processing time first (Graham 1969, SIAM J. Appl. Math. 17).

A round ends with its slowest node. If every node can host every client, the most loaded node has at most 4/3 of the
work that it would have in the best placement.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet


def place(work: Mapping[int, float], hosts: Mapping[int, AbstractSet[int]]) -> dict[int, list[int]]:
    """Return node -> its clients, sorted; nodes without clients are left out.

    Clients are taken by decreasing work, ties by number. Each goes to the least loaded node that can host it, ties to
    the first.

    Args:
        work: client -> its work; each client can be hosted by at least one node.
        hosts: node -> the clients that it can host.
    """
    loads = dict.fromkeys(hosts, 0.0)
    cohorts: dict[int, list[int]] = {node: [] for node in hosts}
    nodes_of: dict[int, list[int]] = {client: [] for client in work}
    for node, hosted in hosts.items():
        for client in hosted & work.keys():
            nodes_of[client].append(node)
    for client in sorted(work, key=lambda client: (-work[client], client)):
        node = min(nodes_of[client], key=loads.__getitem__)
        loads[node] += work[client]
        cohorts[node].append(client)
    return {node: sorted(clients) for node, clients in cohorts.items() if clients}
