"""The server's strategy: sampling, messages for cohorts, and invalid replies."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Error, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from copra_fl import wire
from copra_fl.adapters.compression import encode
from copra_fl.adapters.server_state import ServerState
from copra_fl.aggregation.pooling import pool
from copra_fl.config import Config
from server.errors import FederationError
from server.eval_selection import inspected_clients, merge_gap_clients, path_pairs
from server.placement import place
from server.round_request import RoundRequest
from server.run_context import RunContext
from server.sampling import eligible, sample
from server.strategy import CohortStrategy
from tests.support.updates import GLOBAL, GROUP_OF, VALID


def make_strategy(**changes: object) -> CohortStrategy:
    """20 clients on 2 nodes, 12 examples each; client 3 has none."""
    handshakes = {}
    for node in range(2):
        counts = {client: 0 if client == 3 else 12 for client in range(node, 20, 2)}
        handshakes[100 + node] = wire.Handshake(node, "", 20, counts, dict.fromkeys(counts, 1), [])
    keys = {key.replace("_", "-"): value for key, value in changes.items()}
    config = Config.from_flat({"num-clients": 20, "updates": "pooled", "rank": 2, **keys})
    run = RunContext("run", Path(), config, GROUP_OF, 2, score=lambda adapters, residual: [])
    return CohortStrategy(run, handshakes, ServerState(GLOBAL))


def make_request(strategy: CohortStrategy, clients: list[int], inspected: set[int]) -> RoundRequest:
    """A request to train `clients` in round 1."""
    return RoundRequest(
        1,
        place(dict.fromkeys(clients, 1), strategy.hosts),
        num_wanted=len(clients),
        inspected=frozenset(inspected),
        starts=dict.fromkeys(clients, GLOBAL),
    )


@pytest.fixture(autouse=True)
def identity() -> None:
    """Flower's messages need the id of a run and a node."""
    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1


def replies_to(strategy: CohortStrategy, request: RoundRequest) -> list[Message]:
    """The nodes' replies if every client has trained to `VALID`."""
    replies = []
    for message in strategy.messages(request, 0, "train"):
        plan = wire.unpack_plan(message.content)
        updates = [replace(VALID, client=client) for client in plan.clients]
        inspected = [update for update in updates if update.client in plan.inspected]
        others = [update for update in updates if update.client not in plan.inspected]
        buffers = {"adapters": encode(inspected, request.starts, GROUP_OF, "float32")} if inspected else {}
        if others:
            pooled = pool(GLOBAL, others, "examples", GROUP_OF)
            buffers["pooled"] = encode([pooled], request.starts, GROUP_OF, "float32")
        content = wire.echo(message.content, wire.pack_updates(updates, buffers, {}))
        replies.append(Message(content, reply_to=message))
    return replies


def test_sampling_is_seeded_and_leaves_out_clients_without_data() -> None:
    clients = eligible({client: 0 if client == 3 else 12 for client in range(20)})
    assert clients == [client for client in range(20) if client != 3]

    def rounds(**changes: object) -> list[list[int]]:
        config = Config.from_flat({key.replace("_", "-"): value for key, value in changes.items()})
        return [sample(config, clients, server_round) for server_round in range(1, 40)]

    fifths = rounds(fraction_clients=0.2)
    assert {len(chosen) for chosen in fifths} == {4}  # a fifth of 19
    assert fifths == rounds(fraction_clients=0.2)
    assert fifths != rounds(fraction_clients=0.2, seed=1)
    assert {client for chosen in fifths for client in chosen} == set(clients)
    assert {len(chosen) for chosen in rounds(clients_per_round=7)} == {7}
    assert rounds()[0] == clients


def test_a_private_sample_does_not_follow_from_the_seed() -> None:
    """Poisson sampling: each client by itself, so that the size varies around the 5 wanted of 20."""
    config = Config.from_flat({"dp-clip": 1.0, "weighting": "equal", "clients-per-round": 5})
    samples = [sample(config, range(20), server_round=1) for _ in range(2000)]
    sizes = [len(chosen) for chosen in samples]
    assert len(set(sizes)) > 3 and np.mean(sizes) == pytest.approx(5, abs=0.3), "7 standard errors"
    assert len(set(map(tuple, samples))) > 1000


