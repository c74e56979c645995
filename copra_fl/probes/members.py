"""Select the adapters that a probe compares: clients of one round, rounds of one run, or several runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from copra_fl.adapters.server_state import ServerState
from copra_fl.adapters.state import Adapter
from copra_fl.aggregation.heads import lend
from copra_fl.probes.open_run import Metrics, OpenRun, Progress, Split, factor_mismatch, plain_adapters
from copra_fl.reporting.results import ResultsError
from copra_fl.wording import join_words

#: up to this many clients are named in a description; more are only counted
MAX_NAMED = 8


@dataclass(frozen=True)
class Members:
    """Adapters that are compared with each other, all scored with the first run's model and data.

    Attributes:
        description: for the page: ``clients 0, 1 and 2 of round 3``.
        names: one per member.
        states: adapter and residual of each member.
        scalings: s in W0 + s B A of each member.
        weights: weight of each member in an average; they sum to 1.
        runs: the runs that the members come from.
        datasets: the data set (index in `FederatedData.datasets`) on which each member is evaluated; None: all of them.
    """

    description: str
    names: Sequence[str]
    states: Sequence[ServerState]
    scalings: Sequence[float]
    weights: Sequence[float]
    runs: Sequence[OpenRun]
    datasets: Sequence[int | None]

    def datasets_of(self, members: Sequence[int]) -> set[int | None]:
        """Return the data sets on which a combination of `members` is evaluated; the empty set means all."""
        datasets = {self.datasets[member] for member in members}
        return set() if None in datasets else datasets

    @property
    def factor_mismatch(self) -> str:
        """The reason why the factors A and B cannot be averaged separately; empty if they can."""
        return factor_mismatch(self.states, self.scalings)

    @property
    def adapters(self) -> list[Adapter]:
        """The members' adapters, with the ranks and scalings that they were trained with."""
        return [state.adapter for state in self.states]

    @property
    def plain_adapters(self) -> list[Adapter]:
        """The members' adapters with scaling 1, no core and unequal residuals folded in (`open_run.plain_adapters`)."""
        return self._plain[0]

    def score(self, members: Sequence[int], adapters: Sequence[Adapter], split: Split) -> list[Metrics]:
        """Score combinations of `members`, made from `adapters`, on the members' data sets.

        Valid only if `factor_mismatch` is empty.
        """
        return self.runs[0].score(adapters, split, self.states[0].residual, self.datasets_of(members))

    def score_plain(self, members: Sequence[int], adapters: Sequence[Adapter], split: Split) -> list[Metrics]:
        """Score combinations of `members`, made from `plain_adapters` and of any rank, on the members' data sets."""
        return self.runs[0].score_plain(adapters, split, self._plain[1], self.datasets_of(members))

    @cached_property
    def _plain(self) -> tuple[list[Adapter], Adapter]:
        return plain_adapters(self.states, self.scalings)


def select_members(
    runs: Sequence[OpenRun],
    progress: Progress,
    server_round: int | None = None,
    clients: Sequence[int] = (),
    rounds: Sequence[int] = (),
    max_clients: int | None = None,
) -> Members:
    """Return the final adapters of several runs; of one run, its global adapters of `rounds` or the clients of a round.

    `server_round` is the last one by default. Without `clients`, the first `max_clients` of the round are taken. Raises
    ResultsError for contradicting arguments and for fewer than two members.
    """
    if len(runs) > 1:
        if server_round or clients or rounds:
            raise ResultsError("--round, --clients and --rounds need a single run, but several are given")
        names = _distinct_names(runs)
        states, scalings = [run.final for run in runs], [run.scaling for run in runs]
        return _global_members(f"final adapters of {join_words(names)}", names, states, scalings, runs)
    (run,) = runs
    if rounds:
        if server_round or clients:
            raise ResultsError("--rounds selects global adapters, --round and --clients select clients: use only one")
        states, names = [run.state(number) for number in rounds], [f"round {number}" for number in rounds]
        description = f"global adapters of rounds {join_words(rounds)}"
        members = _global_members(description, names, states, [run.scaling] * len(rounds), runs)
    else:
        members = _client_members(run, server_round or run.num_rounds, clients, max_clients, progress)
    if len(members.names) < 2:
        raise ResultsError(f"a probe compares at least two adapters; {members.description} is only one")
    return members


def _global_members(
    description: str,
    names: Sequence[str],
    states: Sequence[ServerState],
    scalings: Sequence[float],
    runs: Sequence[OpenRun],
) -> Members:
    """Return global adapters, all with the same weight and evaluated on all data sets."""
    number = len(states)
    return Members(description, names, states, scalings, [1 / number] * number, runs, [None] * number)


def _client_members(
    run: OpenRun, server_round: int, clients: Sequence[int], max_clients: int | None, progress: Progress
) -> Members:
    """Return clients of a round, weighted as in the run's average.

    With several data sets, each client's head gets the other data sets' rows from their clients (`heads.lend`).
    """
    sampled = run.sampled(server_round)
    adapters_by_client = run.clients(server_round, progress, clients or sampled[:max_clients])
    chosen = list(adapters_by_client)
    residual = run.state(server_round - 1).residual
    counts = [1] * len(chosen) if run.config.aggregation.weighting == "equal" else run.examples(chosen)
    datasets = [run.data.dataset_of(client) for client in chosen]
    adapters = lend(list(adapters_by_client.values()), datasets, counts, run.data.head_sizes)
    named = f"clients {join_words(chosen)}" if len(chosen) <= MAX_NAMED else f"{len(chosen)} clients"
    out_of = f" (of {len(sampled)})" if len(chosen) < len(sampled) else ""
    return Members(
        f"{named} of round {server_round}{out_of}",
        [_client_name(run, client) for client in chosen],
        [ServerState(adapter, residual) for adapter in adapters],
        [run.scaling] * len(chosen),
        [count / sum(counts) for count in counts],
        [run],
        datasets,
    )


def _client_name(run: OpenRun, client: int) -> str:
    return f"client {client} ({run.data.client_names[client]})" if run.data.datasets else f"client {client}"


def _distinct_names(runs: Sequence[OpenRun]) -> list[str]:
    """Return the names of the runs' folders, with the parent folder if two are equal."""
    names = [run.name for run in runs]
    distinct = len(set(names)) == len(names)
    return names if distinct else [f"{run.directory.parent.name}/{run.name}" for run in runs]
