"""Secure aggregation in real containers: nodes sign with their own keys, and one is killed after it has shared."""

from __future__ import annotations

import json
import subprocess

from tests.containers.conftest import ENGINE, Containers
from tests.support.tiny import Settings

SECURE = {"secure-aggregation": True, "updates": "pooled", "merge-gap-clients": 0, "path-pairs": 0,
          "max-update-ratio": 0.0}  # fmt: skip


def num_sent(deployment: Containers, service: str, message_type: str) -> int:
    """Return the number of replies of one type in the log of a client's container."""
    assert ENGINE is not None
    command = [ENGINE, "logs", deployment.container(service)]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    return (ran.stdout + ran.stderr).count(f"Sending: {message_type} message")


def test_a_client_killed_between_shares_and_vector_costs_its_update(deployment: Containers, settings: Settings) -> None:
    before = num_sent(deployment, "client-1", "query.shares")
    tolerant = {"failures": "tolerant", "min-replies": 2, "round-timeout-s": 90, "num-rounds": 4}
    run = deployment.start_run("secure", settings | tolerant | SECURE)
    deployment.wait(lambda: num_sent(deployment, "client-1", "query.shares") > before, "client-1 has sent its shares")
    deployment.kill("client-1")
    deployment.finish(run)
    rows = [json.loads(line) for line in deployment.rounds("secure")]
    absent = [[client["client"] for client in row["missing"]] for row in rows]
    assert [1] in absent and all(clients in ([], [1]) for clients in absent)
    assert absent[-1] == [], "it came back"
    assert [row["notes"]["secure_aggregation"]["dropped"] for row in rows] == absent, "a node is one client here"
