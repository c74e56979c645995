"""The round loop: hello, train, aggregate, evaluate, record; from the newest checkpoint on.

One call runs one federation to its end. A comparison calls it for one run after the other
while Flower's workers stay warm.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from logging import INFO
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType
from flwr.common.logger import log
from flwr.serverapp import Grid

from copra_fl import data, models, provenance, wire
from copra_fl.adapter import Adapter, Update, complete
from copra_fl.assets import ASSETS
from copra_fl.config import Config
from copra_fl.connectivity import merge_gap, walk
from copra_fl.engine import open_engine
from copra_fl.evaluation import evaluate
from copra_fl.events import emit
from copra_fl.seeding import generator
from server.journal import Journal, Row
from server.probes import evaluated, merge_gap_clients, path_pairs
from server.strategy import CohortStrategy, FederationError

CLIENTS = Path(__file__).parent.parent / "clients"


class Evaluator:
    """The server's model and its held-out data: scores any adapter."""

    def __init__(self, config: Config, federated: data.FederatedData) -> None:
        self.config = config
        self.federated = federated
        kind, group, seed = config.training.engine, config.copra.group, config.federation.seed
        self.engine = open_engine(kind, config.model, group, len(federated.label_names), seed)
        self.model = self.engine.classifier

    def score(self, adapters: Sequence[Adapter], indices: np.ndarray) -> list[dict[str, float]]:
        """Loss, accuracy and number of examples of each adapter on the examples `indices`."""
        batch_size = self.config.evaluation.eval_batch_size
        return evaluate(self.engine, adapters, self.federated.examples, indices, batch_size)

    def round_metrics(self, adapter: Adapter, before: Adapter, updates: list[Update]) -> Row:
        """Validation metrics of the average, and how much better it is than its parts (the merge gap).

        `updates` are those of the clients chosen for the merge gap.
        """
        indices = self.federated.server_validation
        average, *own = self.score([adapter, *(complete(update, before) for update in updates)], indices)
        row: Row = {"validation": average}
        if own:
            row["merge_gap"] = merge_gap(average, own, [update.num_examples for update in updates])
        return row

    def paths(self, before: Adapter, pairs: list[tuple[Update, Update]]) -> list[Row]:
        """Loss and accuracy along the line between the adapters of each pair of clients, with both barriers."""
        evaluation, seed = self.config.evaluation, self.config.federation.seed
        held_out = self.federated.server_validation
        indices = generator(seed, "path-examples").permutation(held_out)[: evaluation.path_examples]
        rows = []
        for a, b in pairs:
            ends = complete(a, before), complete(b, before)
            path = walk(lambda adapters: self.score(adapters, indices), *ends, evaluation.path_points)
            rows.append(
                {
                    "clients": [a.client, b.client],
                    "u": path.u,
                    "loss": path.loss,
                    "accuracy": path.accuracy,
                    "barrier_entezari": path.barrier_entezari,
                    "barrier_frankle": path.barrier_frankle,
                    "midpoint_gap": path.midpoint_gap,
                }
            )
        return rows


def greet(grid: Grid, config: Config) -> dict[int, wire.Hello]:
    """Ask every node who it is. Returns node id -> hello.

    Raises FederationError for a node that fails, runs other code, has other data or a partition twice; for
    a client that no node can host (strict); and when no node is there after node-timeout.
    """
    deadline = time.monotonic() + config.federation.node_timeout
    while not (nodes := sorted(grid.get_node_ids())):
        if time.monotonic() > deadline:
            raise FederationError(f"no node connected within node-timeout = {config.federation.node_timeout:g} s")
        time.sleep(0.5)
    messages = [Message(wire.pack_config(config), node, MessageType.QUERY) for node in nodes]
    hellos: dict[int, wire.Hello] = {}
    for reply in grid.send_and_receive(messages, timeout=config.federation.round_timeout):
        node = reply.metadata.src_node_id
        if reply.has_error():
            raise FederationError(f"node {node} failed at hello: {reply.error.reason}")
        hellos[node] = wire.unpack_hello(reply.content)
    check_nodes(hellos, nodes, config)
    return hellos


def check_nodes(hellos: dict[int, wire.Hello], nodes: list[int], config: Config) -> None:
    """Raise FederationError unless all `nodes` answered, run this code and make up one federation."""
    silent = set(nodes) - hellos.keys()
    if silent:
        raise FederationError(f"nodes {sorted(silent)} did not answer the hello query")
    digest = provenance.library_digest(CLIENTS)
    first = next(iter(hellos.values()))
    partitions: dict[int, int] = {}
    for node, hello in hellos.items():
        who = f"node {node} (partition-id {hello.partition})"
        if hello.digest != digest:
            raise FederationError(
                f"{who} runs other sources of copra_fl and clients (digest {hello.digest[:12]}) than the server "
                f"({digest[:12]}); install the same version on both, and look for a stray clients/ folder"
            )
        if hello.label_names != first.label_names:
            raise FederationError(f"{who} has the labels {hello.label_names}, other nodes have {first.label_names}")
        if hello.num_clients != first.num_clients:
            raise FederationError(
                f"{who} counts {hello.num_clients} clients, other nodes {first.num_clients}; with num-clients = 0 "
                "all nodes need the same num-partitions"
            )
        if hello.partition in partitions:
            raise FederationError(f"{who} has the same partition-id as node {partitions[hello.partition]}")
        partitions[hello.partition] = node
    homeless = set(range(first.num_clients)).difference(*(hello.num_examples for hello in hellos.values()))
    if homeless and config.federation.failures == "strict":
        raise FederationError(
            f"no connected node can host the clients {sorted(homeless)}; connected are the partition-ids "
            f"{sorted(partitions)}"
        )


