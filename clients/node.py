"""What a node does with a message: unpack it, call the library, pack the reply.

A client that fails does not take the others of its cohort with it: its traceback goes
into the reply and the server decides.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

from flwr.app import Context, Message, RecordDict

import copra_fl.process  # noqa: F401
from clients.session import open_data, open_engine
from copra_fl import wire
from copra_fl.adapter import Adapter, Layout, Update
from copra_fl.aggregation.checking import BadUpdate, check_update
from copra_fl.aggregation.pooling import pool
from copra_fl.compression import FEEDBACK, Arrays, encode, encode_with_feedback
from copra_fl.data import FederatedData
from copra_fl.engine import Engine
from copra_fl.evaluation import evaluate
from copra_fl.events import emit
from copra_fl.provenance import library_digest
from copra_fl.training import Plan

Result = TypeVar("Result")


def hello(message: Message, context: Context) -> Message:
    config = wire.unpack_config(message.content)
    partition = int(context.node_config["partition-id"])
    num_partitions = int(context.node_config["num-partitions"])
    single = config.data.num_clients == 0 and config.data.partitioner != "natural"
    data = open_data(config.changed(num_clients=num_partitions) if single else config)
    at_home = single or config.federation.uplink in FEEDBACK
    hosted = range(partition, len(data.train), num_partitions) if at_home else range(len(data.train))
    answer = wire.Hello(
        partition=partition,
        digest=library_digest(Path(__file__).parent),
        num_clients=len(data.train),
        num_examples={client: len(data.train[client]) for client in hosted},
        num_validation={client: len(data.validation[client]) for client in hosted},
        label_names=data.label_names,
    )
    return Message(wire.pack_hello(answer), reply_to=message)


def train(message: Message, context: Context) -> Message:
    plan, engine, data, global_adapter = _open(message)
    group_of, num_groups = engine.classifier.group_of, len(engine.classifier.gates.names)
    updates: list[Update] = []
    failures: dict[int, str] = {}
    for clients in engine.slices(data, plan):
        trained, failed = _each(clients, lambda some: engine.train(data, plan, some, global_adapter, _report))
        failures |= failed
        for update in trained:
            try:
                check_update(update, global_adapter, group_of, num_groups, len(data.train[update.client]))
                updates.append(update)
            except BadUpdate as error:
                failures[update.client] = str(error)
    buffers = _pack(plan, updates, global_adapter, group_of, context.state)
    return Message(wire.pack_updates(updates, buffers, failures), reply_to=message)


def _pack(
    plan: Plan, updates: list[Update], global_adapter: Adapter, group_of: dict[str, int], state: RecordDict
) -> dict[str, Arrays]:
    """The tensors of the cohort: each client's own of those to keep, one pooled update of all others."""
    federation = plan.config.federation
    kept = [update for update in updates if update.client in plan.keep]
    others = [update for update in updates if update.client not in plan.keep]
    buffers = {}
    if others:
        pooled = pool(global_adapter, others, plan.config.aggregation.weighting, group_of)
        buffers["pooled"] = encode([pooled], global_adapter, group_of, "float32")
    if kept and federation.uplink in FEEDBACK:
        layout = Layout.by_name(global_adapter)
        lost = wire.read_lost(state, plan, layout)
        buffers["adapters"], lost = encode_with_feedback(kept, global_adapter, group_of, federation.uplink, lost)
        wire.write_lost(state, lost, layout)
    elif kept:
        buffers["adapters"] = encode(kept, global_adapter, group_of, federation.uplink)
    return buffers


def evaluate_clients(message: Message, context: Context) -> Message:
    plan, engine, data, global_adapter = _open(message)
    settings = plan.config.evaluation

    def evaluate_all(clients: tuple[int, ...]) -> list[tuple[int, dict[str, float]]]:
        held = [(client, data.validation[client][: settings.client_eval_examples]) for client in clients]
        score = partial(evaluate, engine, [global_adapter], data.examples, batch_size=settings.eval_batch_size)
        return [(client, score(indices)[0]) for client, indices in held]

    evaluations, failures = _each(plan.clients, evaluate_all)
    return Message(wire.pack_evaluations(dict(evaluations), failures), reply_to=message)


def _open(message: Message) -> tuple[Plan, Engine, FederatedData, Adapter]:
    """The plan of a message, the engine and data that it needs, and the global adapter."""
    plan = wire.unpack_plan(message.content)
    config, data = plan.config, open_data(plan.config)
    num_labels = len(data.label_names)
    engine = open_engine(config.training.engine, config.model, config.copra.group, num_labels, seed=0)
    return plan, engine, data, wire.unpack_adapter(message.content, Layout.by_name(engine.classifier.read_adapter()))


def _report(num_clients: float) -> None:
    emit("trained", clients=num_clients)


def _each(
    clients: tuple[int, ...], work: Callable[[tuple[int, ...]], list[Result]]
) -> tuple[list[Result], dict[int, str]]:
    """`work` on all `clients`: results, and tracebacks of those that failed.

    Where all together fail each is tried alone, so that one does not take the others with it.
    """
    try:
        return work(clients), {}
    except Exception:
        if len(clients) == 1:
            return [], {clients[0]: traceback.format_exc()}
    results: list[Result] = []
    failures: dict[int, str] = {}
    for client in clients:
        done, failed = _each((client,), work)
        results += done
        failures |= failed
    return results, failures
