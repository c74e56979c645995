"""Open finished runs and score their adapters of any round on held-out data.

A run stores only the global state of each round. The adapters of its clients are trained again: every random stream is
derived from seed, round and client, so the same adapters result.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from copra_fl.adapters.residual import fold
from copra_fl.adapters.server_state import ServerState
from copra_fl.adapters.state import Adapter, complete, parts
from copra_fl.aggregation import find_rule
from copra_fl.aggregation.ranks import pad
from copra_fl.aggregation.starts import ages, client_anchors, client_starts, older_ages
from copra_fl.config import Config
from copra_fl.data.federated import FederatedData, load_data
from copra_fl.files import DamagedFile
from copra_fl.models.build import load_processor, resolve_config
from copra_fl.models.initial_adapter import initial_adapter
from copra_fl.provenance import versions
from copra_fl.records import RoundRecord
from copra_fl.reporting.results import ResultsError, load_run
from copra_fl.training.engine import Engine, engine_of, open_engine, train_all
from copra_fl.training.evaluation import evaluate_each
from copra_fl.training.plan import Plan, Start
from copra_fl.wording import join_words

Split = Literal["server-validation", "test"]
#: metrics of one adapter, as `evaluate_each` returns them
Metrics = dict[str, Any]
#: called with the name of a step, the amount done since the last call, and the total amount
Progress = Callable[[str, float, float], None]


def no_progress(step: str, done: float, total: float) -> None:
    """Ignore reports of progress."""


@dataclass(frozen=True)
class Limitation:
    """A configuration that probes do not support.

    Attributes:
        prevents: opening the run, or training its clients again.
        key: the configuration key that causes it.
        applies: whether a configuration has this limitation.
        reason: why the value of `key` prevents it.
    """

    prevents: Literal["opening", "retraining"]
    key: str
    applies: Callable[[Config], bool]
    reason: str


#: every configuration that a finished run may have and probes do not support
LIMITATIONS = (
    Limitation(
        "opening",
        "rule",
        lambda config: find_rule(config.aggregation.rule).personal,
        "each client keeps a part of its model, so there is no complete global adapter to probe",
    ),
    Limitation(
        "opening",
        "dora",
        lambda config: config.model.dora,
        "probes take the product B A for the whole change of a module, which leaves out DoRA's magnitudes",
    ),
    Limitation(
        "opening",
        "partitioner",
        lambda config: config.data.partitioner == "own",
        "the clients' data is only on their own nodes",
    ),
    Limitation(
        "opening",
        "num-clients",
        lambda config: config.data.num_clients == 0 and config.data.partitioner != "natural",
        "the number of clients depended on the nodes that were connected",
    ),
    Limitation(
        "retraining",
        "client-ranks",
        lambda config: bool(config.aggregation.client_ranks),
        "the clients' adapters have unequal ranks",
    ),
    Limitation(
        "retraining",
        "control-variates",
        lambda config: config.aggregation.control_variates,
        "the control variate of each client is only on its node",
    ),
    Limitation(
        "retraining",
        "optimizer-state",
        lambda config: config.training.optimizer_state == "client",
        "the moments of each client's optimizer are only on its node",
    ),
)


@dataclass(frozen=True)
class PlainEngines:
    """Engines for plain adapters (scaling 1, no core): one per rank, opened on first use.

    Attributes:
        config: the run's configuration; rank and scaling are replaced.
        num_labels: number of classes.
    """

    config: Config
    num_labels: int
    _by_rank: dict[int, Engine] = field(default_factory=dict, init=False)

    def of_rank(self, rank: int) -> Engine:
        """Return the engine for plain adapters of `rank`."""
        if rank not in self._by_rank:
            model = replace(self.config.model, rank=rank, lora_alpha=float(rank), lora_scaling="standard")
            kind, group = self.config.training.engine, self.config.copra.gate_group
            self._by_rank[rank] = open_engine(kind, model, group, self.num_labels, seed=0)
        return self._by_rank[rank]


@dataclass(frozen=True)
class OpenRun:
    """A finished run with its data and its model.

    Attributes:
        directory: folder of the run.
        config: its configuration, with dtype, attention and the number of clients resolved.
        data: the clients' training data and the server's held-out data.
        engine: evaluates and trains adapters of the run's rank, scaling and core.
        plain_engines: evaluate plain adapters of any rank; runs of one base may share them.
        journal: one record per round.
    """

    directory: Path
    config: Config
    data: FederatedData
    engine: Engine
    plain_engines: PlainEngines
    journal: Sequence[RoundRecord]

    @property
    def name(self) -> str:
        """The name of the run's folder."""
        return self.directory.name

    @property
    def num_rounds(self) -> int:
        return len(self.journal)

    @property
    def scaling(self) -> float:
        """s in W0 + s B A."""
        return self.config.model.scaling(self.config.model.rank)

    @cached_property
    def final(self) -> ServerState:
        """The global state after the last round."""
        return self.state(self.num_rounds)

    @property
    def adapter(self) -> Adapter:
        """The final global adapter."""
        return self.final.adapter

    @property
    def residual(self) -> Adapter:
        """The final residual: what aggregation has added to W0."""
        return self.final.residual

    def state(self, server_round: int) -> ServerState:
        """Return the global state after a round; round 0 is the start.

        Raises ResultsError for a round that the run does not have, and for one without a checkpoint.
        """
        if not 0 <= server_round <= self.num_rounds:
            raise ResultsError(f"{self.directory} has no round {server_round}; its rounds are 0 to {self.num_rounds}")
        if server_round == 0:
            return ServerState(self._initial_adapter)
        path = self.directory / "checkpoints" / f"round-{server_round:05d}.safetensors"
        if not path.exists():
            raise ResultsError(f"{path} does not exist: the global adapter of round {server_round} was not kept")
        try:
            state, _ = ServerState.load(path)
        except DamagedFile as damage:
            raise ResultsError(str(damage)) from damage
        return state

    @cached_property
    def _initial_adapter(self) -> Adapter:
        engine = engine_of(self.config, len(self.data.label_names), self.config.federation.seed)
        return initial_adapter(engine.model, self.data, self.config)

    def indices(self, split: Split, datasets: Collection[int | None] = ()) -> np.ndarray:
        """Return the indices of a held-out split's examples: of `datasets` only, or of all data sets by default."""
        return self.data.among(self.data.test if split == "test" else self.data.server_validation, datasets)

    def examples(self, clients: Sequence[int]) -> list[int]:
        """Return the number of training examples of each client."""
        return [len(self.data.train[client]) for client in clients]

    def score(
        self,
        adapters: Sequence[Adapter],
        split: Split = "server-validation",
        residual: Adapter | None = None,
        datasets: Collection[int | None] = (),
    ) -> list[Metrics]:
        """Return loss, accuracy and number of examples of each adapter on W0 plus a residual, evaluated together.

        `residual` is the final one by default. Only `datasets` are evaluated, or all by default.
        """
        return self._score(
            self.engine, adapters, self.indices(split, datasets), self.residual if residual is None else residual
        )

    def score_plain(
        self,
        adapters: Sequence[Adapter],
        split: Split = "server-validation",
        residual: Adapter | None = None,
        datasets: Collection[int | None] = (),
    ) -> list[Metrics]:
        """`score` for plain adapters: any rank, scaling 1, no core, with head. The default residual is none."""
        rank = max(map(rank_of, adapters))
        padded = [pad(adapter, rank) if rank_of(adapter) < rank else adapter for adapter in adapters]
        engine = self.plain_engines.of_rank(rank)
        return self._score(engine, padded, self.indices(split, datasets), residual or {})

    def _score(
        self, engine: Engine, adapters: Sequence[Adapter], indices: np.ndarray, residual: Adapter
    ) -> list[Metrics]:
        engine.model.write_residual(residual)
        return evaluate_each(engine, adapters, self.data, indices, self.config.evaluation.eval_batch_size)

    def sampled(self, server_round: int) -> list[int]:
        """Return the clients whose updates were aggregated in a round.

        Raises ResultsError for a round that the run does not have.
        """
        if not 1 <= server_round <= self.num_rounds:
            raise ResultsError(f"{self.directory} has no round {server_round}; its rounds are 1 to {self.num_rounds}")
        return [client.client for client in self.journal[server_round - 1].clients]

    def clients(
        self, server_round: int, progress: Progress = no_progress, only: Collection[int] = ()
    ) -> dict[int, Adapter]:
        """Return each client's adapter after its training in a round, to be used with the residual before that round.

        The clients are trained again: all clients of the round, or `only` these. Raises ResultsError for clients that
        were not in the round, and for a configuration whose training cannot be repeated (`LIMITATIONS`).
        """
        sampled = self.sampled(server_round)
        _check_supported(self.config, self.directory, "retraining")
        if absent := sorted(set(only) - set(sampled)):
            raise ResultsError(
                f"clients {join_words(absent)} did not train in round {server_round}; choose from {join_words(sampled)}"
            )
        chosen = [client for client in sampled if client in (only or sampled)]
        number = server_round - 1
        before, older = self.state(number), older_ages(self.config, number, chosen)
        by_age = {0: before.adapter} | {age: self.state(number - age).adapter for age in older}
        global_starts = client_starts(self.config, number, by_age, ages(self.config, number, chosen))
        anchors = client_anchors(self.config, number, by_age, chosen)
        plan = Plan(server_round, tuple(chosen), self.config)
        starts = {
            client: Start(adapter, optimizer=before.optimizer, anchors=tuple(adapters[client] for adapters in anchors))
            for client, adapter in global_starts.items()
        }
        self.engine.model.write_residual(before.residual)

        def report(done: float) -> None:
            progress("training clients again", done, len(chosen))

        updates = train_all(self.engine, self.data, plan, starts, report)
        return {update.client: complete(update, global_starts[update.client]) for update in updates}


