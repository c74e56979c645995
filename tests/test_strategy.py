"""Records there and back, sampling, and every reply that must not be averaged."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from flwr.app import Error, Message
from flwr.supercore.task_identity import TaskIdentity

from copra_fl import wire
from copra_fl.adapter import Update
from copra_fl.config import Config
from copra_fl.training import Plan
from server.strategy import BadUpdate, CohortStrategy, FederationError, check_update

GLOBAL = {"x.lora_A.weight": torch.zeros(2, 3), "y.lora_A.weight": torch.zeros(2, 3), "head.weight": torch.zeros(4)}
GROUP_OF = {"x.lora_A.weight": 0, "y.lora_A.weight": 1}
GOOD = Update(
    7,
    {"x.lora_A.weight": torch.ones(2, 3), "head.weight": torch.arange(4.0)},
    12,
    (3, 0),
    {"loss": 1.25, "steps": 3.0, "seconds": 0.5},
)


def tensors(**changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    named = {"x": "x.lora_A.weight", "head": "head.weight"}
    changed = GOOD.adapter | {named.get(name, name): value for name, value in changes.items()}
    return {name: value for name, value in changed.items() if value is not None}


def test_a_good_update_passes() -> None:
    check_update(GOOD, GLOBAL, GROUP_OF, 2, 12)


@pytest.mark.parametrize(
    ("update", "reason"),
    [
        (replace(GOOD, num_examples=0), "claims 0 examples"),
        (replace(GOOD, num_examples=9999), "claims 9999 examples; at the start it had 12"),
        (replace(GOOD, active_steps=(3,)), "not 2 counts"),
        (replace(GOOD, active_steps=(3, -1)), "not 2 counts"),
        (replace(GOOD, active_steps=(3, 1)), "tensor y.lora_A.weight is missing"),
        (replace(GOOD, adapter=tensors(head=None)), "tensor head.weight is missing"),
        (replace(GOOD, adapter=tensors(evil=torch.ones(1))), "unknown tensors"),
        (replace(GOOD, adapter=tensors(x=torch.ones(3, 2))), r"float32 of shape \(3, 2\), not torch.float32 of \(2, 3"),
        (replace(GOOD, adapter=tensors(x=torch.ones(2, 3).double())), "float64"),
        (replace(GOOD, adapter=tensors(x=torch.full((2, 3), math.nan))), "not finite"),
        (replace(GOOD, adapter=tensors(head=torch.tensor([0, 1, math.inf, 0]))), "not finite"),
        (replace(GOOD, metrics={"loss": math.nan}), "loss is nan"),
        (replace(GOOD, metrics={}), "loss is None"),
    ],
)
def test_bad_updates_are_refused(update: Update, reason: str) -> None:
    with pytest.raises(BadUpdate, match=reason):
        check_update(update, GLOBAL, GROUP_OF, 2, 12)


def test_plans_and_updates_survive_flowers_records() -> None:
    config = Config.from_flat({"alpha": 0.5, "num-clients": 9, "seed": 3})
    plan, adapter = wire.unpack_plan(wire.pack_plan(Plan(2, (1, 5), config), GLOBAL))
    assert plan == Plan(2, (1, 5), config)
    assert all(torch.equal(adapter[name], GLOBAL[name]) for name in GLOBAL)
    content = wire.pack_updates([GOOD], {4: "Traceback"})
    again = wire.unpack_update(content, 7)
    assert replace(again, adapter={}) == replace(GOOD, adapter={})
    assert all(torch.equal(again.adapter[name], GOOD.adapter[name]) for name in GOOD.adapter)
    assert wire.unpack_failures(content) == {4: "Traceback"}
    hello = wire.Hello(1, 3, "digest", {1: 10, 4: 0}, {1: 2, 4: 0}, ["a", "b"])
    assert wire.unpack_hello(wire.pack_hello(hello)) == hello


def test_bytes_are_those_of_the_arrays() -> None:
    """float32: 4 bytes a number, and at most 200 bytes of header for each of 2 arrays."""
    numbers = sum(tensor.numel() for tensor in GOOD.adapter.values())
    assert 4 * numbers < wire.num_bytes(wire.pack_updates([GOOD], {})) < 4 * numbers + 2 * 200


def strategy(**flat: object) -> CohortStrategy:
    """20 clients on 2 nodes; client 3 has no examples."""
    hellos = {}
    for node in range(2):
        counts = {client: 0 if client == 3 else 12 for client in range(node, 20, 2)}
        hellos[100 + node] = wire.Hello(node, 2, "", counts, dict.fromkeys(counts, 1), [])
    config = Config.from_flat({"num-clients": 20, **{key.replace("_", "-"): value for key, value in flat.items()}})
    return CohortStrategy(config, GROUP_OF, 2, hellos)


def test_sampling_is_seeded_and_leaves_out_clients_without_data() -> None:
    some = strategy(fraction_clients=0.2)
    rounds = [some.sample(server_round) for server_round in range(1, 40)]
    assert {len(clients) for clients in rounds} == {4}  # a fifth of 19
    assert rounds == [strategy(fraction_clients=0.2).sample(r) for r in range(1, 40)]
    assert rounds != [strategy(fraction_clients=0.2, seed=1).sample(r) for r in range(1, 40)]
    assert {client for clients in rounds for client in clients} == set(range(20)) - {3}
    assert len(strategy(clients_per_round=7).sample(1)) == 7
    assert strategy().sample(1) == [c for c in range(20) if c != 3]


@pytest.fixture(autouse=True)
def identity() -> None:
    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1


def replies_to(some: CohortStrategy, clients: list[int]) -> list[Message]:
    some._global_adapter = GLOBAL
    messages = some.cohort_messages(1, clients, GLOBAL, "train")
    return [
        Message(
            wire.pack_updates([replace(GOOD, client=c) for c in wire.unpack_plan(message.content)[0].clients], {}),
            reply_to=message,
        )
        for message in messages
    ]


def test_one_message_a_node_carries_its_cohort() -> None:
    some = strategy()
    messages = some.cohort_messages(1, [0, 1, 2, 7], GLOBAL, "train")
    cohorts = {m.metadata.dst_node_id: wire.unpack_plan(m.content)[0].clients for m in messages}
    assert cohorts == {100: (0, 2), 101: (1, 7)}


def test_bad_missing_and_failed_replies_are_named() -> None:
    some = strategy(failures="tolerant", round_timeout=5.0)
    good, lost = replies_to(some, [0, 2, 1])
    good.content["adapter-2"] = wire.ArrayRecord(torch_state_dict={"x.lora_A.weight": torch.ones(1)})
    arrays, metrics = some.aggregate_train(1, [good])
    assert [update.client for update in some.updates] == [0]
    assert metrics == {"loss": 1.25}
    assert set(some.missing) == {1, 2}
    assert "refused: tensor x.lora_A.weight is torch.float32 of shape (1,)" in some.missing[2]
    assert some.missing[1] == "no reply within round-timeout = 5 s"
    failed = Message(Error(code=0, reason="actor died"), reply_to=lost)
    failed.metadata.__dict__["_src_node_id"] = lost.metadata.src_node_id
    some.aggregate_train(1, [good, failed])
    assert "actor died" in some.missing[1]


def test_strict_refuses_what_tolerant_leaves_out() -> None:
    some = strategy()
    good, _ = replies_to(some, [0, 2, 1])
    with pytest.raises(FederationError, match="client 1 failed in round 1: no reply within"):
        some.aggregate_train(1, [good])


def test_a_malformed_reply_is_refused_not_raised() -> None:
    some = strategy(failures="tolerant")
    good, other = replies_to(some, [0, 2, 1])
    del other.content["metrics-1"]
    del good.content["failures"]
    some.aggregate_train(1, [good, other])
    assert some.missing.keys() == {1} and "refused" in some.missing[1]
    assert [update.client for update in some.updates] == [0, 2]


def test_an_empty_evaluation_names_its_client() -> None:
    some = strategy(failures="tolerant")
    good, other = replies_to(some, [0, 2, 1])
    for reply, clients in ((good, (0, 2)), (other, ())):
        rows = {client: {"loss": 1.0, "accuracy": 0.5, "examples": 4} for client in clients}
        reply.content = wire.pack_evaluations(rows, {})
    assert some.aggregate_evaluate(1, [good, other])["client"] == [0, 2]
    assert some.missing.keys() == {1}
