"""Records there and back, sampling, and every reply that must not be averaged."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Error, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from copra_fl import wire
from copra_fl.adapters.compression import encode
from copra_fl.adapters.server_state import State
from copra_fl.adapters.state import Update
from copra_fl.aggregation.checking import BadUpdate, Expected, check_update
from copra_fl.aggregation.pooling import pool
from copra_fl.config import Config
from copra_fl.training.plan import Plan
from server.eval_selection import kept_clients, merge_gap_clients, path_pairs
from server.strategy import CohortStrategy, FederationError

GLOBAL = {"x.lora_A.weight": torch.zeros(2, 3), "y.lora_A.weight": torch.zeros(2, 3), "head.weight": torch.zeros(4)}
GROUP_OF = {"x.lora_A.weight": 0, "y.lora_A.weight": 1}
GOOD = Update(
    7,
    {"x.lora_A.weight": torch.ones(2, 3), "head.weight": torch.arange(4.0)},
    12,
    (3, 0),
    {"loss": 1.25, "steps": 3.0, "seconds": 0.5},
)


#: of GOOD: 6 ones and 0, 1, 2, 3 away from 0, so moved by sqrt(6 + 14)
EXPECTED = Expected(num_groups=2, num_examples=12, num_steps=3, max_norm=20**0.5 + 1e-6)


def tensors(**changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    named = {"x": "x.lora_A.weight", "head": "head.weight"}
    changed = GOOD.adapter | {named.get(name, name): value for name, value in changes.items()}
    return {name: value for name, value in changed.items() if value is not None}


def test_a_good_update_passes() -> None:
    check_update(GOOD, GLOBAL, GROUP_OF, EXPECTED)


@pytest.mark.parametrize(
    ("update", "reason"),
    [
        (replace(GOOD, num_examples=0), "claims 0 examples"),
        (replace(GOOD, num_examples=9999), "claims 9999 examples; at the start it had 12"),
        (replace(GOOD, active_steps=(3,)), "not 2 counts"),
        (replace(GOOD, active_steps=(3, -1)), "not 2 counts"),
        (replace(GOOD, active_steps=(3, 1)), r"tensors \['y.lora_A.weight'\] are missing"),
        (replace(GOOD, active_steps=(0, 0)), r"\['x.lora_A.weight'\] are not known or not trained"),
        (replace(GOOD, adapter=tensors(head=None)), r"tensors \['head.weight'\] are missing"),
        (replace(GOOD, adapter=tensors(evil=torch.ones(1))), r"\['evil'\] are not known"),
        (replace(GOOD, adapter=tensors(x=torch.ones(3, 2))), r"float32 of shape \(3, 2\), not torch.float32 of \(2, 3"),
        (replace(GOOD, adapter=tensors(x=torch.ones(2, 3).double())), "float64"),
        (replace(GOOD, adapter=tensors(x=torch.full((2, 3), math.nan))), "not finite"),
        (replace(GOOD, adapter=tensors(head=torch.tensor([0, 1, math.inf, 0]))), "not finite"),
        (replace(GOOD, active_steps=(4, 0)), "claims 4 active steps of a layer; a round has 3"),
        (replace(GOOD, active_steps=(math.nan, 0)), "claims nan active steps"),
        (
            replace(GOOD, adapter=tensors(head=torch.arange(4.0) * 1.01)),
            "has moved by 4.50., more than max-update-norm",
        ),
        (replace(GOOD, metrics={"loss": math.nan}), "loss of nan"),
        (replace(GOOD, metrics={"loss": 1.0, "steps": math.inf}), "reports steps = inf"),
        (replace(GOOD, metrics={"loss": 1.0, "client": 3.0}), "reports client; known are distance, loss"),
        (replace(GOOD, metrics={}), "loss of None"),
    ],
)
def test_bad_updates_are_refused(update: Update, reason: str) -> None:
    with pytest.raises(BadUpdate, match=reason):
        check_update(update, GLOBAL, GROUP_OF, EXPECTED)


def test_plans_and_updates_survive_flowers_records() -> None:
    config = Config.from_flat({"alpha": 0.5, "num-clients": 9, "seed": 3})
    plan = Plan(2, (1, 5), config, keep=(5,))
    delivery = wire.Delivery("run", number=1, since=-1, parts=("A", "head"), rank=2)
    content = wire.pack_plan(plan, delivery, wire.Content(GLOBAL, {}, {}))
    assert wire.unpack_plan(content) == plan and wire.unpack_delivery(content) == delivery
    adapter = wire.unpack_content(content, delivery, dict(reversed(GLOBAL.items()))).adapter
    assert adapter.keys() == GLOBAL.keys() and all(torch.equal(adapter[name], GLOBAL[name]) for name in GLOBAL)
    with pytest.raises(ValueError, match="values should be 4 values of torch.float32 in a row"):
        wire.unpack_content(content, delivery, {"head.weight": torch.zeros(4)})
    content = wire.pack_updates([GOOD], {"adapters": {"values": torch.arange(3)}}, {4: "Traceback"})
    assert wire.unpack_scalars(content, 7) == replace(GOOD, adapter={})
    assert wire.unpack_arrays(content, "adapters")["values"].tolist() == [0, 1, 2]
    assert wire.unpack_failures(content) == {4: "Traceback"}
    hello = wire.Hello(1, "digest", 5, {1: 10, 4: 0}, {1: 2, 4: 0}, ["a", "b"])
    assert wire.unpack_hello(wire.pack_hello(hello)) == hello


def test_bytes_are_those_of_arrays_and_metrics() -> None:
    """4 bytes a number and at most 200 of header; 8 for each of 6 metrics, and their names."""
    values = torch.zeros(1000)
    without, content = (
        wire.pack_updates([GOOD], {}, {}),
        wire.pack_updates([GOOD], {"adapters": {"values": values}}, {}),
    )
    assert 6 * 8 < wire.num_bytes(without) < 6 * 8 + 100
    assert 4000 < wire.num_bytes(content) - wire.num_bytes(without) < 4200


def strategy(**flat: object) -> CohortStrategy:
    """20 clients on 2 nodes; client 3 has no examples."""
    hellos = {}
    for node in range(2):
        counts = {client: 0 if client == 3 else 12 for client in range(node, 20, 2)}
        hellos[100 + node] = wire.Hello(node, "", 20, counts, dict.fromkeys(counts, 1), [])
    changes = {key.replace("_", "-"): value for key, value in flat.items()}
    config = Config.from_flat({"num-clients": 20, "updates": "pooled", "rank": 2, **changes})
    return CohortStrategy(config, GROUP_OF, 2, hellos, State(GLOBAL), "run", lambda adapters, residual: [])


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


def replies_to(some: CohortStrategy, clients: list[int], keep: set[int] | None = None) -> list[Message]:
    """What nodes would send of clients that all trained to `GOOD`; `keep` is everyone if not given."""
    some._starts, some._keep = dict.fromkeys(clients, GLOBAL), set(clients) if keep is None else keep
    replies = []
    for message in some.cohort_messages(1, 0, dict.fromkeys(clients, 1), "train"):
        plan = wire.unpack_plan(message.content)
        updates = [replace(GOOD, client=client) for client in plan.clients]
        kept = [update for update in updates if update.client in plan.keep]
        others = [update for update in updates if update.client not in plan.keep]
        buffers = {"adapters": encode(kept, some._starts, GROUP_OF, "float32")} if kept else {}
        if others:
            pooled = pool(GLOBAL, others, "examples", GROUP_OF)
            buffers["pooled"] = encode([pooled], some._starts, GROUP_OF, "float32")
        content = wire.echo(message.content, wire.pack_updates(updates, buffers, {}))
        replies.append(Message(content, reply_to=message))
    return replies


def test_one_message_a_node_carries_its_cohort() -> None:
    some = strategy()
    some._keep = {2, 7}
    messages = some.cohort_messages(1, 0, dict.fromkeys([0, 1, 2, 7], 1), "train")
    plans = {m.metadata.dst_node_id: wire.unpack_plan(m.content) for m in messages}
    assert {node: plan.clients for node, plan in plans.items()} == {100: (0, 2), 101: (1, 7)}
    assert {node: plan.keep for node, plan in plans.items()} == {100: (2,), 101: (7,)}


def test_who_is_kept_is_drawn_before_the_round_and_only_where_someone_looks() -> None:
    config = Config.from_flat(
        {"num-rounds": 6, "eval-every": 2, "merge-gap-clients": 3, "path-pairs": 2, "updates": "pooled"}
    )
    clients = list(range(5, 25))
    rounds = {server_round: kept_clients(config, server_round, clients) for server_round in range(1, 7)}
    assert [len(rounds[r]) for r in (1, 2, 3, 4, 5)] == [0, 3, 0, 3, 0]
    assert rounds[2] != rounds[4] and rounds[2] == set(merge_gap_clients(config, 2, clients))
    pairs = path_pairs(config, 6, clients)
    assert len(pairs) == 2 and all(a < b for a, b in pairs) and path_pairs(config, 5, clients) == []
    assert rounds[6] == {c for pair in pairs for c in pair} | set(merge_gap_clients(config, 6, clients))
    assert kept_clients(config.changed(updates="individual"), 1, clients) == set(clients)
    assert kept_clients(config.changed(uplink_dtype="float16"), 1, clients) == set(clients)


def test_a_pooled_update_stands_for_all_clients_that_are_not_kept() -> None:
    some = strategy()
    _, metrics = some.aggregate_train(1, replies_to(some, [0, 2, 4, 1], keep={2}))
    assert metrics == {"loss": 1.25}
    assert {update.client: len(update.adapter) for update in some.updates} == {0: 0, 1: 0, 2: 2, 4: 0}
    assert all(replace(update, client=7, adapter=GOOD.adapter) == GOOD for update in some.updates)


def test_missing_and_failed_nodes_are_named() -> None:
    some = strategy(failures="tolerant", round_timeout_s=5.0)
    good, lost = replies_to(some, [0, 2, 1])
    good.content["failures"]["2"] = "Traceback"
    one = encode([GOOD], {GOOD.client: GLOBAL}, GROUP_OF, "float32")
    good.content["adapters"] = wire.pack_updates([], {"adapters": one}, {})["adapters"]
    some.aggregate_train(1, [good])
    assert [update.client for update in some.updates] == [0]
    assert some.missing == {1: "no reply within round-timeout-s = 5 s", 2: "Traceback"}
    failed = Message(Error(code=0, reason="actor died"), reply_to=lost)
    failed.metadata.__dict__["_src_node_id"] = lost.metadata.src_node_id
    some.aggregate_train(1, [good, failed])
    assert "actor died" in some.missing[1]


def test_strict_refuses_what_tolerant_leaves_out() -> None:
    some = strategy()
    good, _ = replies_to(some, [0, 2, 1])
    with pytest.raises(FederationError, match="client 1 failed in round 1: no reply within"):
        some.aggregate_train(1, [good])


def junk(content: RecordDict, name: str, values: object) -> None:
    content[name] = ArrayRecord({"values": values})


@pytest.mark.parametrize(
    ("meddle", "reason"),
    [
        (lambda c: c.pop("metrics-2"), "the metrics of client 2 are missing"),
        (lambda c: c.pop("pooled"), "the buffer 'pooled' is missing"),
        (lambda c: c.pop("adapters"), "the buffer 'adapters' is missing"),
        (lambda c: c["metrics-0"].update({"num-examples": 99}), "client 0 claims 99 examples"),
        (lambda c: c["metrics-2"].update({"loss": math.nan}), "client 2 has a training loss of nan"),
        (lambda c: c["metrics-2"].update({"active-steps": [1]}), r"client 2 has active steps \(1,\), not 2 counts"),
        (lambda c: c["metrics-2"].update({"active-steps": [3, 3]}), "values should be 16 values"),
        (lambda c: c["metrics-0"].pop("active-steps"), "active-steps"),
        (lambda c: c["metrics-0"].update({"active-steps": 3}), "not iterable"),
        (lambda c: junk(c, "pooled", Array(np.zeros(3, np.float32))), r"values of torch.float32.*shape \(3,\)"),
        (lambda c: junk(c, "pooled", Array(np.zeros(10))), "is torch.float64"),
        (lambda c: junk(c, "pooled", Array(np.full(10, np.nan, np.float32))), "client 0: x.lora_A.weight has values"),
        (lambda c: junk(c, "adapters", Array(np.full(10, np.inf, np.float32))), "client 2: x.lora_A.weight has values"),
        (lambda c: junk(c, "pooled", Array("float32", (10,), "numpy.ndarray", b"")), "No data left"),
        (lambda c: junk(c, "pooled", Array("float32", (10,), "numpy.ndarray", b"PK\x03\x04 no zip")), ""),
        (lambda c: c["failures"].update({"evil": "no number"}), "invalid literal"),
        (lambda c: c["echo"].update({"round": 7}), "answers round 7 of run run, not round 1 of run"),
        (lambda c: c["echo"].update({"run": "other"}), "answers round 1 of run other"),
        (lambda c: c.pop("echo"), "answers round None of run None"),
        (lambda c: c["metrics-0"].update({"active-steps": [10**6, 0]}), "claims 1000000 active steps"),
        (lambda c: junk(c, "more", Array(np.zeros(60_000, np.float32))), "bytes, where such a reply has 196"),
        (lambda c: c["failures"].update({"9": "x" * 10**6}), "bytes, where such a reply has 196"),
    ],
)
def test_a_malformed_reply_is_refused_for_its_node_and_not_raised(meddle, reason: str) -> None:
    """Clients 0, 4 (pooled) and 2 (kept) are on one node, client 1 on another."""
    some = strategy(failures="tolerant")
    bad, other = replies_to(some, [0, 2, 4, 1], keep={2})
    meddle(bad.content)
    arrays, _ = some.aggregate_train(1, [bad, other])
    assert [update.client for update in some.updates] == [1]
    assert some.missing.keys() == {0, 2, 4}
    for text in some.missing.values():
        assert re.search(f"^its node's reply was refused: .*({reason})", text)
    averaged = arrays.to_torch_state_dict()
    assert all(torch.equal(averaged[name], GOOD.adapter.get(name, GLOBAL[name])) for name in GLOBAL)


def test_an_empty_evaluation_names_its_client() -> None:
    some = strategy(failures="tolerant")
    good, other = replies_to(some, [0, 2, 1])
    for reply, clients in ((good, (0, 2)), (other, ())):
        rows = {client: {"loss": 1.0, "accuracy": 0.5, "examples": 1} for client in clients}
        echo = reply.content["echo"]
        reply.content = wire.pack_evaluations(rows, {})
        reply.content["echo"] = echo
    assert some.aggregate_evaluate(1, [good, other])["client"] == [0, 2]
    assert some.missing == {1: "its node's reply was refused: the metrics of client 1 are missing"}
