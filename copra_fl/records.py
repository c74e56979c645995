"""Records: the schema of the JSON files in the folders of runs, comparisons and studies.

    run            journal.jsonl (`RoundRecord`), summary.json (`RunSummary`), provenance.json (`Provenance`)
    comparison     summary.json (`ComparisonSummary`)
    study          results.json (`StudyResults`)

The server writes those of a run (`server.journal`), `copra_fl.reporting` writes the others and reads all of them;
nothing else parses these files. A field that was not measured is None or empty, never absent.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

ConfigValue = str | int | float | bool


class RecordError(ValueError):
    """JSON that is not valid, or does not follow the schema. The message names the first bad field and the problem."""


class Record(BaseModel):
    """A record: immutable, without unknown fields, as one JSON object."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")

    def to_json(self, indent: int | None = None) -> str:
        """Return the record as JSON; a number that is not finite is NaN or Infinity, as Python writes it."""
        return self.model_dump_json(indent=indent)

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Parse `to_json`'s output. Raises RecordError for another schema: runs of other versions are not readable."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            problems = error.errors()
            field, message = ".".join(map(str, problems[0]["loc"])), problems[0]["msg"]
            if problems[0]["type"] == "json_invalid":
                raise RecordError(f"not valid JSON: {message}") from None
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            raise RecordError(
                f"not a {cls.__name__} of this version of copra-fl, and results of other versions cannot be read: "
                f"{field or 'the record'}: {message}{more}"
            ) from None


class Evaluation(Record):
    """Metrics of a model on `examples` examples.

    Attributes:
        loss: mean over targets, in nats.
        accuracy: share of targets predicted correctly, in [0, 1].
        metrics: the task's own, such as ``perplexity``.
        datasets: the same for each data set, where there are several; then the other fields are means over data sets.
    """

    loss: float
    accuracy: float
    examples: int
    metrics: dict[str, float] = {}
    datasets: dict[str, Evaluation] = {}

    @classmethod
    def of(cls, measured: Mapping[str, Any]) -> Evaluation:
        """Return the record of what `training.evaluation.evaluate_each` measured of one adapter."""
        known = {name: measured[name] for name in ("loss", "accuracy", "examples")}
        datasets = {name: cls.of(metrics) for name, metrics in measured.get("datasets", {}).items()}
        metrics = {name: value for name, value in measured.items() if name not in known and name != "datasets"}
        return cls(**known, metrics=metrics, datasets=datasets)


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
        loss: mean over the steps.
        steps: optimizer steps.
        seconds: of its training; clients that trained together have equal shares.
        distance: Euclidean norm of the change of its adapter.
        memory: the largest number of bytes that autograd kept for the backward pass of one of its steps; clients that
            trained together have equal shares. None without client-depths.
        staleness: age in rounds of the global adapter that it started from; 0: the newest.
    """

    client: int
    examples: int
    active_steps: tuple[float, ...]
    loss: float
    steps: float
    seconds: float
    distance: float
    memory: float | None = None
    staleness: int = 0


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
    """Relative Frobenius error of the new global adapter against the average of products (`products`).

    Attributes:
        layers: the same by adapted module.
    """

    total: float
    layers: dict[str, float]


class LinePath(Record):
    """Loss and accuracy on the line between two clients' adapters (`adapters.interpolation.Path`), at points `u`."""

    clients: tuple[int, int]
    u: tuple[float, ...]
    loss: tuple[float, ...]
    accuracy: tuple[float, ...]
    barrier_entezari: float
    barrier_frankle: float
    midpoint_gap: float


class PrivacySpent(Record):
    """Differential privacy spent up to and including a round (`aggregation.accounting`)."""

    epsilon: float
    delta: float
    sampling_rate: float
    noise_multiplier: float
    clip: float


class RoundRecord(Record):
    """One line of ``journal.jsonl``.

    Attributes:
        round: from 1.
        seconds: from sending the first message to the new global adapter.
        bytes_down, bytes_up: contents of all messages to and from the nodes.
        train_loss: mean over clients, weighted by examples; None if no client replied.
        layers: names of the gate groups, in the order of `ClientRecord.active_steps`.
        tiers: the clients by depth, from the smallest; empty without client-depths.
        notes: of the rule, plain data.
        validation: of the new global adapter; None in rounds without evaluation.
        merge_gap, paths, privacy: None or empty where not measured.
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


class ClientEvaluation(Record):
    """The final model on one client's own validation examples."""

    client: int
    loss: float
    accuracy: float
    examples: int