def open_run(directory: Path) -> OpenRun:
    """Open the finished run in `directory` on this machine's device, with its data.

    Raises ResultsError with the reason for a run that cannot be probed; ConfigError as `load_data` and `open_engine`.
    """
    run = load_run(directory)
    if run.summary is None:
        progress = f"{len(run.journal)} of {run.config.federation.num_rounds} rounds"
        raise ResultsError(f"{directory} is not finished ({progress}): continue it with --resume")
    config = run.config
    _check_supported(config, directory, "opening")
    config = resolve_config(config)
    federated = load_data(config, load_processor(config.model))
    if run.provenance and federated.digest != run.provenance.start.data_digest:
        before, now = run.provenance.start.versions.get("copra-fl"), versions()["copra-fl"]
        reason = "the data or copra-fl has changed"
        if before != now:
            reason = f"the run is of copra-fl {before}, this is copra-fl {now}"
        raise ResultsError(
            f"{directory}: {config.data.dataset} does not give the data that the run was trained on; {reason}"
        )
    config = config.changed(num_clients=len(federated.train))
    num_labels = len(federated.label_names)
    engine = engine_of(config, num_labels, config.federation.seed)
    return OpenRun(directory, config, federated, engine, PlainEngines(config, num_labels), run.journal)


def open_runs(directories: Sequence[Path]) -> list[OpenRun]:
    """Open several runs whose adapters fit one base and are scored on the same data.

    Raises ResultsError as `open_run` does, and for runs that do not fit together.
    """
    first, *others = runs = [open_run(directory) for directory in directories]
    for other in others:
        for subject, value, other_value in (
            ("the task", first.config.model.task, other.config.model.task),
            ("the base model", first.config.model.model, other.config.model.model),
            ("the pooling", first.config.model.pooling, other.config.model.pooling),
            ("the labels", first.data.label_names, other.data.label_names),
            ("the data", first.data.tokens_digest, other.data.tokens_digest),
            ("the adapted modules", *(sorted(run.engine.model.linears) for run in (first, other))),
        ):
            if value != other_value:
                values = f"{_shortened(value)} and {_shortened(other_value)}"
                raise ResultsError(f"{first.directory} and {other.directory} differ in {subject}: {values}")
    return runs


