"""The Flower ClientApp of a node: unpack a message, call the library, pack the reply.

    query     who are you, which clients do you host
    train     train the cohort from the global adapter, hand back updates
    evaluate  the global adapter on each client's own validation data

A client that fails does not take the others of its cohort with it: its traceback goes
into the reply and the server decides.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from clients.session import open_data, open_engine
from copra_fl import wire
from copra_fl.adapter import Update
from copra_fl.config import Config
from copra_fl.data import FederatedData
from copra_fl.engine import Engine
from copra_fl.evaluation import evaluate
from copra_fl.events import emit
from copra_fl.provenance import library_digest

app = ClientApp()
Result = TypeVar("Result")


@app.query()
def hello(message: Message, context: Context) -> Message:
    config = wire.unpack_config(message.content)
    partition = int(context.node_config["partition-id"])
    num_partitions = int(context.node_config["num-partitions"])
    data = open_data(config)
    hosted = range(partition, len(data.train), num_partitions)
    answer = wire.Hello(
        partition=partition,
        num_partitions=num_partitions,
        digest=library_digest(Path(__file__).parent),
        num_examples={client: len(data.train[client]) for client in hosted},
        num_validation={client: len(data.validation[client]) for client in hosted},
        label_names=data.label_names,
    )
    return Message(wire.pack_hello(answer), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    plan, global_adapter = wire.unpack_plan(message.content)
    engine, data = _session(plan.config)
    updates: list[Update] = []
    failures: dict[int, str] = {}
    for clients in engine.slices(data, plan):
        trained, failed = _each(clients, lambda some: engine.train(data, plan, some, global_adapter, _report))
        updates += trained
        failures |= failed
    return Message(wire.pack_updates(updates, failures), reply_to=message)


@app.evaluate()
def evaluate_clients(message: Message, context: Context) -> Message:
    plan, global_adapter = wire.unpack_plan(message.content)
    engine, data = _session(plan.config)
    settings = plan.config.evaluation

    def evaluate_all(clients: tuple[int, ...]) -> list[tuple[int, dict[str, float]]]:
        held = [(client, data.validation[client][: settings.client_eval_examples]) for client in clients]
        score = partial(evaluate, engine, [global_adapter], data.examples, batch_size=settings.eval_batch_size)
        return [(client, *score(indices)) for client, indices in held]

    evaluations, failures = _each(plan.clients, evaluate_all)
    return Message(wire.pack_evaluations(dict(evaluations), failures), reply_to=message)


def _session(config: Config) -> tuple[Engine, FederatedData]:
    data = open_data(config)
    kind, group = config.training.engine, config.copra.group
    return open_engine(kind, config.model, group, len(data.label_names), seed=0), data


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
    results, failures = [], {}
    for client in clients:
        done, failed = _each((client,), work)
        results += done
        failures |= failed
    return results, failures
