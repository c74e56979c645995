"""Weights & Biases, by default offline: a folder ``wandb`` in the run's folder, for ``wandb sync``.

Mode: WANDB_MODE; project: WANDB_PROJECT, by default ``copra-fl``. The W&B run has the id of the run, so that syncing
it twice does not duplicate it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, cast

import wandb

from copra_fl.reporting.results import Run

PROJECT = "copra-fl"


class WeightsAndBiases:
    rounds = 0

    def __init__(self, run: Run) -> None:
        assert run.provenance is not None, "a run in progress has provenance"
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run.directory.name,
            group=run.comparison,
            id=run.provenance.run,
            resume="allow",
            reinit="create_new",  # one process tracks all runs of a comparison
            mode=cast(Any, os.environ.get("WANDB_MODE", "offline")),
            dir=run.directory,
            config=run.config.to_flat(),
            settings=wandb.Settings(silent=True, console="off"),
        )

    def log(self, number: int, scalars: Mapping[str, float]) -> None:
        self._run.log(dict(scalars), step=number)

    def close(self, results: Mapping[str, float] | None) -> None:
        if results is not None:
            self._run.summary.update({f"results/{name}": value for name, value in results.items()})
        self._run.finish(exit_code=1 if results is None else 0)


track = WeightsAndBiases
