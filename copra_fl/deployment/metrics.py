"""Prometheus metrics of a deployment: connected nodes, certificates in use, and the progress of every run.

They are read at each scrape, runs from their journals and nodes from Flower. They have a port of their own, never that
of the Fleet API: accuracies and missing clients are for the operator only.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from copra_fl.deployment import certificates, nodes, registration
from copra_fl.records import Evaluation, PrivacySpent
from copra_fl.reporting.results import Run, load_run

log = logging.getLogger(__name__)

Measure = Callable[[Run], float | None]

#: name, help text and measure of each metric of a run; a run without a value (None) is left out
GAUGES: dict[str, tuple[str, Measure]] = {
    "round": ("Finished rounds.", lambda run: len(run.journal)),
    "num_rounds": ("Configured rounds of the run.", lambda run: run.config.federation.num_rounds),
    "finished": ("1 once the run has its results.", lambda run: run.summary is not None),
    "last_round_timestamp_seconds": ("Time at which the last round ended.", lambda run: _last_round_at(run)),
    "round_seconds": ("Duration of the last round.", lambda run: run.journal[-1].seconds if run.journal else None),
    "train_loss": (
        "Mean loss of the clients in the last round.",
        lambda run: run.journal[-1].train_loss if run.journal else None,
    ),
    "validation_loss": (
        "Loss on validation data, last evaluation.",
        lambda run: evaluation.loss if (evaluation := _last_validation(run)) else None,
    ),
    "validation_accuracy": (
        "Accuracy on validation data, last evaluation.",
        lambda run: evaluation.accuracy if (evaluation := _last_validation(run)) else None,
    ),
    "privacy_epsilon": (
        "Epsilon spent so far, towards those who see the models.",
        lambda run: privacy.epsilon if (privacy := _privacy_spent(run)) else None,
    ),
    "privacy_server_epsilon": (
        "Epsilon spent so far, towards the server.",
        lambda run: privacy.server_epsilon if (privacy := _privacy_spent(run)) else None,
    ),
    "clients_trained": (
        "Clients with a valid update in the last round.",
        lambda run: len(run.journal[-1].clients) if run.journal else None,
    ),
    "clients_missing": (
        "Clients without a valid update in the last round.",
        lambda run: len(run.journal[-1].missing) if run.journal else None,
    ),
}
COUNTERS: dict[str, tuple[str, Measure]] = {
    "missing_updates": (
        "Missing updates of clients over all rounds.",
        lambda run: sum(len(record.missing) for record in run.journal),
    ),
    "bytes_up": ("Bytes from clients to the server.", lambda run: sum(record.bytes_up for record in run.journal)),
    "bytes_down": ("Bytes from the server to clients.", lambda run: sum(record.bytes_down for record in run.journal)),
}


def serve(port: int, runs: Path, tls: Path | None) -> None:
    """Start threads that serve the metrics of this machine's SuperLink and of the runs below `runs` over HTTP.

    `tls` is the folder with the certificates that the SuperLink starts with; None for one without TLS.
    """
    registry = CollectorRegistry()
    registry.register(Deployment(runs, certificates.ends(tls) if tls else {}))
    start_http_server(port, registry=registry)


class Deployment:
    """Collector of the metrics of the deployment with runs below the folder `runs`.

    `certificate_ends` is the end of validity of each certificate in use.
    """

    def __init__(self, runs: Path, certificate_ends: Mapping[str, datetime]) -> None:
        self._runs = runs
        self._certificate_ends = certificate_ends

    def collect(self) -> Iterator[Metric]:
        yield of_certificates(self._certificate_ends, datetime.now(UTC))
        yield from of_runs(list(readable_runs(self._runs)))
        registered = registration.read_registered(registration.flower_home())
        yield from of_nodes(nodes.parse_nodes(registration.flwr("list"), registered))


def readable_runs(runs: Path) -> Iterator[Run]:
    """Yield the runs below `runs`; one that cannot be read is named in the log and hides no other."""
    for path in sorted(runs.glob("*/config.toml")):
        try:
            yield load_run(path.parent)
        except (ValueError, OSError, RecursionError) as error:  # damaged, or of another version of copra-fl
            log.warning("run %s cannot be read: %s", path.parent.name, error)


def of_certificates(ends: Mapping[str, datetime], now: datetime) -> Metric:
    """Return the seconds until each of the certificates in use ends, negative after its end."""
    family = GaugeMetricFamily(
        "copra_fl_certificate_seconds_left", "Seconds until a certificate in use ends.", labels=["certificate"]
    )
    for name, end in ends.items():
        family.add_metric([name], (end - now).total_seconds())
    return family


def of_runs(runs: list[Run]) -> Iterator[Metric]:
    """Yield one metric for each of `GAUGES` and `COUNTERS`, with the label ``run``: the name of the run's folder."""
    for kind, measures in ((GaugeMetricFamily, GAUGES), (CounterMetricFamily, COUNTERS)):
        for name, (help_text, measure) in measures.items():
            family = kind(f"copra_fl_{name}", help_text, labels=["run"])
            for run in runs:
                if (value := measure(run)) is not None:
                    family.add_metric([run.directory.name], float(value))
            yield family


def of_nodes(known: list[nodes.Node] | None) -> Iterator[Metric]:
    """Yield whether the SuperLink answers, and which nodes are online; `known` is None if it does not answer."""
    yield GaugeMetricFamily("copra_fl_superlink_up", "1 if the SuperLink answers.", value=known is not None)
    online = GaugeMetricFamily("copra_fl_node_online", "1 while a node is connected.", labels=["node"])
    for node in known or []:
        online.add_metric([node.name], node.status == "online")
    yield online


def _last_validation(run: Run) -> Evaluation | None:
    """Return the newest evaluation: not every round has one."""
    return next((record.validation for record in reversed(run.journal) if record.validation), None)


def _privacy_spent(run: Run) -> PrivacySpent | None:
    return run.journal[-1].privacy if run.journal else None


def _last_round_at(run: Run) -> float | None:
    return (run.directory / "journal.jsonl").stat().st_mtime if run.journal else None
