"""The round loop: register nodes, then train, aggregate, evaluate and record, starting from the newest checkpoint.

One call of `run` runs one federation to its end. A comparison calls it for one run after another while Flower's workers
stay warm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from logging import INFO, WARNING
from math import isfinite
from pathlib import Path

from flwr.serverapp import Grid
from flwr.supercore.logger import log

from copra_fl import plugins, provenance
from copra_fl.adapters.server_state import ServerState
from copra_fl.aggregation import compatibility
from copra_fl.aggregation.starts import has_own_start
from copra_fl.config import Config, csv_line
from copra_fl.copra.layers import check_layers
from copra_fl.data.federated import load_data
from copra_fl.events import emit
from copra_fl.models.build import check_weights, load_processor, resolve_config
from copra_fl.models.card import Training
from copra_fl.models.export import save
from copra_fl.records import Origin, PrivacySpent, RoundRecord
from copra_fl.sources.assets import find_asset, is_asset
from copra_fl.tasks import find_task
from copra_fl.training.plan import leaves_state
from server.aggregate import earlier_after
from server.audit import AuditLog
from server.early_end import reason_to_end, validation_accuracies
from server.errors import FederationError
from server.evaluator import Evaluator
from server.handshake import CLIENTS, admit_late_nodes, register_nodes
from server.journal import Journal
from server.privacy_budget import PrivacyBudget
from server.rounds import RoundEvaluation, RoundTraining, evaluate_clients, evaluate_round, train_round
from server.run_context import RunContext
from server.run_records import log_fields, round_record, summarize
from server.strategy import CohortStrategy, TrainResult


def run(grid: Grid, config: Config, directory: Path) -> None:
    """Run the federation of `config` in `directory`, from its newest checkpoint, to ``summary.json``."""
    journal = Journal(directory)
    if journal.finished:
        emit("finished", accuracy=None)
        return
    emit("run", directory=str(directory), rounds=config.federation.num_rounds)
    compatibility.check(config, find_task(config.model.task))

    audit = AuditLog(directory, journal.run)
    audit.begin(config, provenance.library_digest(CLIENTS), resumed=journal.begun)
    emit("stage", text="checking the base model")
    settled = settle(config)
    resumed = resume(journal, settled)
    is_over = len(journal.records) >= config.federation.num_rounds or reason_to_end(config, journal.records)
    emit("stage", text="waiting for the workers")
    nodes = register_nodes(grid, settled, audit, has_rounds=not is_over)
    config = settled.changed(num_clients=next(iter(nodes.values())).num_clients)
    compatibility.check(config, find_task(config.model.task))  # again, where the number of clients was not known before

    evaluator = open_evaluator(config)
    state = resumed or evaluator.start_state()
    write_provenance(journal, evaluator)
    strategy = CohortStrategy(run_context(journal, evaluator), nodes, state)
    audit.admit(nodes, strategy.run.config)
    log(INFO, "%s over %s clients on %s nodes", config.aggregation.rule, len(strategy.num_examples), len(nodes))
    budget = open_budget(journal, strategy)

    ended: str | None = None
    for server_round in range(len(journal.records) + 1, config.federation.num_rounds + 1):
        if ended := reason_to_end(config, journal.records):
            break
        if config.federation.failures == "tolerant":
            nodes = admit_late_nodes(grid, settled, nodes, audit)
            strategy.set_nodes(nodes)
            audit.admit(nodes, strategy.run.config)
        if budget and journal.records and (ended := budget.reason_to_end(strategy.sampling_rate)):
            break
        accuracies = validation_accuracies(config, journal.records)
        record = run_round(grid, strategy, evaluator, budget, server_round, accuracies)
        journal.record(record, strategy.state, config.federation.keep_checkpoints)
        announce(record)
    if ended:
        emit("note", text=f"{directory.name} ended in round {len(journal.records)}: {ended}")

    finish(grid, strategy, evaluator, journal, ended)
    audit.finish(len(journal.records))


def resume(journal: Journal, config: Config) -> ServerState | None:
    """Return the state in the newest checkpoint; None at the start.

    Raises RecordError as `Journal.resume` does, and for a run of an earlier version whose clients keep state: its
    checkpoints do not say after which round that state is.
    """
    state = journal.resume()
    if state is None or not leaves_state(config) or state.last_rounds:
        return state
    if any(record.clients for record in journal.read()):
        raise journal.other_version()
    return state


def run_round(
    grid: Grid,
    strategy: CohortStrategy,
    evaluator: Evaluator,
    budget: PrivacyBudget | None,
    server_round: int,
    accuracies: Sequence[float],
) -> RoundRecord:
    """Train, aggregate and evaluate one round; the strategy has the next state afterwards.

    A new state that is not finite or cannot be evaluated is refused, and the old one stays.

    Args:
        accuracies: of the earlier evaluations.

    Raises FederationError if a new state is refused and failures are not tolerated.
    """
    before = strategy.state

    def charge(clients: Sequence[int]) -> PrivacySpent | None:
        return budget.charge(strategy.sampling_rate, clients) if budget else None

    # it is charged before the evaluation sends the new adapter to the clients
    training = train_round(grid, strategy, server_round, charge)
    evaluation = RoundEvaluation()
    problem = "" if strategy.state.is_finite else "has values that are not finite"
    if not problem:
        evaluation = evaluate_round(grid, strategy, evaluator, before, training, accuracies)
        if evaluation.validation and not isfinite(evaluation.validation.loss):
            problem = f"has a validation loss of {evaluation.validation.loss}"
    if problem:
        training = refuse(strategy, before, training, problem)
        evaluation = evaluate_round(grid, strategy, evaluator, before, training, accuracies)
    return round_record(evaluator.config, training, evaluator.model.gates.names, evaluation)


def refuse(strategy: CohortStrategy, before: ServerState, training: RoundTraining, problem: str) -> RoundTraining:
    """Restore the state `before` the round and return the round without updates: all of its clients are missing.

    The restored adapter is also the first of its older ones: a round has passed, whose number ages are counted by.

    Raises FederationError if failures are not tolerated, and for a round in which clients start from their own A: they
    would all start from the common one in the next.
    """
    config, result, number = strategy.run.config, training.result, training.request.server_round
    client = max(result.lengths, key=result.lengths.__getitem__, default=None)
    reason = f"round {number} is refused: the new global adapter {problem}"
    if client is not None:
        reason += f"; the longest update is that of client {client}, with a norm of {result.lengths[client]:.3g}"
    strategy.restore(replace(before, earlier=earlier_after(config, before)))
    if config.federation.failures == "strict" or has_own_start(config, number - 1):
        raise FederationError(
            f"{reason}. --resume does the round again; a lower learning rate or max-update-norm may help"
        )
    log(WARNING, "%s", reason)
    emit("note", text=reason)
    missing = result.missing | {update.client: reason for update in result.updates}
    refused = TrainResult([], dict(sorted(missing.items())), result.loss, None, {"refused": reason})
    return replace(training, result=refused)


def settle(config: Config) -> Config:
    """Resolve what server and nodes must agree on: dtype, attention, base model, and the labels of nodes' own data.

    Raises ConfigError if the base model is not the one that ``model-sha256`` names.
    """
    config = resolve_config(config).changed(model_sha256=check_weights(config.model))
    if config.data.partitioner != "own":
        return config
    return config.changed(labels=csv_line(load_data(config, load_processor(config.model)).label_names))


def open_evaluator(config: Config) -> Evaluator:
    """Load the server's data and model; tell the user if another engine than the configured one trains.

    Raises ConfigError if the model has fewer layers than the configuration asks for.
    """
    emit("stage", text="opening the data")
    data = load_data(config, load_processor(config.model))
    emit("stage", text="loading the model")
    evaluator = Evaluator(config, data)
    check_layers(config, len(evaluator.model.gates.names))
    if note := evaluator.engine.note:
        log(INFO, note)
        emit("note", text=note)
    return evaluator


def run_context(journal: Journal, evaluator: Evaluator) -> RunContext:
    """Return what stays the same in all rounds of the run."""
    config, model = evaluator.config, evaluator.model
    return RunContext(
        run=journal.run,
        directory=journal.directory,
        config=config,
        group_of=model.group_of,
        num_groups=len(model.gates.names),
        score=evaluator.validate,
        datasets=evaluator.data.datasets,
    )


def open_budget(journal: Journal, strategy: CohortStrategy) -> PrivacyBudget | None:
    """Return the privacy budget after the finished rounds; None in a run without differential privacy.

    Raises ConfigError if the run has spent nothing yet and its rounds would exceed it.
    """
    config = strategy.run.config
    if not config.privacy.dp_clip:
        return None
    budget = PrivacyBudget(journal.directory, config.privacy, len(journal.records))
    if not budget.is_charged:
        budget.check(strategy.sampling_rate, config.federation.num_rounds)
    return budget


def announce(record: RoundRecord) -> None:
    """Log a finished round and report it to the command line."""
    validation = record.validation
    metrics = f"loss {validation.loss:.4f}, accuracy {validation.accuracy:.4f}" if validation else "not evaluated"
    ended = f"; the run ends: {record.ended_early}" if record.ended_early else ""
    log(INFO, "round %s: %s%s", record.round, metrics, ended, extra=log_fields(record))
    emit("recorded", round=record.round, accuracy=validation.accuracy if validation else None)


def write_provenance(journal: Journal, evaluator: Evaluator) -> None:
    """Write ``provenance.json``, also at each resume: software, data and machine can have changed since the start."""
    config = evaluator.config
    names = list(filter(is_asset, (*config.data.datasets, config.model.model)))
    origin = Origin(
        after_round=len(journal.records),
        versions=provenance.versions(),
        source_digest=provenance.library_digest(CLIENTS),
        machine=provenance.machine(),
        engine=evaluator.engine.note or config.training.engine,
        data_digest=evaluator.data.digest,
        assets={name: find_asset(name).sha256 for name in names},
        plugins=plugins.digests(config),
    )
    journal.add_origin(config.federation.seed, origin)


def finish(
    grid: Grid, strategy: CohortStrategy, evaluator: Evaluator, journal: Journal, ended_early: str | None
) -> None:
    """Test the final model, evaluate it on the clients, export it in PEFT's format, and write the summary.

    With a personal rule there is no global model to test or to export. `ended_early` is the reason why the run ends
    before the last of num-rounds.
    """
    emit("testing")
    state = strategy.state
    clients = [one for one in evaluate_clients(grid, strategy, len(journal.records)) if isfinite(one.loss)]
    test, held_out = evaluator.test(state)
    base = evaluator.evaluate_base() if test else (None, None)
    summary = summarize(journal.read(), ended_early, evaluator, clients, test, held_out, base)
    if not strategy.run.rule.personal:
        evaluator.model.write_adapter(state.adapter)
        folder, labels, config = journal.directory / "adapter", evaluator.data.label_names, evaluator.config
        datasets = {dataset.name: len(dataset.labels) for dataset in evaluator.data.datasets}
        save(evaluator.model, folder, labels, config.data, state.residual, Training(config, summary), datasets)
    journal.write_summary(summary)
    emit("finished", accuracy=test.accuracy if test else None)
