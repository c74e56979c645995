"""The adapters that a probe sets against each other: clients of one round, rounds of one run, or runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from copra_fl.adapter import Adapter
from copra_fl.probes.opening import Metrics, OpenRun, Progress, Split, State, factors_differ, plain
from copra_fl.results import ResultsError, join

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
    """

    what: str
    names: Sequence[str]
    states: Sequence[State]
    scalings: Sequence[float]
    weights: Sequence[float]
    runs: Sequence[OpenRun]

    @property
    def factors_differ(self) -> str:
        """Why their factors cannot be averaged apart; empty where they can."""
        return factors_differ(self.states, self.scalings)

    @property
    def adapters(self) -> list[Adapter]:
        """Their adapters as they are."""
        return [state.adapter for state in self.states]

    def scorer(self, split: Split) -> Callable[[Sequence[Adapter]], list[Metrics]]:
        """Scores adapters like these, where `factors_differ` is empty."""
        return lambda adapters: self.runs[0].score(adapters, split, self.states[0].residual)

    def plain(self, split: Split) -> tuple[list[Adapter], Callable[[Sequence[Adapter]], list[Metrics]]]:
        """Them as `opening.plain` adapters, and what scores such adapters of any rank."""
        adapters, residual = plain(self.states, self.scalings)
        return adapters, lambda some: self.runs[0].score_plain(some, split, residual)


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
        names = [run.name for run in runs]
        states, scalings = [run.final for run in runs], [run.scaling for run in runs]
        return Members(f"final adapters of {join(names)}", names, states, scalings, _uniform(len(runs)), runs)
    if rounds:
        if server_round or clients:
            raise ResultsError("--rounds are global adapters, --round and --clients are clients: choose one")
        states = [first.state(number) for number in rounds]
        chosen = Members(f"global adapters of rounds {join(rounds)}", [f"round {number}" for number in rounds], states,
                         [first.scaling] * len(rounds), _uniform(len(rounds)), runs)  # fmt: skip
    else:
        chosen = _clients(first, server_round or first.num_rounds, clients, most, progress)
    if len(chosen.names) < 2:
        raise ResultsError(f"it takes two adapters at least, not {chosen.what} alone")
    return chosen


def _clients(run: OpenRun, server_round: int, wanted: Sequence[int], most: int | None, progress: Progress) -> Members:
    adapters = run.clients(server_round, progress)
    if strangers := sorted(set(wanted) - adapters.keys()):
        raise ResultsError(f"clients {join(strangers)} did not train in round {server_round}; {join(adapters)} did")
    clients = list(wanted or adapters)[: None if wanted else most]
    residual, examples = run.state(server_round - 1).residual, run.examples(clients)
    named = f"clients {join(clients)}" if len(clients) <= MAX_NAMED else f"{len(clients)} clients"
    left_out = f" (of {len(adapters)} in all)" if len(clients) < len(adapters) else ""
    return Members(
        f"{named} of round {server_round}{left_out}",
        [f"client {client}" for client in clients],
        [State(adapters[client], residual) for client in clients],
        [run.scaling] * len(clients),
        [number / sum(examples) for number in examples],
        [run],
    )


def _uniform(number: int) -> list[float]:
    return [1 / number] * number
