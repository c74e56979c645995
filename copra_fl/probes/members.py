"""The adapters that a probe sets against each other: clients of one round, rounds of one run, or runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from copra_fl.adapters.state import Adapter
from copra_fl.aggregation.heads import lend
from copra_fl.probes.open_run import Metrics, OpenRun, Progress, Split, State, factors_differ, plain
from copra_fl.reporting.results import ResultsError
from copra_fl.wording import join_words

#: members, by their places -> what scores adapters that are made of these, on their data sets
Scorer = Callable[[Sequence[int]], Callable[[Sequence[Adapter]], list[Metrics]]]
#: more clients than this are counted and not named
MAX_NAMED = 8


@dataclass(frozen=True)
class Members:
    """Adapters that are compared with each other, all scored by the first run's model and data.

    Attributes:
        what: what they are, for people: ``clients 0, 1 and 2 of round 3``.
        names: of each.
        states: their adapters, each with what it is beside.
        scalings: s in W0 + s B A of each.
        weights: what each counts in an average; they sum to 1.
        runs: the runs that they are from.
        datasets: of each the data set that it is evaluated on (`OpenRun.data`); None: all that there are.
    """

    what: str
    names: Sequence[str]
    states: Sequence[State]
    scalings: Sequence[float]
    weights: Sequence[float]
    runs: Sequence[OpenRun]
    datasets: Sequence[int | None]

    def datasets_of(self, some: Sequence[int]) -> set[int | None]:
        """The data sets that what is made of `some` members is evaluated on; none: all."""
        found = {self.datasets[member] for member in some}
        return set() if None in found else found

    @property
    def factors_differ(self) -> str:
        """Why their factors cannot be averaged apart; empty where they can."""
        return factors_differ(self.states, self.scalings)

    @property
    def adapters(self) -> list[Adapter]:
        """Their adapters as they are."""
        return [state.adapter for state in self.states]

    def scorer(self, split: Split) -> Scorer:
        """Scores adapters like these, where `factors_differ` is empty."""
        return lambda of: (
            lambda adapters: self.runs[0].score(adapters, split, self.states[0].residual, self.datasets_of(of))
        )

    def plain(self, split: Split) -> tuple[list[Adapter], Scorer]:
        """Them as `opening.plain` adapters, and what scores such adapters of any rank."""
        adapters, residual = plain(self.states, self.scalings)
        return adapters, lambda of: lambda some: self.runs[0].score_plain(some, split, residual, self.datasets_of(of))


def members(
    runs: Sequence[OpenRun],
    progress: Progress,
    server_round: int | None = None,
    clients: Sequence[int] = (),
    rounds: Sequence[int] = (),
    most: int | None = None,
) -> Members:
    """The final adapters of several runs; of one run its `rounds`, or else the clients of `server_round`.

    Without `clients` the first `most` of the round are taken. Raises ResultsError where there are fewer than two.
    """
    first = runs[0]
    if len(runs) > 1:
        if server_round or clients or rounds:
            raise ResultsError("--round, --clients and --rounds are for a single run, not for several")
        names = _names(runs)
        states, scalings = [run.final for run in runs], [run.scaling for run in runs]
        nothing = [None] * len(runs)
        return Members(
            f"final adapters of {join_words(names)}", names, states, scalings, _uniform(len(runs)), runs, nothing
        )
    if rounds:
        if server_round or clients:
            raise ResultsError("--rounds are global adapters, --round and --clients are clients: choose one")
        states = [first.state(number) for number in rounds]
        names = [f"round {number}" for number in rounds]
        scalings, nothing = [first.scaling] * len(rounds), [None] * len(rounds)
        what = f"global adapters of rounds {join_words(rounds)}"
        chosen = Members(what, names, states, scalings, _uniform(len(rounds)), runs, nothing)
    else:
        chosen = _clients(first, server_round or first.num_rounds, clients, most, progress)
    if len(chosen.names) < 2:
        raise ResultsError(f"it takes two adapters at least, not {chosen.what} alone")
    return chosen


def _clients(run: OpenRun, server_round: int, wanted: Sequence[int], most: int | None, progress: Progress) -> Members:
    """Clients weigh as in the run's average; of several data sets each has the others' rows of the head for theirs."""
    sampled = run.sampled(server_round)
    found = run.clients(server_round, progress, wanted or sampled[:most])
    clients = list(found)
    residual = run.state(server_round - 1).residual
    counts = [1] * len(clients) if run.config.aggregation.weighting == "equal" else run.examples(clients)
    datasets = [run.data.dataset_of(client) for client in clients]
    adapters = lend(list(found.values()), datasets, counts, run.data.head_sizes)
    named = f"clients {join_words(clients)}" if len(clients) <= MAX_NAMED else f"{len(clients)} clients"
    left_out = f" (of {len(sampled)} in all)" if len(clients) < len(sampled) else ""
    return Members(
        f"{named} of round {server_round}{left_out}",
        [_client(run, client) for client in clients],
        [State(adapter, residual) for adapter in adapters],
        [run.scaling] * len(clients),
        [number / sum(counts) for number in counts],
        [run],
        datasets,
    )


def _client(run: OpenRun, client: int) -> str:
    return f"client {client} ({run.data.client_names[client]})" if run.data.datasets else f"client {client}"


def _uniform(number: int) -> list[float]:
    return [1 / number] * number


def _names(runs: Sequence[OpenRun]) -> list[str]:
    """Their folders' names, with the folder above where these are not enough."""
    names = [run.name for run in runs]
    distinct = len(set(names)) == len(names)
    return names if distinct else [f"{run.directory.parent.name}/{run.name}" for run in runs]
