"""The round loop: hello, train, aggregate, evaluate, record; from the newest checkpoint on.

One call runs one federation to its end. A comparison calls it for one run after the other
while Flower's workers stay warm.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from functools import partial
from itertools import groupby
from logging import INFO
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord
from flwr.common.logger import log
from flwr.serverapp import Grid

from copra_fl import provenance, tasks, wire
from copra_fl.adapters.interpolation import walk
from copra_fl.adapters.server_state import State
from copra_fl.adapters.state import Adapter, Update, complete
from copra_fl.aggregation import check, find_rule
from copra_fl.aggregation.heads import lend
from copra_fl.config import Config, csv_line
from copra_fl.data import federated
from copra_fl.data.federated import load_data
from copra_fl.events import emit
from copra_fl.models.build import check_weights, load_processor, resolve_config
from copra_fl.models.export import save
from copra_fl.models.fed_sb_init import core_start
from copra_fl.seeding import generator
from copra_fl.sources.assets import ASSETS
from copra_fl.training.engine import open_engine
from copra_fl.training.evaluation import evaluate_each, merge_gap_each
from server.eval_selection import evaluated, merge_gap_clients, path_pairs
from server.handshake import CLIENTS, greet, welcome
from server.journal import Journal, Row
from server.messaging import exchange
from server.privacy_budget import Budget, forget_secret, open_secret
from server.strategy import CohortStrategy


class Evaluator:
    """The server's model and its held-out data: scores any adapter."""

    def __init__(self, config: Config, federated: federated.FederatedData) -> None:
        self.config = config
        self.federated = federated
        kind, group, seed = config.training.engine, config.copra.gate_group, config.federation.seed
        core = find_rule(config.aggregation.rule).core
        self.engine = open_engine(kind, config.model, group, len(federated.label_names), seed, core)
        self.model = self.engine.model

    def score(self, adapters: Sequence[Adapter], residual: Adapter, indices: np.ndarray) -> list[Row]:
        """What `evaluate_each` tells of each adapter, beside W0 + `residual`, on the examples `indices`."""
        self.model.write_residual(residual)
        return evaluate_each(self.engine, adapters, self.federated, indices, self.config.evaluation.eval_batch_size)

    def start(self) -> State:
        """The state before the first round."""
        adapter, config = self.model.read_adapter(), self.config
        if find_rule(config.aggregation.rule).core:
            indices, batch_size = self.federated.server_validation, config.evaluation.eval_batch_size
            adapter = core_start(self.model, self.federated.examples, indices, batch_size)
        zeros = {name: torch.zeros_like(tensor) for name, tensor in adapter.items()}
        return State(adapter, control=zeros if config.aggregation.control_variates else {})

    def validate(self, adapters: Sequence[Adapter], residual: Adapter) -> list[Row]:
        """`score` on the server's validation data."""
        return self.score(adapters, residual, self.federated.server_validation)

    def round_metrics(self, state: State, before: State, updates: list[Update]) -> Row:
        """Validation metrics of the average, and how much better it is than its parts (the merge gap).

        `updates` are those of the clients chosen for the merge gap, in order. With several data sets each is evaluated
        on its own.
        """
        (average,) = self.validate([state.adapter], state.residual)
        row: Row = {"validation": average}
        own: list[Row] = []
        for number, some in groupby(updates, lambda update: self.federated.dataset_of(update.client)):
            indices = self.federated.among(self.federated.server_validation, [number])
            own += self.score([complete(update, before.adapter) for update in some], before.residual, indices)
        if updates:
            row["merge_gap"] = merge_gap_each(average, own, [update.num_examples for update in updates])
        return row

    def paths(self, before: State, pairs: list[tuple[Update, Update]]) -> list[Row]:
        """Loss and accuracy along the line between the adapters of each pair of clients, with both barriers.

        Of clients with unlike data sets each end has the other's rows of the head for the other's data set, and the
        whole line is evaluated on both.
        """
        rows = []
        for a, b in pairs:
            numbers = [self.federated.dataset_of(update.client) for update in (a, b)]
            whole = [complete(update, before.adapter) for update in (a, b)]
            start, end = lend(whole, numbers, [a.num_examples, b.num_examples], self.federated.head_sizes)
            indices = self._path_examples(numbers)
            evaluated = partial(self.score, residual=before.residual, indices=indices)
            path = walk(evaluated, start, end, self.config.evaluation.path_points)
            rows.append({"clients": [a.client, b.client], **path.facts})
        return rows

    def _path_examples(self, numbers: Collection[int | None]) -> np.ndarray:
        """Validation examples for a line, ``path-examples`` at most of each of these data sets."""
        most, seed = self.config.evaluation.path_examples, self.config.federation.seed
        shuffled = generator(seed, "path-examples").permutation(self.federated.server_validation)
        return np.concatenate([self.federated.among(shuffled, [number])[:most] for number in dict.fromkeys(numbers)])