def plain_adapters(states: Sequence[ServerState], scalings: Sequence[float]) -> tuple[list[Adapter], Adapter]:
    """Return global states as plain adapters with their heads (scaling 1, no core), and the residual that they share.

    Unequal residuals are folded into the adapters as further columns (`residual.fold`); the shared residual is empty
    then.
    """
    common = states[0].residual
    shared = all(_equal(common, state.residual) for state in states)
    adapters = [
        fold(state.adapter, {} if shared else state.residual, scaling) | parts(state.adapter, {"head"})
        for state, scaling in zip(states, scalings, strict=True)
    ]
    return adapters, common if shared else {}


def factor_mismatch(states: Sequence[ServerState], scalings: Sequence[float]) -> str:
    """Return the reason why the factors A and B of these states cannot be averaged separately; empty if they can."""
    shapes = {name: tensor.shape for name, tensor in states[0].adapter.items()}
    if any({name: tensor.shape for name, tensor in state.adapter.items()} != shapes for state in states):
        return "the adapters have unequal ranks"
    if len(set(scalings)) > 1:
        values = join_words(f"{scaling:g}" for scaling in sorted(set(scalings)))
        return f"the adapters have different scalings: {values}"
    if not all(_equal(states[0].residual, state.residual) for state in states):
        return "the adapters belong to different frozen weights, because the aggregation rule changes W0"
    return ""


def rank_of(adapter: Adapter) -> int:
    """Return the largest rank of an adapter's modules."""
    return max(len(tensor) for tensor in parts(adapter, {"A"}).values())


def _shortened(value: object) -> str:
    text = str(value)
    return text if len(text) < 100 else f"{text[:100]}..."


def _equal(a: Adapter, b: Adapter) -> bool:
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


def _check_supported(config: Config, directory: Path, action: Literal["opening", "retraining"]) -> None:
    """Raise ResultsError for the first of `LIMITATIONS` that prevents `action`."""
    for limitation in LIMITATIONS:
        if limitation.prevents == action and limitation.applies(config):
            problem, remedy = {
                "opening": ("the run cannot be probed", ""),
                "retraining": (
                    "the clients of a round cannot be trained again",
                    "; probe its global adapters with --rounds, or several runs",
                ),
            }[action]
            value = config.to_flat()[limitation.key]
            raise ResultsError(f"{directory}: {problem}: {limitation.key} = {value!r}: {limitation.reason}{remedy}")
