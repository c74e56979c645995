"""Client state after a round whose updates the server did not use.

A client whose update was lost has the same state as a client that was not asked. The server's control variate is the
mean of the clients' control variates, as in SCAFFOLD's paper.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from flwr.app import ArrayRecord, Error, Message

from clients.client_state import ClientStateStore
from copra_fl.adapters.server_state import ServerState
from copra_fl.aggregation.scaffold import global_control
from copra_fl.files import cache_dir
from copra_fl.records import Provenance, RecordError
from tests.support.federations import Stop, assert_equal, final_adapter, final_state, journal
from tests.support.local_grid import LocalGrid, run_federation
from tests.support.tiny import Settings
from tests.test_round_deadline import JoiningGrid

NODE, CLIENT, ROUND = 101, 1, 2
#: what comes back for a message to a node, given a function that delivers it
Answer = Callable[[Message, Callable[[Message], Message]], Message]


class LossyGrid(LocalGrid):
    """Nodes with one client each; `lose` answers for node 101 in round 2. `Stop` is raised before `stop_before`."""

    def __init__(self, lose: Answer, stop_before: int = 0, num_nodes: int = 3) -> None:
        super().__init__(num_nodes)
        self.lose, self.stop_before = lose, stop_before

    def answer(self, message: Message) -> Message:
        if message.metadata.message_type != "train":
            return super().answer(message)
        server_round = message.content["plan"]["server-round"]
        if server_round == self.stop_before:
            raise Stop
        if (message.metadata.dst_node_id, server_round) == (NODE, ROUND):
            return self.lose(message, super().answer)
        return super().answer(message)


def not_asked(message: Message, deliver: Callable[[Message], Message]) -> Message:
    return Message(Error(code=0, reason="the message was lost"), reply_to=message)


def reply_lost(message: Message, deliver: Callable[[Message], Message]) -> Message:
    assert not deliver(message).has_error()
    return Message(Error(code=0, reason="the reply was lost"), reply_to=message)


def longer(factor: float) -> Answer:
    """Return an answer with an update that is `factor` times as long."""

    def answer(message: Message, deliver: Callable[[Message], Message]) -> Message:
        reply = deliver(message)
        sent = reply.content.array_records["adapters"].to_torch_state_dict()
        scaled = {name: values * factor if values.is_floating_point() else values for name, values in sent.items()}
        reply.content["adapters"] = ArrayRecord(torch_state_dict=scaled)
        return reply

    return answer


@pytest.fixture
def settings(tiny: Settings) -> Settings:
    flat = {"num-clients": 3, "num-rounds": 4, "failures": "tolerant", "merge-gap-clients": 0, "path-pairs": 0}
    return tiny | flat | {"max-update-norm": 50.0}


KEPT: dict[str, Settings] = {
    "control variates": {"control-variates": True},
    "control variates and moments": {"control-variates": True, "optimizer-state": "client"},
    "personal tensors": {"rule": "fedsa-lora", "local-training": "lora"},
    "quantization errors": {"uplink-dtype": "int8", "optimizer-state": "client"},
}


def missing(directory: Path) -> list[list[int]]:
    return [[one["client"] for one in row["missing"]] for row in journal(directory)]


@pytest.mark.parametrize("lose", [reply_lost, longer(1000)], ids=["reply lost", "update rejected"])
@pytest.mark.parametrize("kept", KEPT)
def test_training_in_vain_leaves_the_state_of_not_training(
    settings: Settings, kept: str, lose: Answer, tmp_path: Path
) -> None:
    flat = settings | KEPT[kept]
    lossy = run_federation(flat, tmp_path / "lossy", grid=LossyGrid(lose))
    expected = run_federation(flat, tmp_path / "expected", grid=LossyGrid(not_asked))
    assert missing(lossy) == missing(expected) == [[], [CLIENT], [], []]
    assert_equal(final_adapter(lossy), final_adapter(expected))


@pytest.mark.parametrize("stop_before", [2, 3, 4])
def test_a_run_with_a_lost_reply_resumes_bitwise(settings: Settings, stop_before: int, tmp_path: Path) -> None:
    flat = settings | KEPT["control variates and moments"]
    with pytest.raises(Stop):
        run_federation(flat, tmp_path / "run", grid=LossyGrid(reply_lost, stop_before))
    resumed = run_federation(flat, tmp_path / "run", grid=LossyGrid(reply_lost))
    whole = run_federation(flat, tmp_path / "whole", grid=LossyGrid(reply_lost))
    assert_equal(final_adapter(resumed), final_adapter(whole))


@pytest.mark.parametrize(
    ("lose", "changes", "lost"),
    [
        (reply_lost, {}, [CLIENT]),
        (reply_lost, {"fraction-clients": 0.7, "seed": 2}, [CLIENT]),
        (reply_lost, {"clients-per-round": 2, "over-sample": 0.5}, [CLIENT]),
        (longer(1000), {}, [CLIENT]),
        (longer(1e30), {"max-update-norm": 0.0, "max-update-ratio": 0.0}, [0, 1, 2]),  # the new adapter is refused
    ],
    ids=["reply lost", "sampled clients", "too slow", "update rejected", "round refused"],
)
def test_the_control_variate_of_the_server_is_the_mean_of_the_clients(
    settings: Settings, lose: Answer, changes: Settings, lost: list[int], tmp_path: Path
) -> None:
    flat = settings | {"control-variates": True} | changes
    directory = run_federation(flat, tmp_path / "run", grid=LossyGrid(lose))
    assert missing(directory)[ROUND - 1] == lost
    assert_mean_control(directory)


def test_the_control_variate_of_the_server_is_the_mean_of_the_clients_after_a_node_has_joined(
    settings: Settings, tmp_path: Path
) -> None:
    """Client 2 joins before round 2; 1/N is then that of three clients for what the first two have sent before, too."""
    flat = settings | {"control-variates": True, "num-clients": 0}
    directory = run_federation(flat, tmp_path / "run", grid=JoiningGrid())
    assert [len(row["clients"]) for row in journal(directory)] == [2, 3, 3, 3]
    assert_mean_control(directory)


def assert_mean_control(directory: Path) -> None:
    """Compare the sum in the last checkpoint with the control variates of the three clients on their nodes."""
    store, state = ClientStateStore(run_id(directory)), final_state(directory)
    controls = [store.read(client, state.last_rounds[client]).control for client in range(3)]
    sent = global_control(state.control_sum, 3)
    assert all(control.keys() == sent.keys() for control in controls)
    for name, value in sent.items():
        mean = torch.stack([control[name] for control in controls]).double().mean(dim=0)
        torch.testing.assert_close(value.double(), mean, atol=1e-7, rtol=1e-5)


def run_id(directory: Path) -> str:
    return Provenance.from_json((directory / "provenance.json").read_text()).run


@pytest.mark.parametrize("damage", ["gone", "damaged"])
def test_a_state_that_is_gone_or_damaged_costs_its_own_client_only(
    settings: Settings, damage: str, tmp_path: Path
) -> None:
    """All three clients are on one node."""
    flat, directory = settings | KEPT["control variates"], tmp_path / "run"
    with pytest.raises(Stop):
        run_federation(flat, directory, grid=LossyGrid(reply_lost, stop_before=3, num_nodes=1))
    file = cache_dir() / "clients" / run_id(directory) / "client-1" / "round-00002.safetensors"
    file.unlink() if damage == "gone" else file.write_bytes(b"\0" * 100)
    run_federation(flat, directory, num_nodes=1)
    assert missing(directory) == [[], [], [CLIENT], [CLIENT]]
    reason = "client 1 after round 2 is gone" if damage == "gone" else "damaged"
    assert reason in journal(directory)[2]["missing"][0]["reason"]


def test_a_run_of_an_earlier_version_is_not_continued_without_its_clients_states(
    settings: Settings, tmp_path: Path
) -> None:
    """Its checkpoints do not say after which rounds the states are."""
    flat, directory = settings | KEPT["control variates and moments"], tmp_path / "run"
    with pytest.raises(Stop):
        run_federation(flat, directory, grid=LossyGrid(not_asked, stop_before=3))
    for path in (directory / "checkpoints").iterdir():
        state, texts = ServerState.load(path)
        replace(state, last_rounds={}).save(path, texts)
    with pytest.raises(RecordError, match="was written by another version of copra-fl and cannot be resumed"):
        run_federation(flat, directory)
