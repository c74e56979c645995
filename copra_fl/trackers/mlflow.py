"""MLflow: one MLflow run for each run, on the server in MLFLOW_TRACKING_URI.

Experiment: MLFLOW_EXPERIMENT_NAME, by default ``copra-fl``. A run is identified by the id in its provenance.json, so
that a resumed run continues its MLflow run.
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
#: metric with the number of rounds that an MLflow run has
ROUNDS = "rounds"
#: most parameters that MLflow accepts in one call
MAX_PARAMS = 100


class Mlflow:
    def __init__(self, run: Run) -> None:
        self._client = MlflowClient()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
        experiment = self._client.get_experiment_by_name(name)
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(name)
        assert run.provenance is not None, "a run in progress has provenance"
        run_id = run.provenance.run
        earlier = self._client.search_runs([experiment_id], f"tags.`{ID_TAG}` = '{run_id}'", max_results=1)
        if earlier:
            self._id = earlier[0].info.run_id
            self.rounds = int(earlier[0].data.metrics.get(ROUNDS, 0))
            self._client.update_run(self._id, status="RUNNING")
            return
        tags = {ID_TAG: run_id, COMPARISON_TAG: run.comparison or ""}
        self._id = self._client.create_run(experiment_id, tags=tags, run_name=run.directory.name).info.run_id
        self.rounds = 0
        settings = [Param(key, str(value)) for key, value in run.config.to_flat().items()]
        for start in range(0, len(settings), MAX_PARAMS):
            self._client.log_batch(self._id, params=settings[start : start + MAX_PARAMS])

    def log(self, number: int, scalars: Mapping[str, float]) -> None:
        self._log(dict(scalars) | {ROUNDS: float(number)}, number)

    def close(self, results: Mapping[str, float] | None) -> None:
        if results is not None:
            self._log({f"results/{name}": value for name, value in results.items()}, self.rounds)
        self._client.set_terminated(self._id, "KILLED" if results is None else "FINISHED")

    def _log(self, values: Mapping[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        self._client.log_batch(self._id, metrics=[Metric(name, value, now, step) for name, value in values.items()])


track = Mlflow