def run(grid: Grid, config: Config, directory: Path) -> None:
    """Run the federation of `config` in `directory`, from its newest checkpoint, to ``summary.json``."""
    journal = Journal(directory)
    if journal.finished:
        emit("finished", accuracy=None)
        return
    emit("run", directory=str(directory), rounds=config.federation.num_rounds)
    compute = models.resolve_compute(config.model, config.data.max_length)
    config = config.changed(dtype=compute.dtype, attention=compute.attention)
    nodes = greet(grid, config)
    config = config.changed(num_clients=next(iter(nodes.values())).num_clients)
    federated = data.load(config, models.load_tokenizer(config.model.model))
    evaluator = Evaluator(config, federated)
    model = evaluator.model
    adapter = journal.resume() or model.read_adapter()
    write_provenance(journal, config, federated)
    strategy = CohortStrategy(config, model.group_of, len(model.gates.names), nodes)
    strategy.summary()
    num_rounds = config.federation.num_rounds
    for server_round in range(len(journal.rows) + 1, num_rounds + 1):
        before = adapter
        adapter, row = train_round(grid, strategy, server_round, before)
        row["layers"] = model.gates.names
        sampled, updates = strategy.sample(server_round), {update.client: update for update in strategy.updates}
        if evaluated(config, server_round):
            emit("evaluating", round=server_round)
            chosen = merge_gap_clients(config, server_round, sampled)
            row |= evaluator.round_metrics(adapter, before, [updates[c] for c in chosen if c in updates])
            log(INFO, "round %s: validation accuracy %.4f", server_round, row["validation"]["accuracy"])
        if server_round == num_rounds:
            pairs = path_pairs(config, server_round, sampled)
            row["paths"] = evaluator.paths(
                before, [(updates[a], updates[b]) for a, b in pairs if a in updates and b in updates]
            )
        journal.record(row, adapter)
        emit("recorded", round=server_round, accuracy=row.get("validation", {}).get("accuracy"))
    finish(grid, strategy, evaluator, journal, adapter)


def train_round(grid: Grid, strategy: CohortStrategy, server_round: int, adapter: Adapter) -> tuple[Adapter, Row]:
    """One round of local training and averaging: the next global adapter and the round's journal line."""
    started = time.perf_counter()
    config = strategy.config
    arrays = ArrayRecord(torch_state_dict=adapter)
    messages = list(strategy.configure_train(server_round, arrays, ConfigRecord(), grid))
    emit("round", round=server_round, clients=len(strategy.sample(server_round)))
    replies = list(grid.send_and_receive(messages, timeout=config.federation.round_timeout))
    averaged, metrics = strategy.aggregate_train(server_round, replies)
    assert averaged is not None and metrics is not None
    row = {
        "round": server_round,
        "seconds": time.perf_counter() - started,
        "bytes_down": sum(wire.num_bytes(message.content) for message in messages),
        "bytes_up": sum(wire.num_bytes(reply.content) for reply in replies if reply.has_content()),
        "train_loss": metrics["loss"],
        "clients": [
            {
                "client": u.client,
                "examples": u.num_examples,
                "active_steps": u.active_steps,
                **u.metrics,
            }
            for u in strategy.updates
        ],
        "missing": [{"client": client, "reason": reason} for client, reason in sorted(strategy.missing.items())],
    }
    return dict(averaged.to_torch_state_dict()), row


def write_provenance(journal: Journal, config: Config, federated: data.FederatedData) -> None:
    """``provenance.json``, also of each resume: what ran may have changed in between."""
    origin = {
        "after_round": len(journal.rows),
        "versions": provenance.versions(),
        "source_digest": provenance.library_digest(CLIENTS),
        "machine": provenance.machine(),
        "seed": config.federation.seed,
        "data_digest": federated.digest,
        "assets": {name: ASSETS[name].sha256 for name in (config.data.dataset, config.model.model) if name in ASSETS},
    }
    journal.add_provenance(origin)


def finish(grid: Grid, strategy: CohortStrategy, evaluator: Evaluator, journal: Journal, adapter: Adapter) -> None:
    """The test, the clients' own validation, the adapter in PEFT's format, the summary."""
    config, federated, rows = strategy.config, evaluator.federated, journal.rows
    emit("testing")
    arrays = ArrayRecord(torch_state_dict=adapter)
    messages = strategy.configure_evaluate(len(rows), arrays, ConfigRecord(), grid)
    replies = grid.send_and_receive(messages, timeout=config.federation.round_timeout)
    clients = strategy.aggregate_evaluate(len(rows), replies)
    assert clients is not None
    (test,) = evaluator.score([adapter], federated.test)
    evaluator.model.write_adapter(adapter)
    models.save(evaluator.model, journal.directory / "adapter", federated.label_names)
    columns = {name: list(values) for name, values in clients.items()}  # type: ignore[arg-type]
    last = rows[-1]
    journal.write_json(
        "summary.json",
        {
            "method": config.copra.local_training,
            "seed": config.federation.seed,
            "rounds": len(rows),
            "test": test,
            "validation": last["validation"],
            "merge_gap": last.get("merge_gap"),
            "bytes_up": sum(row["bytes_up"] for row in rows),
            "bytes_down": sum(row["bytes_down"] for row in rows),
            "seconds": sum(row["seconds"] for row in rows),
            "clients": [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)],
            "paths": last["paths"],
            "skipped_clients": federated.skipped,
            "unassigned_examples": federated.unassigned,
            "dropped_duplicates": federated.dropped_duplicates,
            "dropped_empty": federated.dropped_empty,
        },
    )
    emit("finished", accuracy=test["accuracy"])