def run(grid: Grid, config: Config, directory: Path) -> None:
    """Run the federation of `config` in `directory`, from its newest checkpoint, to ``summary.json``."""
    journal = Journal(directory)
    if journal.finished:
        emit("finished", accuracy=None)
        return
    emit("run", directory=str(directory), rounds=config.federation.num_rounds)
    tasks.check(config)
    greeting = settle(config)
    nodes = greet(grid, greeting)
    config = greeting.changed(num_clients=next(iter(nodes.values())).num_clients)
    check(config)
    federated = load_data(config, load_processor(config.model))
    evaluator = Evaluator(config, federated)
    model = evaluator.model
    if evaluator.engine.note:
        log(INFO, evaluator.engine.note)
        emit("note", text=evaluator.engine.note)
    state = journal.resume() or evaluator.start()
    write_provenance(journal, evaluator)
    names = model.gates.names
    budget = Budget(config.privacy, journal.rows) if config.privacy.dp_clip else None
    strategy = CohortStrategy(
        config,
        model.group_of,
        len(names),
        nodes,
        state,
        journal.run,
        evaluator.validate,
        open_secret(directory) if budget else 0,
        federated.datasets,
    )
    strategy.summary()
    num_rounds = config.federation.num_rounds
    if budget:
        budget.check(strategy.sampling_rate, num_rounds - len(journal.rows))
    for server_round in range(len(journal.rows) + 1, num_rounds + 1):
        if config.federation.failures == "tolerant":
            nodes = welcome(grid, greeting, nodes)
            strategy.meet(nodes)
        before = strategy.state
        row = train_round(grid, strategy, server_round)
        row["layers"] = names
        if budget:
            row["privacy"] = budget.spend(strategy.sampling_rate)
        sampled, updates = strategy.sample(server_round), {update.client: update for update in strategy.updates}
        if evaluated(config, server_round):
            emit("evaluating", round=server_round)
            if config.data.dataset:
                chosen = merge_gap_clients(config, server_round, sampled)
                row |= evaluator.round_metrics(strategy.state, before, [updates[c] for c in chosen if c in updates])
            else:
                row["validation"] = weighted_mean(evaluate_clients(grid, strategy, server_round))
        if server_round == num_rounds:
            pairs = path_pairs(config, server_round, sampled)
            row["paths"] = evaluator.paths(
                before, [(updates[a], updates[b]) for a, b in pairs if a in updates and b in updates]
            )
        journal.record(row, strategy.state)
        log(INFO, "round %s: validation %s", server_round, row.get("validation"), extra=figures(row))
        emit("recorded", round=server_round, accuracy=(row.get("validation") or {}).get("accuracy"))
    finish(grid, strategy, evaluator, journal)


def settle(config: Config) -> Config:
    """`config` with all made plain that server and nodes must agree on: dtype, attention, base; labels of own data.

    Raises ConfigError where the base is not the one that ``model-sha256`` names.
    """
    config = resolve_config(config).changed(model_sha256=check_weights(config.model))
    if config.data.partitioner != "own":
        return config
    return config.changed(labels=csv_line(load_data(config, load_processor(config.model)).label_names))


