"""What a deployment's operator watches, for Prometheus: who is connected, and how every run goes.

Read at each scrape from where it lies anyhow: runs from their journals, nodes from Flower. It is served on a port of
its own, never on that of the Fleet API: accuracies and who is missing are the operator's to know.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from copra_fl.config import ConfigError
from copra_fl.deployment import nodes, registration
from copra_fl.reporting.results import ResultsError, Run, load_run

log = logging.getLogger(__name__)

Figure = Callable[[Run], float | None]

#: name, help and value of what is said of a run; None is left out
GAUGES: dict[str, tuple[str, Figure]] = {
    "round": ("Rounds done.", lambda run: len(run.journal)),
    "rounds_wanted": ("Rounds that the run is to have.", lambda run: run.config.federation.num_rounds),
    "finished": ("1 once the run has its results.", lambda run: run.summary is not None),
    "last_round_timestamp_seconds": ("When the last round ended.", lambda run: _last_round_at(run)),
    "round_seconds": ("Seconds that the last round took.", lambda run: _last(run, "seconds")),
    "train_loss": ("Mean loss of the clients in the last round.", lambda run: _last(run, "train_loss")),
    "validation_loss": ("Loss on validation data, newest.", lambda run: _newest(run, "validation", "loss")),
    "validation_accuracy": ("Accuracy on validation data, newest.", lambda run: _newest(run, "validation", "accuracy")),
    "privacy_epsilon": ("Epsilon spent so far.", lambda run: _newest(run, "privacy", "epsilon")),
    "clients_trained": ("Clients whose training counted in the last round.", lambda run: _last_count(run, "clients")),
    "clients_missing": ("Clients that were missing in the last round.", lambda run: _last_count(run, "missing")),
}
COUNTERS: dict[str, tuple[str, Figure]] = {
    "absences": ("Clients missing, over all rounds.", lambda run: sum(len(row["missing"]) for row in run.journal)),
    "bytes_up": ("Bytes from clients to the server.", lambda run: sum(row["bytes_up"] for row in run.journal)),
    "bytes_down": ("Bytes from the server to clients.", lambda run: sum(row["bytes_down"] for row in run.journal)),
}


def serve(port: int, runs: Path) -> None:
    """Serve the metrics of this machine's SuperLink and of the runs below `runs` over HTTP, in threads of their own."""
    registry = CollectorRegistry()
    registry.register(Deployment(runs))
    start_http_server(port, registry=registry)


class Deployment:
    """What is to be said of a deployment whose runs lie below `runs`."""

    def __init__(self, runs: Path) -> None:
        self._runs = runs

    def collect(self) -> Iterator[Metric]:
        yield from of_runs(list(self._readable_runs()))
        known = registration.read_known(Path(os.environ["FLWR_HOME"]))
        yield from of_nodes(nodes.parse_nodes(registration.flwr("list"), known))

    def _readable_runs(self) -> Iterator[Run]:
        for path in sorted(self._runs.glob("*/config.toml")):
            try:
                yield load_run(path.parent)
            except (ResultsError, ConfigError):
                log.warning("run %s cannot be read", path.parent.name)


def of_runs(runs: list[Run]) -> Iterator[Metric]:
    """A metric for each figure, labelled ``run`` (the run's folder)."""
    for kind, figures in ((GaugeMetricFamily, GAUGES), (CounterMetricFamily, COUNTERS)):
        for name, (words, figure) in figures.items():
            family = kind(f"copra_fl_{name}", words, labels=["run"])
            for run in runs:
                if (value := figure(run)) is not None:
                    family.add_metric([run.directory.name], float(value))
            yield family


def of_nodes(found: list[nodes.Node] | None) -> Iterator[Metric]:
    """Whether the SuperLink answers, and which of its nodes are online; `found` is None where it does not."""
    yield GaugeMetricFamily("copra_fl_superlink_up", "1 if the SuperLink answers.", value=found is not None)
    online = GaugeMetricFamily("copra_fl_node_online", "1 while a node is connected.", labels=["node"])
    for node in found or []:
        online.add_metric([node.name], node.status == "online")
    yield online


def _last(run: Run, name: str) -> float | None:
    return run.journal[-1][name] if run.journal else None


def _last_count(run: Run, name: str) -> float | None:
    return len(run.journal[-1][name]) if run.journal else None


def _newest(run: Run, part: str, name: str) -> float | None:
    """The value in the newest round that has one: not every round is evaluated."""
    return next((row[part][name] for row in reversed(run.journal) if row.get(part)), None)


def _last_round_at(run: Run) -> float | None:
    return (run.directory / "journal.jsonl").stat().st_mtime if run.journal else None