class RunSummary(Record):
    """``summary.json``: the results of a finished run.

    Attributes:
        method: local training.
        personal: whether each client keeps a part of the model, so that there is no global model to test.
        test: on test data; None for a personal rule or a server without data.
        held_out: on the clients that are held out whole; None without such clients.
        aggregation_error: mean over the rounds in which it is known.
        clients: the final model on each client's own validation data.
        skipped_clients: clients without training examples.
        unassigned_examples: examples that the partitioner gave to no client.
        dropped_duplicates: held-out examples dropped because a client holds an equal one.
        dropped_empty: rows dropped because content, label or client is missing.
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


class Origin(Record):
    """The software, data and machine of one start of a run.

    Attributes:
        after_round: rounds that were finished before; above 0 for a resume.
        source_digest: of the library and of ``clients/`` (`provenance.library_digest`).
        engine: the engine that trains, or why it is not the configured one.
        assets: name -> SHA-256.
    """

    after_round: int
    versions: dict[str, str]
    source_digest: str
    machine: dict[str, str | int]
    engine: str
    data_digest: str
    assets: dict[str, str]


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


class Estimate(Record):
    """One metric over seeds.

    Attributes:
        mean: None if a seed has no finite value.
        interval: the 95 % t-interval of the mean; None also for one seed.
        values: one per seed, in the order of `MetricEstimates.seeds`; None where the value is not finite.
    """

    mean: float | None
    interval: tuple[float, float] | None
    values: tuple[float | None, ...]


class MetricEstimates(Record, extra="allow"):
    """An `Estimate` of each of `reporting.statistics.metrics` over `seeds`; in JSON each metric is a key of its own."""

    __pydantic_extra__: dict[str, Estimate]
    seeds: tuple[int, ...]

    @property
    def metrics(self) -> dict[str, Estimate]:
        """Return metric -> estimate; empty before a seed has finished."""
        return self.__pydantic_extra__

    def get(self, metric: str) -> Estimate:
        """Return the estimate of `metric`, without a mean if it was not measured."""
        return self.metrics.get(metric, Estimate(mean=None, interval=None, values=()))


class ComparedSettings(Record):
    """Configurations of several methods.

    Attributes:
        common: key -> value, where all methods agree.
        differing: key -> method -> value; None for a method without that key.
    """

    common: dict[str, ConfigValue]
    differing: dict[str, dict[str, ConfigValue | None]]


class UnfinishedRun(Record):
    """A run of a comparison without a summary, and the number of its finished rounds."""

    method: str
    seed: int
    rounds: int


class ComparisonSummary(Record):
    """``summary.json`` of a comparison.

    Attributes:
        baseline: the method that the others are compared with.
        seeds: those asked for.
        methods: over the finished seeds of each method.
        differences: of each other method, its metrics minus the baseline's, over the seeds that both have finished.
        personal: methods with one model per client instead of a global model.
        settings: without the seed.
    """

    baseline: str
    seeds: tuple[int, ...]
    methods: dict[str, MetricEstimates]
    differences: dict[str, MetricEstimates]
    personal: tuple[str, ...]
    settings: ComparedSettings
    unfinished: tuple[UnfinishedRun, ...]


class ChosenRate(Record):
    """The learning rate of a method, and the mean validation accuracy of every rate that was tried."""

    chosen: float
    validation_accuracy: dict[str, float]


class CellResults(ComparisonSummary):
    """One split in one regime of a study: the comparison on test seeds, and the choice of each method's rate."""

    split: str
    regime: str
    tuning_seeds: tuple[int, ...]
    rates: dict[str, ChosenRate]


class StudyResults(Record):
    """``results.json`` of one grid of a study: how it was made, and its cells."""

    command: str
    versions: dict[str, str]
    machine: dict[str, str | int]
    cells: tuple[CellResults, ...]
