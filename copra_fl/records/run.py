"""Records of a run: journal.jsonl (`RoundRecord`), summary.json (`RunSummary`), provenance.json (`Provenance`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from copra_fl.records.record import DamagedRecord, Record


class Evaluation(Record):
    """Metrics of a model on `examples` examples.

    Attributes:
        loss: mean over targets, in nats.
        accuracy: share of targets predicted correctly, in [0, 1].
        metrics: the task's own, such as ``perplexity``, and those of `class_metrics`.
        confusion: row i, column j counts the examples of class i that were predicted as class j; empty except in the
            final test of a task with one label per example, of at most `class_metrics.MAX_CLASSES` classes.
        datasets: the same for each data set, where there are several; then the other fields are means over data sets.
    """

    loss: float
    accuracy: float
    examples: int
    metrics: dict[str, float] = {}
    confusion: tuple[tuple[int, ...], ...] = ()
    datasets: dict[str, Evaluation] = {}

    @classmethod
    def of(cls, measured: Mapping[str, Any], with_confusion: bool = False) -> Evaluation:
        """Return the record of what `training.evaluation.evaluate_each` measured of one adapter."""
        known = {name: measured[name] for name in ("loss", "accuracy", "examples")}
        datasets = {name: cls.of(metrics) for name, metrics in measured.get("datasets", {}).items()}
        others = {name: value for name, value in measured.items() if name not in (*known, "datasets", "confusion")}
        matrix = measured.get("confusion", ()) if with_confusion else ()
        return cls(**known, metrics=others, confusion=tuple(map(tuple, matrix)), datasets=datasets)


class MergeGap(Record):
    """Metrics of the average minus the mean of the clients' own adapters: accuracy above 0 is better than its parts.

    Attributes:
        datasets: the same for each data set, where there are several.
    """

    loss: float
    accuracy: float
    datasets: dict[str, MergeGap] = {}


class ClientRecord(Record):
    """Training of one client in one round.

    Attributes:
        examples: training examples the client holds.
        active_steps: per gate group, the optimizer steps in which its adapters were on.
        loss: mean over the steps; None if it stays on the node (dp-clip with secure-aggregation), as `distance`.
        steps: optimizer steps.
        seconds: of its training; clients that trained together have equal shares.
        distance: Euclidean norm of the change of its adapter.
        staleness: age in rounds of the global adapter that it started from; 0: the newest.
        flops: estimated floating point operations (`models.flops`); None as `loss`, and in journals from before it
            was counted.
        memory: the largest number of bytes that autograd kept for the backward pass of one of its steps; clients that
            trained together have equal shares. None without client-depths.
    """

    client: int
    examples: int
    active_steps: tuple[float, ...]
    loss: float | None
    steps: float
    seconds: float
    distance: float | None
    staleness: int = 0
    flops: float | None = None
    memory: float | None = None


class Tier(Record):
    """The clients of one depth in one round (``client-depths``).

    Attributes:
        depth: number of layers that each client trains.
        seconds: mean over clients of the seconds of training.
        memory: mean over clients of `ClientRecord.memory`.
    """

    depth: int
    clients: tuple[int, ...]
    seconds: float
    memory: float


class MissingClient(Record):
    """A sampled client without a valid update, and the reason."""

    client: int
    reason: str


class AggregationError(Record):
    """Frobenius error of the new global adapter against the average of products (`products.aggregation_error`).

    Attributes:
        total: relative to the average of products.
        layers: the same by adapted module.
        of_change: relative to the change of the average of products in the round; None in journals from before it was
            measured.
    """

    total: float
    layers: dict[str, float]
    of_change: float | None = None


class LinePath(Record):
    """Loss and accuracy between two clients' adapters at points `u` of the line (`adapters.interpolation.LossPath`)."""

    clients: tuple[int, int]
    u: tuple[float, ...]
    loss: tuple[float, ...]
    accuracy: tuple[float, ...]
    barrier_entezari: float
    barrier_frankle: float
    midpoint_gap: float


class PrivacySpent(Record):
    """Differential privacy spent up to and including a round (`aggregation.accounting`).

    Attributes:
        epsilon: towards those who see the models and not who was sampled.
        server_epsilon: towards the server, of the client that was sampled most often; None if the server sees updates
            without noise.
        noise_multiplier: dp-noise-multiplier; with secure aggregation a sum has as much noise or more.
    """

    epsilon: float
    server_epsilon: float | None = None
    delta: float
    sampling_rate: float
    noise_multiplier: float
    clip: float


class PrivacyCharge(PrivacySpent):
    """One line of ``privacy.jsonl``: the privacy spent up to and including a release.

    Attributes:
        clients: those that were sampled.
    """

    clients: tuple[int, ...] = ()


