"""Records of a round and of a finished run, from their results."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from copra_fl.adapters.state import Update
from copra_fl.aggregation import find_rule
from copra_fl.config import Config
from copra_fl.copra.layers import by_depth
from copra_fl.records import (
    ClientEvaluation,
    ClientRecord,
    Evaluation,
    MissingClient,
    RoundRecord,
    RunSummary,
    Tier,
)
from copra_fl.reporting import work
from server.evaluator import Evaluator
from server.rounds import RoundEvaluation, RoundTraining


def round_record(
    config: Config,
    training: RoundTraining,
    layers: Sequence[str],
    evaluation: RoundEvaluation,
) -> RoundRecord:
    """Return the journal line of a round. `layers` are the names of the gate groups."""
    result = training.result
    return RoundRecord(
        round=training.request.server_round,
        seconds=training.seconds,
        bytes_down=training.bytes_down,
        bytes_up=training.bytes_up,
        train_loss=result.loss,
        layers=tuple(layers),
        clients=tuple(client_record(update, training.request.ages.get(update.client, 0)) for update in result.updates),
        missing=tuple(MissingClient(client=client, reason=reason) for client, reason in result.missing.items()),
        aggregation_error=result.error,
        tiers=tiers(config, result.updates),
        notes=result.notes,
        validation=evaluation.validation,
        merge_gap=evaluation.merge_gap,
        paths=evaluation.paths,
        privacy=training.privacy,
        ended_early=evaluation.ended_early,
    )


def client_record(update: Update, staleness: int) -> ClientRecord:
    """Return the record of one client's training; loss and distance are None where the client reports none."""
    metrics: dict[str, Any] = {"loss": None, "distance": None} | update.metrics
    return ClientRecord(
        client=update.client,
        examples=update.num_examples,
        active_steps=update.active_steps,
        staleness=staleness,
        **metrics,
    )


def tiers(config: Config, updates: Sequence[Update]) -> tuple[Tier, ...]:
    """Return seconds and memory of the clients of each depth; nothing without client-depths."""
    if not config.copra.client_depths:
        return ()
    metrics = {update.client: update.metrics for update in updates}
    return tuple(
        Tier(
            depth=depth,
            clients=tuple(clients),
            seconds=fmean(metrics[client]["seconds"] for client in clients),
            memory=fmean(metrics[client].get("memory", 0.0) for client in clients),
        )
        for depth, clients in by_depth(config, metrics).items()
    )


def log_fields(record: RoundRecord) -> dict[str, Any]:
    """Return the numbers of a round for a log line in JSON."""
    names = {"round", "seconds", "bytes_up", "bytes_down", "train_loss", "missing", "validation", "ended_early"}
    return {**record.model_dump(mode="json", include=names), "clients": len(record.clients)}


def summarize(
    records: Sequence[RoundRecord],
    ended_early: str | None,
    evaluator: Evaluator,
    clients: Sequence[ClientEvaluation],
    test: Evaluation | None,
    held_out: Evaluation | None,
    base: tuple[Evaluation | None, Evaluation | None],
) -> RunSummary:
    """Return the summary of a run from its rounds and its final evaluations.

    `base` is the evaluation of the model before the first round, on test and validation data.
    """
    config, data, last = evaluator.config, evaluator.data, records[-1]
    errors = [record.aggregation_error.total for record in records if record.aggregation_error]
    return RunSummary(
        method=config.copra.local_training,
        rule=config.aggregation.rule,
        personal=find_rule(config.aggregation.rule).personal,
        seed=config.federation.seed,
        rounds=len(records),
        ended_early=ended_early,
        passes=work.passes(config, records),
        flops=work.flops(records),
        aggregation_error_of_change=work.error_of_change(records),
        test=test,
        held_out=held_out,
        base_test=base[0],
        base_validation=base[1],
        labels=tuple(data.label_names) if test and test.confusion else (),
        validation=last.validation,
        merge_gap=last.merge_gap,
        privacy=last.privacy,
        aggregation_error=fmean(errors) if errors else None,
        bytes_up=sum(record.bytes_up for record in records),
        bytes_down=sum(record.bytes_down for record in records),
        seconds=sum(record.seconds for record in records),
        clients=tuple(clients),
        paths=last.paths,
        skipped_clients=tuple(data.skipped),
        unassigned_examples=data.dropped.unassigned,
        dropped_duplicates=data.dropped.duplicates,
        dropped_empty=data.dropped.empty,
    )
