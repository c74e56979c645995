"""A training script of Transformers or TRL as a client: ``engine = "trainer"``.

A script makes a Trainer and calls `federate`. Run alone, it trains as before:

    trainer = SFTTrainer(MODEL, args, train_dataset=copra_fl.client_data(dataset), peft_config=LoraConfig(...))
    copra_fl.federate(trainer)
    trainer.train()

In a federation a node runs the script for each of its clients (`run_script`). `client_data` returns the client's
training rows there, and `federate` ends the script: the node keeps the Trainer, and in each round writes the global
adapter into its model, lets it make ``local-steps`` steps, and sends the adapter (`training.trainer`). Nothing that
follows `federate` is executed on a node, so the script saves, evaluates and pushes nothing there.

The server never sends the script: it compares the SHA-256 of its own file with that of each node's. The server
aggregates and evaluates with the task of the configuration, and never runs the script.
"""

from __future__ import annotations

import runpy
import sys
import warnings
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from copra_fl.config import ConfigError

if TYPE_CHECKING:  # slow to import
    import datasets
    import pandas as pd
    from transformers import Trainer


class _Federated(BaseException):
    """Ends a script in a federation; no BaseException of a library, so that no `except` of the script catches it."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer


class _Client:
    """The client whose script runs in this process.

    Attributes:
        rows: its training rows.
        has_asked: whether the script has called `client_data`.
    """

    def __init__(self, rows: pd.DataFrame) -> None:
        self.rows = rows
        self.has_asked = False


_client: _Client | None = None


def federate(trainer: Trainer) -> None:
    """Train the PEFT adapter of `trainer` in the federation that runs this script; alone, do nothing.

    In a federation the script ends here. Every round continues from the global adapter: `trainer` makes
    ``local-steps`` steps with its own optimizer, learning rate, batches and loss. Its learning-rate schedule spans all
    rounds.
    """
    if _client is not None:
        raise _Federated(trainer)


def client_data(alone: Any = None) -> datasets.Dataset | Any:
    """Return the client's training rows in a federation, with all columns of its table; otherwise `alone`.

    Validation examples and rows that the federation leaves out are not among them.
    """
    if _client is None:
        return alone
    import datasets

    _client.has_asked = True
    return datasets.Dataset.from_pandas(_client.rows, preserve_index=False)


def run_script(script: str, rows: pd.DataFrame, shared: bool) -> Trainer:
    """Run the file `script` as a client with the training `rows`, and return the Trainer that it federates.

    It runs as ``python FILE`` in the file's folder, without arguments.

    Args:
        script: the path of a Python file.
        rows: of the client.
        shared: whether several clients run the same file, so that it must ask for the client's rows.

    Raises ConfigError for a script that federates no Trainer, or that would train every client on the same data; and
    whatever the script raises.
    """
    global _client
    path = Path(script).expanduser().absolute()
    name = f"script = {path.name!r}"
    if not path.is_file():
        raise ConfigError(f"script = {script!r}: there is no file {path}")
    _client = client = _Client(rows)
    try:
        with _as_main(path), _quiet():
            runpy.run_path(str(path), run_name="__main__")
        raise ConfigError(f"{name} ended without a call of copra_fl.federate(trainer); call it before trainer.train()")
    except _Federated as end:
        trainer: Trainer = end.trainer
    except SystemExit as end:
        raise ConfigError(
            f"{name} ended with exit code {end.code}; a node runs it without arguments, so it must need none"
        ) from None
    finally:
        _client = None
    if shared and not client.has_asked:
        raise ConfigError(
            f"{name} does not call copra_fl.client_data(), so that every client would train on the same data; use "
            "train_dataset=copra_fl.client_data(dataset)"
        )
    return trainer


@contextmanager
def _quiet() -> Iterator[None]:
    """Show no progress bars of Datasets and no FutureWarning inside the block; the script shows them alone."""
    import datasets

    shows_bars = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        if shows_bars:
            datasets.enable_progress_bars()


@contextmanager
def _as_main(path: Path) -> Iterator[None]:
    """Set folder, import path and arguments inside the block as ``python FILE`` has them."""
    argv, imports = sys.argv, list(sys.path)
    sys.argv = [str(path)]
    sys.path.insert(0, str(path.parent))
    try:
        with chdir(path.parent):
            yield
    finally:
        sys.path[:] = imports
        sys.argv = argv