def test_nodes_whose_clients_cannot_train_stop_the_run() -> None:
    """Odd clients, on the second node, are too shallow; client 3, the deep one, has no examples."""
    depths = ",".join("3" if client == 3 or client % 2 == 0 else "1" for client in range(20))
    strategy = make_strategy(client_depths=depths, min_depth=3, updates="individual")
    assert strategy.eligible == list(range(0, 20, 2))
    counts = dict.fromkeys(range(1, 20, 2), 12) | {3: 0}
    with pytest.raises(FederationError, match="none of the 10 clients on the connected nodes can train"):
        strategy.set_nodes({101: wire.Handshake(1, "", 20, counts, dict.fromkeys(counts, 1), [])})


def test_each_node_gets_one_message_with_its_cohort() -> None:
    strategy = make_strategy()
    messages = strategy.messages(make_request(strategy, [0, 1, 2, 7], inspected={2, 7}), 0, "train")
    plans = {message.metadata.dst_node_id: wire.unpack_plan(message.content) for message in messages}
    assert {node: plan.clients for node, plan in plans.items()} == {100: (0, 2), 101: (1, 7)}
    assert {node: plan.inspected for node, plan in plans.items()} == {100: (2,), 101: (7,)}


def test_a_round_asks_the_sampled_clients_and_waits_for_those_that_are_wanted() -> None:
    strategy = make_strategy(clients_per_round=4, over_sample=0.5, failures="tolerant")
    request, messages = strategy.configure_train(3)
    assert request.clients == sample(strategy.run.config, strategy.eligible, 3)
    assert (len(request.clients), request.num_wanted, len(messages)) == (6, 4, 2)
    assert request.starts.keys() == set(request.clients)


def test_inspected_clients_are_drawn_before_the_round_and_only_for_an_evaluation() -> None:
    config = Config.from_flat(
        {"num-rounds": 6, "eval-every": 2, "merge-gap-clients": 3, "path-pairs": 2, "updates": "pooled"}
    )
    clients = list(range(5, 25))
    rounds = {server_round: inspected_clients(config, server_round, clients) for server_round in range(1, 7)}
    assert [len(rounds[server_round]) for server_round in (1, 2, 3, 4, 5)] == [0, 3, 0, 3, 0]
    assert rounds[2] != rounds[4] and rounds[2] == set(merge_gap_clients(config, 2, clients))
    pairs = path_pairs(config, clients)
    assert len(pairs) == 2 and all(a < b for a, b in pairs)
    assert rounds[6] == {client for pair in pairs for client in pair} | set(merge_gap_clients(config, 6, clients))
    assert inspected_clients(config.changed(updates="individual"), 1, clients) == set(clients)
    assert inspected_clients(config.changed(uplink_dtype="float16"), 1, clients) == set(clients)


def test_a_pooled_update_covers_all_clients_that_are_not_inspected() -> None:
    strategy = make_strategy()
    request = make_request(strategy, [0, 2, 4, 1], inspected={2})
    result = strategy.aggregate_train(request, replies_to(strategy, request))
    assert result.loss == 1.25 and result.missing == {}
    assert {update.client: len(update.adapter) for update in result.updates} == {0: 0, 1: 0, 2: 2, 4: 0}
    assert all(replace(update, client=7, adapter=VALID.adapter) == VALID for update in result.updates)
    for name, tensor in strategy.state.adapter.items():
        assert torch.allclose(tensor, VALID.adapter.get(name, GLOBAL[name])), name


def test_missing_clients_and_failed_nodes_have_their_reason() -> None:
    strategy = make_strategy(failures="tolerant", round_timeout_s=5.0)
    request = make_request(strategy, [0, 2, 1], inspected={0, 1, 2})
    valid, lost = replies_to(strategy, request)
    valid.content["failures"]["2"] = "Traceback"
    one_client = encode([VALID], {VALID.client: GLOBAL}, GROUP_OF, "float32")
    valid.content["adapters"] = wire.pack_updates([], {"adapters": one_client}, {})["adapters"]
    result = strategy.aggregate_train(request, [valid])
    assert [update.client for update in result.updates] == [0]
    assert result.missing == {1: "no reply within round-timeout-s = 5 s", 2: "Traceback"}
    failed = Message(Error(code=0, reason="actor died"), reply_to=lost)
    failed.metadata.__dict__["_src_node_id"] = lost.metadata.src_node_id
    assert strategy.aggregate_train(request, [valid, failed]).missing[1] == "its node failed: actor died"


def test_a_missing_client_stops_a_strict_run() -> None:
    strategy = make_strategy()
    request = make_request(strategy, [0, 2, 1], inspected={0, 1, 2})
    valid, _ = replies_to(strategy, request)
    with pytest.raises(FederationError, match="client 1 failed in round 1: no reply within"):
        strategy.aggregate_train(request, [valid])


