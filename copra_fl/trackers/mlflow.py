"""MLflow: a run of MLflow's for each run, where MLFLOW_TRACKING_URI says.

Experiment: MLFLOW_EXPERIMENT_NAME, else ``copra-fl``. A run is found again by its id in provenance.json, so that one
that is resumed goes on there.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping

from mlflow import MlflowClient
from mlflow.entities import Metric, Param

from copra_fl.reporting.results import Run

EXPERIMENT = "copra-fl"
ID_TAG, COMPARISON_TAG = "copra-fl.run", "copra-fl.comparison"
#: a metric of ours that says how far an MLflow run is
ROUNDS = "rounds"


class Mlflow:
    def __init__(self, run: Run) -> None:
        self._client = MlflowClient()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
        experiment = self._client.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment else self._client.create_experiment(name)
        identity = str(run.provenance["run"])
        earlier = self._client.search_runs([number], f"tags.`{ID_TAG}` = '{identity}'", max_results=1)
        if earlier:
            self._id = earlier[0].info.run_id
            self.rounds = int(earlier[0].data.metrics.get(ROUNDS, 0))
            self._client.update_run(self._id, status="RUNNING")
            return
        tags = {ID_TAG: identity, COMPARISON_TAG: run.comparison or ""}
        self._id = self._client.create_run(number, tags=tags, run_name=run.directory.name).info.run_id
        self.rounds = 0
        settings = [Param(key, str(value)) for key, value in run.config.to_flat().items()]
        for start in range(0, len(settings), 100):  # MLflow takes so many at once
            self._client.log_batch(self._id, params=settings[start : start + 100])

    def log(self, number: int, scalars: Mapping[str, float]) -> None:
        self._log(dict(scalars) | {ROUNDS: float(number)}, number)

    def close(self, results: Mapping[str, float] | None) -> None:
        if results is not None:
            self._log({f"results/{name}": value for name, value in results.items()}, self.rounds)
        self._client.set_terminated(self._id, "KILLED" if results is None else "FINISHED")

    def _log(self, figures: Mapping[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        self._client.log_batch(self._id, metrics=[Metric(name, value, now, step) for name, value in figures.items()])


track = Mlflow
