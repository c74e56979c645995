"""Finished runs, opened for a closer look: their adapters of any round, scored on held-out data.

A run keeps only the global state of each round. What its clients made of it is trained again: every random
stream is derived from seed, round and client, so that the same adapters come out.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np

from copra_fl.adapters.residual import fold
from copra_fl.adapters.state import Adapter, complete, load_checkpoint, parts
from copra_fl.aggregation import find_rule
from copra_fl.aggregation.ranks import pad
from copra_fl.config import Config
from copra_fl.data.federated import FederatedData, load_data
from copra_fl.models.build import load_processor, resolve_config
from copra_fl.models.fed_sb_init import core_start
from copra_fl.reporting.results import ResultsError, load_run
from copra_fl.training.engine import Engine, open_engine
from copra_fl.training.evaluation import evaluate_each
from copra_fl.training.plan import Plan, Start
from copra_fl.wording import join_words

Split = Literal["server-validation", "test"]
#: what `evaluate_each` tells of an adapter
Metrics = dict[str, Any]
#: called with what is being done, how much of it since the last call, and how much of it there is in all
Progress = Callable[[str, float, float], None]

RESIDUAL = "residual/"


def silent(what: str, done: float, of: float) -> None:
    """Progress that nobody sees."""


@dataclass(frozen=True)
class State:
    """A global model: its `adapter` on W0 + `residual` (`copra_fl.adapters.residual`)."""

    adapter: Adapter
    residual: Adapter = field(default_factory=dict)


@dataclass(frozen=True)
class OpenRun:
    """A finished run with its data and its model.

    Attributes:
        directory: its folder.
        config: its configuration, with nothing left open.
        data: what its clients trained on, and what the server holds out.
        engine: its model.
        journal: a dict a round.
    """

    directory: Path
    config: Config
    data: FederatedData
    engine: Engine
    journal: Sequence[dict[str, Any]]
    _engines: dict[int, Engine] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What it is called: its folder's name."""
        return self.directory.name

    @property
    def num_rounds(self) -> int:
        return len(self.journal)

    @property
    def scaling(self) -> float:
        """s in W0 + s B A."""
        return self.config.model.scaling(self.config.model.rank)

    @cached_property
    def final(self) -> State:
        """The global model after the last round."""
        return self.state(self.num_rounds)

    @property
    def adapter(self) -> Adapter:
        """The final global adapter."""
        return self.final.adapter

    @property
    def residual(self) -> Adapter:
        """What the run has added to W0."""
        return self.final.residual

    def state(self, server_round: int) -> State:
        """The global model after a round; 0 is the start.

        Raises ResultsError for a round that the run does not have, or whose checkpoint is gone.
        """
        if not 0 <= server_round <= self.num_rounds:
            raise ResultsError(f"{self.directory} has no round {server_round}; its rounds are 0 to {self.num_rounds}")
        if server_round == 0:
            return State(self._start)
        path = self.directory / "checkpoints" / f"round-{server_round:05d}.safetensors"
        if not path.exists():
            raise ResultsError(f"there is no checkpoint {path}: the global adapter of round {server_round} is gone")
        tensors, _ = load_checkpoint(path)
        return State(
            {name: tensor for name, tensor in tensors.items() if "/" not in name},
            {name.removeprefix(RESIDUAL): t for name, t in tensors.items() if name.startswith(RESIDUAL)},
        )

    @cached_property
    def _start(self) -> Adapter:
        rule, seed = find_rule(self.config.aggregation.rule), self.config.federation.seed
        model = _open_engine(self.config, len(self.data.label_names), seed).model
        if rule.core:
            held_out, batch_size = self.data.server_validation, self.config.evaluation.eval_batch_size
            return core_start(model, self.data.examples, held_out, batch_size)
        return model.read_adapter()

    def indices(self, split: Split, datasets: Collection[int | None] = ()) -> np.ndarray:
        """The examples of a held-out split; those of `datasets`, or else of all."""
        return self.data.among(self.data.test if split == "test" else self.data.server_validation, datasets)

    def examples(self, clients: Sequence[int]) -> list[int]:
        """How many training examples each client has."""
        return [len(self.data.train[client]) for client in clients]

    def score(
        self,
        adapters: Sequence[Adapter],
        split: Split = "server-validation",
        residual: Adapter | None = None,
        datasets: Collection[int | None] = (),
    ) -> list[Metrics]:
        """Loss, accuracy and number of examples of each adapter, all at once, beside `residual`, or else the final.

        On `datasets`, or else on all that there are.
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
        """`score` of plain adapters: any rank, scaling 1, no core, with head. Without `residual` on W0 alone."""
        ranks = [max(len(tensor) for tensor in parts(adapter, {"A"}).values()) for adapter in adapters]
        rank = max(ranks)
        if rank not in self._engines:
            model = replace(self.config.model, rank=rank, lora_alpha=float(rank), lora_scaling="standard")
            labels, kind, group = len(self.data.label_names), self.config.training.engine, self.config.copra.gate_group
            self._engines[rank] = open_engine(kind, model, group, labels, seed=0)
        padded = [_padded(adapter, rank) for adapter in adapters]
        return self._score(self._engines[rank], padded, self.indices(split, datasets), residual or {})

    def _score(
        self, engine: Engine, adapters: Sequence[Adapter], indices: np.ndarray, residual: Adapter
    ) -> list[Metrics]:
        engine.model.write_residual(residual)
        return evaluate_each(engine, adapters, self.data, indices, self.config.evaluation.eval_batch_size)

    def sampled(self, server_round: int) -> list[int]:
        """The clients whose training went into a round. Raises ResultsError for a round that there is not."""
        if not 1 <= server_round <= self.num_rounds:
            raise ResultsError(f"{self.directory} has no round {server_round}; its rounds are 1 to {self.num_rounds}")
        return [client["client"] for client in self.journal[server_round - 1]["clients"]]

    def clients(self, server_round: int, progress: Progress = silent, only: Collection[int] = ()) -> dict[int, Adapter]:
        """Each client's own adapter after its training in a round, beside the residual of the round before.

        Trained again, all of them or `only` some. Raises ResultsError for clients that the round did not have, and
        where it takes more than the checkpoint of the round before.
        """
        sampled = self.sampled(server_round)
        for reason in _not_repeatable(self.config):
            raise ResultsError(f"{self.directory}: the clients of a round cannot be trained again: {reason}")
        if strangers := sorted(set(only) - set(sampled)):
            raise ResultsError(
                f"clients {join_words(strangers)} did not train in round {server_round}; {join_words(sampled)} did"
            )
        chosen = [client for client in sampled if client in (only or sampled)]
        before = self.state(server_round - 1)
        plan, starts = Plan(server_round, tuple(chosen), self.config), dict.fromkeys(chosen, Start(before.adapter))
        self.engine.model.write_residual(before.residual)

        def report(done: float) -> None:
            progress("training clients again", done, len(chosen))

        slices = self.engine.slices(self.data, plan)
        updates = chain.from_iterable(self.engine.train(self.data, plan, some, starts, report) for some in slices)
        adapters = {update.client: complete(update, before.adapter) for update in updates}
        return {client: adapters[client] for client in chosen}


def open_run(directory: Path) -> OpenRun:
    """The finished run in `directory`, on the machine's own device and with its data.

    Raises ResultsError for what cannot be probed, with the reason; ConfigError as `data.load` and `models.build` do.
    """
    if not (directory / "config.toml").exists():
        hint = "; it is a comparison, so name a run in it" if (directory / "comparison.toml").exists() else ""
        raise ResultsError(f"{directory} is no folder of a run: it has no config.toml{hint}")
    run = load_run(directory)
    if run.summary is None:
        rounds = run.config.federation.num_rounds
        raise ResultsError(f"{directory} is not finished: {len(run.journal)} of {rounds} rounds; --resume goes on")
    config = run.config
    if find_rule(config.aggregation.rule).personal:
        rule = config.aggregation.rule
        raise ResultsError(
            f"{directory}: rule = {rule!r} leaves a part of each model with its client, so that there is no whole "
            "global adapter to probe"
        )
    if config.data.partitioner == "own":
        raise ResultsError(f"{directory}: its clients' data is on their own nodes, and only there")
    if config.data.num_clients == 0 and config.data.partitioner != "natural":
        raise ResultsError(f"{directory}: num-clients = 0, so its clients depended on the nodes that were connected")
    config = resolve_config(config)
    federated = load_data(config, load_processor(config.model))
    if federated.digest != run.provenance.get("data_digest", federated.digest):
        raise ResultsError(f"{directory}: its data, {config.data.dataset}, is no longer what the run was trained on")
    config = config.changed(num_clients=len(federated.train))
    engine = _open_engine(config, len(federated.label_names), config.federation.seed)
    return OpenRun(directory, config, federated, engine, run.journal)


def open_runs(directories: Sequence[Path]) -> list[OpenRun]:
    """Several runs whose adapters fit one base and are scored on the same data.

    Raises ResultsError as `open_run` does, and where they do not go together.
    """
    first, *others = runs = [open_run(directory) for directory in directories]
    for other in others:
        for what, ours, theirs in (
            ("the task", first.config.model.task, other.config.model.task),
            ("the base model", first.config.model.model, other.config.model.model),
            ("the pooling", first.config.model.pooling, other.config.model.pooling),
            ("the labels", first.data.label_names, other.data.label_names),
            ("the data", first.data.tokens_digest, other.data.tokens_digest),
            ("the adapted modules", *(sorted(run.engine.model.linears) for run in (first, other))),
        ):
            if ours != theirs:
                both = f"{_short(ours)} and {_short(theirs)}"
                raise ResultsError(f"{first.directory} and {other.directory} do not share {what}: {both}")
    return runs


def plain(states: Sequence[State], scalings: Sequence[float]) -> tuple[list[Adapter], Adapter]:
    """The models as plain adapters with their heads, scaling 1 and no core, and what residual they are all beside.

    Residuals that are not the same for all go into the adapters as more columns (`residual.fold`).
    """
    common = states[0].residual
    shared = all(_same(common, state.residual) for state in states)
    adapters = [
        fold(state.adapter, {} if shared else state.residual, scaling) | parts(state.adapter, {"head"})
        for state, scaling in zip(states, scalings, strict=True)
    ]
    return adapters, common if shared else {}


def factors_differ(states: Sequence[State], scalings: Sequence[float]) -> str:
    """Why the factors of these models cannot be averaged apart; empty where they can."""
    first = {name: tensor.shape for name, tensor in states[0].adapter.items()}
    if any({name: tensor.shape for name, tensor in state.adapter.items()} != first for state in states):
        return "their adapters have unequal ranks"
    if len(set(scalings)) > 1:
        return f"their adapters are scaled by {' and '.join(f'{scaling:g}' for scaling in sorted(set(scalings)))}"
    if not all(_same(states[0].residual, state.residual) for state in states):
        return "they are beside frozen weights that are not the same: the runs' rule changes W0"
    return ""


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) < 100 else f"{text[:100]}..."


def _same(a: Adapter, b: Adapter) -> bool:
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


def _padded(adapter: Adapter, rank: int) -> Adapter:
    """`adapter` with zeros up to `rank`."""
    own = max(len(tensor) for tensor in parts(adapter, {"A"}).values())
    return pad(adapter, rank) if own < rank else adapter


def _open_engine(config: Config, num_labels: int, seed: int) -> Engine:
    core = find_rule(config.aggregation.rule).core
    return open_engine(config.training.engine, config.model, config.copra.gate_group, num_labels, seed, core)


def _not_repeatable(config: Config) -> list[str]:
    """Why local training depends on what no checkpoint has."""
    reasons = []
    if config.aggregation.client_ranks:
        reasons.append(f"client-ranks = {config.aggregation.client_ranks!r}: their adapters have unequal ranks")
    if config.aggregation.control_variates:
        reasons.append("control-variates: each client's own is on its node's disk")
    return reasons
