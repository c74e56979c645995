"""Weights & Biases, offline unless WANDB_MODE says otherwise: a folder ``wandb`` in the run's, for ``wandb sync``.

Project: WANDB_PROJECT, else ``copra-fl``. W&B's run has the id of ours, so that what is synced twice is one run.
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
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run.directory.name,
            group=run.comparison,
            id=run.provenance["run"],
            resume="allow",
            reinit="create_new",  # the runs of a comparison follow each other in one process
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
