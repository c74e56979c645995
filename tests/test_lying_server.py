"""Servers that send nodes what other servers would not, to read the update of node 0 in the sum of three nodes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from clients import handlers
from server.errors import FederationError
from tests.support.federations import assert_equal, final_adapter
from tests.support.local_grid import LocalGrid, run_federation
from tests.support.secure import node_configs_with_peers
from tests.support.tiny import Settings

SECURE = {"secure-aggregation": True, "updates": "pooled", "merge-gap-clients": 0, "path-pairs": 0,
          "max-update-ratio": 0.0, "local-steps": 2, "num-clients": 3, "num-rounds": 1,
          "failures": "tolerant"}  # fmt: skip


@pytest.fixture
def peers(tmp_path: Path) -> list[dict[str, str | int]]:
    """Configs of three nodes that know each other's keys, with a policy that asks for secure aggregation."""
    (tmp_path / "policy.toml").write_text('protection = "secure"\n')
    policy = {"policy-path": str(tmp_path / "policy.toml")}
    return [config | policy for config in node_configs_with_peers(tmp_path, 3)]


class LyingServer(LocalGrid):
    """Changes what all nodes but the first are told in training messages."""

    def __init__(self, configs: list[dict[str, str | int]], lie: Callable[[RecordDict], None]) -> None:
        super().__init__(len(configs), node_configs=configs)
        self.lie = lie

    def answer(self, message: Message) -> Message:
        if message.metadata.message_type == "train" and message.metadata.dst_node_id != 100:
            self.lie(message.content)
        return super().answer(message)


def no_clients(content: RecordDict) -> None:
    content["plan"]["clients"] = []


def tiny_steps(content: RecordDict) -> None:
    content["plan"]["learning-rate"] = content["plan"]["head-learning-rate"] = 1e-30


def other_threshold(content: RecordDict) -> None:
    content["plan"]["secure-threshold"] = 0.9


@pytest.mark.parametrize(
    ("lie", "reason"),
    [
        (no_clients, r"the list of nodes has clients \[1\] for this node, the plan \[\]"),
        (tiny_steps, "the plan has another configuration than the list of nodes"),
        (other_threshold, "the list of nodes has a threshold of 0.666667, the configuration 0.9"),
    ],
)
def test_no_plan_for_the_others_singles_out_a_node(
    lie: Callable[[RecordDict], None], reason: str, tiny: Settings, peers: list[dict[str, str | int]], tmp_path: Path
) -> None:
    with pytest.raises(FederationError, match=reason):
        run_federation(tiny | SECURE, tmp_path / "run", grid=LyingServer(peers, lie))


def test_a_scale_of_the_servers_choice_has_no_effect(tiny: Settings, tmp_path: Path) -> None:
    """With it, all values of the nodes but one were rounded to 0, and the sum was the update of that one."""
    (tmp_path / "policy.toml").write_text('protection = "secure"\nmin-nodes = 5\nmin-secure-threshold = 1.0\n')
    policy = {"policy-path": str(tmp_path / "policy.toml")}
    configs = [config | policy for config in node_configs_with_peers(tmp_path, 5)]
    settings = tiny | SECURE | {"num-clients": 5, "secure-threshold": 1.0}

    def tiny_scale(content: RecordDict) -> None:
        content["secure-scale"] = ConfigRecord({"scale": 2.0**-900})

    honest = run_federation(settings, tmp_path / "honest", grid=LocalGrid(5, node_configs=configs))
    lied_to = run_federation(settings, tmp_path / "lied-to", grid=LyingServer(configs, tiny_scale))
    assert_equal(final_adapter(lied_to), final_adapter(honest))


def test_a_policy_of_secure_sums_refuses_a_run_whose_noise_it_does_not_ask_for(
    tiny: Settings, peers: list[dict[str, str | int]], tmp_path: Path
) -> None:
    """In a private run nodes without clients take part: with hardly any noise the sum would be one node's update."""
    private = {"dp-clip": 1.0, "dp-noise-multiplier": 0.001, "weighting": "equal", "failures": "strict"}
    with pytest.raises(FederationError, match="protection = 'secure' does not ask for noise"):
        run_federation(tiny | SECURE | private, tmp_path / "run", grid=LocalGrid(3, node_configs=peers))


def test_a_policy_limits_how_few_nodes_a_server_takes_into_a_round(
    tiny: Settings, peers: list[dict[str, str | int]], tmp_path: Path
) -> None:
    (tmp_path / "policy.toml").write_text('protection = "secure"\nmin-nodes = 4\n')
    with pytest.raises(FederationError, match="client policy: 3 nodes are in the round, fewer than min-nodes = 4"):
        run_federation(tiny | SECURE, tmp_path / "run", grid=LocalGrid(3, node_configs=peers))


def test_nodes_without_an_update_are_not_in_a_sum(
    tiny: Settings, peers: list[dict[str, str | int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clients of two of three nodes fail: otherwise the sum would be the update of the third."""
    trained = handlers._train_clients

    def diverging(node: handlers.NodeConfig, plan: handlers.Plan, *rest: object) -> object:
        return trained(node, plan, *rest) if node.partition == 0 else ([], dict.fromkeys(plan.clients, "it diverged"))

    monkeypatch.setattr(handlers, "_train_clients", diverging)
    with pytest.raises(FederationError, match=r"1 of 3 nodes have sent a vector.*client 1: it diverged; client 2: "):
        run_federation(tiny | SECURE, tmp_path / "run", grid=LocalGrid(3, node_configs=peers))
