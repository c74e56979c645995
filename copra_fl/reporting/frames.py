"""Runs and comparisons as pandas frames."""

from __future__ import annotations

import pandas as pd

from copra_fl.reporting.results import Comparison, Run
from copra_fl.reporting.statistics import metrics, round_metrics


def history(run: Run) -> pd.DataFrame:
    """Return one row per round, indexed by ``round``: the values of `round_metrics`, with _ for / in their names."""
    rows = {record.round: round_metrics(record) for record in run.journal}
    frame = pd.DataFrame.from_dict(rows, orient="index").rename(columns=lambda name: name.replace("/", "_"))
    return frame.rename_axis("round")


def clients(run: Run) -> pd.DataFrame:
    """Return one row per client, indexed by ``client``.

    Of its training in all rounds: ``train_examples``, ``rounds`` in which it trained, ``steps``, ``seconds`` and
    ``train_loss`` of the last such round. Of the final model on its own validation data, after the run's end:
    ``validation_examples``, ``loss`` in nats, and ``accuracy`` in [0, 1].
    """
    trained = pd.DataFrame(
        [
            {"client": r.client, "examples": r.examples, "steps": r.steps, "seconds": r.seconds, "loss": r.loss}
            for record in run.journal
            for r in record.clients
        ],
        columns=["client", "examples", "steps", "seconds", "loss"],
    )
    training = trained.groupby("client").agg(
        train_examples=("examples", "last"),
        rounds=("examples", "size"),
        steps=("steps", "sum"),
        seconds=("seconds", "sum"),
        train_loss=("loss", "last"),
    )
    evaluated = run.summary.clients if run.summary else ()
    final = pd.DataFrame(
        [[result.client, result.examples, result.loss, result.accuracy] for result in evaluated],
        columns=["client", "validation_examples", "loss", "accuracy"],
    )
    return training.join(final.set_index("client"), how="outer").sort_index()


def of_each_run(frames: dict[tuple[str, int], pd.DataFrame]) -> pd.DataFrame:
    """Return the frames of all runs in one, with the columns ``method`` and ``seed`` first."""
    parts = [frame.reset_index().assign(method=method, seed=seed) for (method, seed), frame in frames.items()]
    joined = pd.concat(parts, ignore_index=True)
    return joined[["method", "seed", *(name for name in joined if name not in ("method", "seed"))]]


def results(comparison: Comparison) -> pd.DataFrame:
    """Return one row per finished run: ``method``, ``seed`` and its `metrics`."""
    rows = [
        {"method": method, "seed": run.seed, **metrics(run)}
        for method in comparison.methods
        for run in comparison.finished_runs(method)
    ]
    return pd.DataFrame(rows)
