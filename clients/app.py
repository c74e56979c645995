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
from pathlib import Path
from typing import TypeVar

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from clients.session import open_data, open_model
from copra_fl import wire
from copra_fl.data import FederatedData
from copra_fl.evaluation import evaluate
from copra_fl.events import emit
from copra_fl.models import Classifier
from copra_fl.provenance import library_digest
from copra_fl.training import Plan, train_client

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
    updates, failures = _each(plan, lambda client: train_client(*_session(plan), plan, client, global_adapter))
    return Message(wire.pack_updates(updates.values(), failures), reply_to=message)


@app.evaluate()
def evaluate_clients(message: Message, context: Context) -> Message:
    plan, global_adapter = wire.unpack_plan(message.content)
    settings = plan.config.evaluation

    def evaluate_client(client: int) -> dict[str, float]:
        model, data = _session(plan)
        model.write_adapter(global_adapter)
        indices = data.validation[client][: settings.client_eval_examples]
        return evaluate(model, data.examples, indices, settings.eval_batch_size)

    evaluations, failures = _each(plan, evaluate_client)
    return Message(wire.pack_evaluations(evaluations, failures), reply_to=message)


def _session(plan: Plan) -> tuple[Classifier, FederatedData]:
    data = open_data(plan.config)
    return open_model(plan.config.model, plan.config.copra.group, len(data.label_names)), data


def _each(plan: Plan, work: Callable[[int], Result]) -> tuple[dict[int, Result], dict[int, str]]:
    """`work` done for every client of the plan: results, and tracebacks of those that failed."""
    results, failures = {}, {}
    for client in plan.clients:
        try:
            results[client] = work(client)
        except Exception:
            failures[client] = traceback.format_exc()
        emit("client", client=client)
    return results, failures