def set_buffer(content: RecordDict, name: str, values: Array) -> None:
    content[name] = ArrayRecord({"values": values})


@pytest.mark.parametrize(
    ("tamper", "reason"),
    [
        (lambda c: c.pop("pooled"), "the buffer 'pooled' is missing"),
        (lambda c: c.pop("adapters"), "the buffer 'adapters' is missing"),
        (lambda c: c["metrics-2"].update({"active-steps": [3, 3]}), "values should be 16 values"),
        (lambda c: c["metrics-0"].pop("active-steps"), "active-steps"),
        (lambda c: c["metrics-0"].update({"active-steps": 3}), "not iterable"),
        (lambda c: c["metrics-0"].pop("distance"), "client 0 does not report distance"),
        (lambda c: set_buffer(c, "pooled", Array(np.zeros(3, np.float32))), r"values of torch.float32.*shape \(3,\)"),
        (lambda c: set_buffer(c, "pooled", Array(np.full(10, np.nan, np.float32))), "client 0: x.lora_A.weight"),
        (lambda c: set_buffer(c, "pooled", Array("float32", (10,), "numpy.ndarray", b"")), "No data left"),
        (lambda c: set_buffer(c, "pooled", Array("float32", (10,), "numpy.ndarray", b"PK\x03\x04")), "not a zip file"),
        (lambda c: c["failures"].update({"evil": "no number"}), "invalid literal"),
        (lambda c: c.pop("echo"), "answers round None of run None"),
        (lambda c: c["failures"].update({"9": "x" * 10**6}), "bytes; a reply to this message has at most 196"),
    ],
)  # fmt: skip
def test_an_invalid_reply_costs_the_clients_of_its_node_alone(
    tamper: Callable[[RecordDict], object], reason: str
) -> None:
    """Clients 0, 4 (pooled) and 2 (inspected) are on one node, client 1 on another."""
    strategy = make_strategy(failures="tolerant")
    request = make_request(strategy, [0, 2, 4, 1], inspected={2})
    tampered, valid = replies_to(strategy, request)
    tamper(tampered.content)
    result = strategy.aggregate_train(request, [tampered, valid])
    assert [update.client for update in result.updates] == [1]
    assert result.missing.keys() == {0, 2, 4}
    for text in result.missing.values():
        assert re.search(f"^its node's reply was rejected: .*({reason})", text)
    averaged = strategy.state.adapter
    assert all(torch.equal(averaged[name], VALID.adapter.get(name, GLOBAL[name])) for name in GLOBAL)


def test_an_empty_evaluation_costs_the_clients_of_its_node_alone(caplog: pytest.LogCaptureFixture) -> None:
    strategy = make_strategy(failures="tolerant")
    request = make_request(strategy, [0, 2, 1], inspected=set())
    complete, empty = strategy.messages(request, 1, "evaluate")
    replies = []
    for message, clients in ((complete, (0, 2)), (empty, ())):
        metrics = {client: {"loss": 1.0, "accuracy": 0.5, "examples": 1} for client in clients}
        replies.append(Message(wire.echo(message.content, wire.pack_evaluations(metrics, {})), reply_to=message))
    with caplog.at_level("INFO", logger="flwr"):
        assert [evaluation.client for evaluation in strategy.aggregate_evaluate(request, replies)] == [0, 2]
    assert "its node's reply was rejected: the metrics of client 1 are missing" in caplog.text


@pytest.mark.parametrize("failures", ["strict", "tolerant"])
def test_a_client_without_a_finite_loss_is_left_out(failures: str, caplog: pytest.LogCaptureFixture) -> None:
    strategy = make_strategy(failures=failures)
    request = make_request(strategy, [0, 2, 1], inspected=set())
    first, second = strategy.messages(request, 1, "evaluate")
    replies = []
    for message, loss in ((first, 1.0), (second, math.nan)):
        clients = wire.unpack_plan(message.content).clients
        metrics = {client: {"loss": loss, "accuracy": 0.5, "examples": 1} for client in clients}
        replies.append(Message(wire.echo(message.content, wire.pack_evaluations(metrics, {})), reply_to=message))
    with caplog.at_level("INFO", logger="flwr"):
        assert [evaluation.client for evaluation in strategy.aggregate_evaluate(request, replies)] == [0, 2]
    assert "client 1 is left out of the evaluation: its loss is nan" in caplog.text
