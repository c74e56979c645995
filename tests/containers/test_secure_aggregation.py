"""Secure aggregation in real containers: nodes sign with their own keys, and one is killed after it has shared."""

from __future__ import annotations

import json

from tests.containers.conftest import Containers
from tests.support.tiny import Settings


def test_a_client_killed_between_shares_and_vector_costs_its_update(deployment: Containers, settings: Settings) -> None:
    """It has sent its shares when it trains, and its vector when it replies to the training."""
    unanswered = deployment.num_unanswered("client-1")
    tolerant = {"failures": "tolerant", "min-replies": 2, "round-timeout-s": 90, "num-rounds": 4}
    run = deployment.start_run("secure", settings | tolerant | {"secure-aggregation": True, "path-pairs": 0})
    deployment.kill_while_training("client-1", unanswered)
    deployment.finish(run)
    rows = [json.loads(line) for line in deployment.rounds("secure")]
    absent = [[client["client"] for client in row["missing"]] for row in rows]
    assert [1] in absent and all(clients in ([], [1]) for clients in absent)
    assert absent[-1] == [], "it came back"
    assert [row["notes"]["secure_aggregation"]["dropped"] for row in rows] == absent, "a node is one client here"
    assert not any(row["notes"]["secure_aggregation"]["refused"] for row in rows)