class RoundRecord(Record):
    """One line of ``journal.jsonl``.

    Attributes:
        round: from 1.
        seconds: from sending the first message to the new global adapter.
        bytes_down, bytes_up: contents of all messages to and from the nodes.
        train_loss: mean over clients, weighted by examples; None if no client reports a loss.
        layers: names of the gate groups, in the order of `ClientRecord.active_steps`.
        tiers: the clients by depth, from the smallest; empty without client-depths.
        notes: of the rule, plain data.
        validation: of the new global adapter; None in rounds without evaluation.
        merge_gap, paths, privacy: None or empty where not measured.
        ended_early: the reason why the run ended with this round, though it is not the last of num-rounds.
    """

    round: int
    seconds: float
    bytes_down: int
    bytes_up: int
    train_loss: float | None
    layers: tuple[str, ...]
    clients: tuple[ClientRecord, ...]
    missing: tuple[MissingClient, ...]
    aggregation_error: AggregationError | None = None
    tiers: tuple[Tier, ...] = ()
    notes: dict[str, Any] = {}
    validation: Evaluation | None = None
    merge_gap: MergeGap | None = None
    paths: tuple[LinePath, ...] = ()
    privacy: PrivacySpent | None = None
    ended_early: str | None = None


def read_lines(journal: Path) -> tuple[list[RoundRecord], list[int]]:
    """Return the records in a ``journal.jsonl``, and the numbers of its damaged lines; a kill leaves half a line.

    Raises RecordError for lines of another version.
    """
    records, damaged = [], []
    for number, line in enumerate(journal.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        try:
            records.append(RoundRecord.from_json(line))
        except DamagedRecord:
            damaged.append(number)
    return records, damaged


class ClientEvaluation(Record):
    """The final model on one client's own validation examples."""

    client: int
    loss: float
    accuracy: float
    examples: int


class Passes(Record):
    """Passes over own training examples of the clients that took part."""

    mean: float
    lowest: float
    highest: float


class RunSummary(Record):
    """``summary.json``: the results of a finished run.

    Attributes:
        method: local training.
        personal: whether each client keeps a part of the model, so that there is no global model to test.
        test: on test data; None for a personal rule, a server without data, or without ``final-test``.
        held_out: on the clients that are held out whole; None without such clients.
        base_test, base_validation: of the model before the first round; None where `test` is None, and in summaries
            from before it was measured.
        labels: names of the classes, in the order of `Evaluation.confusion`; empty without it.
        aggregation_error: `AggregationError.total`, mean over the rounds in which it is known.
        clients: the final model on each client's own validation data.
        skipped_clients: clients without training examples.
        unassigned_examples: examples that the partitioner gave to no client.
        dropped_duplicates: held-out examples dropped because a client holds an equal one.
        dropped_empty: rows dropped because content, label or client is missing.
        ended_early: the reason why the run ended in round `rounds`; None after all of num-rounds.
        passes: in all rounds; None in summaries from before it was counted, as the next two.
        flops: estimated operations of all clients' training (`models.flops`).
        aggregation_error_of_change: `AggregationError.of_change`, mean over the rounds in which it is known.
    """

    method: str
    rule: str
    personal: bool
    seed: int
    rounds: int
    test: Evaluation | None
    held_out: Evaluation | None
    validation: Evaluation | None
    merge_gap: MergeGap | None
    privacy: PrivacySpent | None
    aggregation_error: float | None
    bytes_up: int
    bytes_down: int
    seconds: float
    clients: tuple[ClientEvaluation, ...]
    paths: tuple[LinePath, ...]
    skipped_clients: tuple[int, ...]
    unassigned_examples: int
    dropped_duplicates: int
    dropped_empty: int
    ended_early: str | None = None
    passes: Passes | None = None
    flops: float | None = None
    aggregation_error_of_change: float | None = None
    base_test: Evaluation | None = None
    base_validation: Evaluation | None = None
    labels: tuple[str, ...] = ()


class Origin(Record):
    """The software, data and machine of one start of a run.

    Attributes:
        after_round: rounds that were finished before; above 0 for a resume.
        source_digest: of the library and of ``clients/`` (`provenance.library_digest`).
        engine: the engine that trains, or why it is not the configured one.
        assets: name -> SHA-256.
        plugins: name -> digest (`plugins.digest`).
    """

    after_round: int
    versions: dict[str, str]
    source_digest: str
    machine: dict[str, str | int]
    engine: str
    data_digest: str
    assets: dict[str, str]
    plugins: dict[str, str] = {}


class Provenance(Record):
    """``provenance.json``.

    Attributes:
        run: id of the run, the same after a resume: nodes store what they keep of their clients under it.
        start: the first start.
        resumes: each later one.
    """

    run: str
    seed: int
    start: Origin
    resumes: tuple[Origin, ...] = ()