def train_round(grid: Grid, strategy: CohortStrategy, server_round: int) -> Row:
    """One round of local training and aggregation, which moves the strategy's state on: the round's journal line."""
    started = time.perf_counter()
    config = strategy.config
    arrays = ArrayRecord(torch_state_dict=strategy.state.adapter)
    messages = list(strategy.configure_train(server_round, arrays, ConfigRecord(), grid))
    emit("round", round=server_round, clients=len(strategy.sample(server_round)))
    replies = exchange(
        grid, messages, config.federation.round_timeout_s, strategy.is_enough,
        heard=lambda replies: emit("replied", clients=strategy.num_answered(replies)),
    )  # fmt: skip
    _, metrics = strategy.aggregate_train(server_round, replies)
    assert metrics is not None
    return {
        "round": server_round,
        "seconds": time.perf_counter() - started,
        "bytes_down": sum(wire.num_bytes(message.content) for message in messages),
        "bytes_up": sum(wire.num_bytes(reply.content) for reply in replies if reply.has_content()),
        "train_loss": metrics["loss"] if strategy.updates else None,
        "aggregation_error": strategy.error,
        "notes": strategy.notes,
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


def figures(row: Row) -> Row:
    """What a log line carries of a round, beside its words."""
    names = ("round", "seconds", "bytes_up", "bytes_down", "train_loss", "missing")
    return {name: row[name] for name in names} | {"validation": row.get("validation"), "clients": len(row["clients"])}


def evaluate_clients(grid: Grid, strategy: CohortStrategy, server_round: int) -> list[Row]:
    """Loss, accuracy and number of examples of each client on its own validation data, after a round."""
    arrays = ArrayRecord(torch_state_dict=strategy.state.adapter)
    messages = strategy.configure_evaluate(server_round, arrays, ConfigRecord(), grid)
    replies = exchange(grid, messages, strategy.config.federation.round_timeout_s)
    metrics = strategy.aggregate_evaluate(server_round, replies)
    assert metrics is not None
    columns = {name: list(values) for name, values in metrics.items()}  # type: ignore[arg-type]
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def weighted_mean(clients: Sequence[Row]) -> Row | None:
    """Loss and accuracy over all the clients' validation examples; None where there are none."""
    examples = [client["examples"] for client in clients]
    if not clients:
        return None
    means = {name: float(np.average([row[name] for row in clients], weights=examples)) for name in ("loss", "accuracy")}
    return {**means, "examples": sum(examples)}


def write_provenance(journal: Journal, evaluator: Evaluator) -> None:
    """``provenance.json``, also of each resume: what ran may have changed in between."""
    config = evaluator.config
    origin = {
        "run": journal.run,
        "after_round": len(journal.rows),
        "versions": provenance.versions(),
        "source_digest": provenance.library_digest(CLIENTS),
        "machine": provenance.machine(),
        "seed": config.federation.seed,
        "engine": evaluator.engine.note or config.training.engine,
        "data_digest": evaluator.federated.digest,
        "assets": {name: ASSETS[name].sha256 for name in (*config.data.datasets, config.model.model) if name in ASSETS},
    }
    journal.add_provenance(origin)


def finish(grid: Grid, strategy: CohortStrategy, evaluator: Evaluator, journal: Journal) -> None:
    """The test, the clients' own validation, the model in PEFT's format, the summary.

    With a personal rule there is no global model to test or to write.
    """
    config, federated, rows, state = strategy.config, evaluator.federated, journal.rows, strategy.state
    emit("testing")
    clients, test, held_out = evaluate_clients(grid, strategy, len(rows)), None, None
    if config.data.dataset and not strategy.rule.personal:
        (test,) = evaluator.score([state.adapter], state.residual, federated.test)
        if len(federated.held_out):
            (held_out,) = evaluator.score([state.adapter], state.residual, federated.held_out)
    if not strategy.rule.personal:
        evaluator.model.write_adapter(state.adapter)
        save(evaluator.model, journal.directory / "adapter", federated.label_names, state.residual)
    last = rows[-1]
    errors = [row["aggregation_error"]["total"] for row in rows if row["aggregation_error"]]
    journal.write_json(
        "summary.json",
        {
            "method": config.copra.local_training,
            "rule": config.aggregation.rule,
            "personal": strategy.rule.personal,
            "seed": config.federation.seed,
            "rounds": len(rows),
            "test": test,
            "held_out": held_out,
            "validation": last.get("validation"),
            "merge_gap": last.get("merge_gap"),
            "privacy": last.get("privacy"),
            "aggregation_error": fmean(errors) if errors else None,
            "bytes_up": sum(row["bytes_up"] for row in rows),
            "bytes_down": sum(row["bytes_down"] for row in rows),
            "seconds": sum(row["seconds"] for row in rows),
            "clients": clients,
            "paths": last["paths"],
            "skipped_clients": federated.skipped,
            "unassigned_examples": federated.dropped.unassigned,
            "dropped_duplicates": federated.dropped.duplicates,
            "dropped_empty": federated.dropped.empty,
        },
    )
    forget_secret(journal.directory)
    emit("finished", accuracy=test["accuracy"] if test else None)
