"""TensorBoard: event files in the run's folder, so that `tensorboard --logdir runs/NAME` shows a comparison's runs.

Settings and results are in its tab HPARAMS, one row per run.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping

from torch.utils.tensorboard import SummaryWriter

from copra_fl.reporting.results import Run

FOLDER = "tensorboard"


class TensorBoard:
    rounds = 0

    def __init__(self, run: Run) -> None:
        directory = run.directory / FOLDER
        shutil.rmtree(directory, ignore_errors=True)  # TensorBoard shows all event files of a folder
        self._settings = run.config.to_flat()
        self._writer = SummaryWriter(str(directory))

    def log(self, number: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, number)
        self._writer.flush()

    def close(self, results: Mapping[str, float] | None) -> None:
        if results is not None:
            named = {f"results/{name}": value for name, value in results.items()}
            self._writer.add_hparams(self._settings, named, run_name=".")
        self._writer.close()


track = TensorBoard
