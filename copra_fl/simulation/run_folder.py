"""The output folder of a run or comparison: choose it, create it, write its configuration."""

from __future__ import annotations

import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from filelock import FileLock, Timeout

from copra_fl.config import Config, ConfigError
from copra_fl.files import atomic_write

#: a folder of a run or comparison has one of these files; other folders are never continued or deleted
MARKER_FILES = ("comparison.toml", "config.toml")
#: form of a name of the user's that becomes a folder
FOLDER_NAME = re.compile(r"\w[\w.-]*")
#: the server app holds this file of the folder while a run goes on
LOCK = ".lock"
#: seconds that the processes of a killed command have to end and to release the folder
RELEASE_SECONDS = 10
#: everything that copra-fl writes into such a folder, as patterns; a folder with anything else is never deleted
OUR_FILES = (
    *MARKER_FILES, "*-seed*", ".*.[0-9]*", LOCK, "adapter", "checkpoints", "flower.log", "journal.jsonl",
    "privacy.jsonl", "probe-*", "provenance.json", "report.html", "summary.json", "tensorboard", "wandb",
)  # fmt: skip


def choose_output(output: Path | None, command: str, resume: bool, overwrite: bool) -> Path:
    """Return the absolute folder for the results; nothing is created or deleted yet.

    Raises ConfigError for a folder that cannot be written, with `resume` for a missing one and for one that another
    command continues, and as `check_deletable` does; also for one with content, unless it holds a run and `resume` or
    `overwrite` is set.
    """
    if resume and overwrite:
        raise ConfigError("--resume continues a run and --overwrite deletes it: use one of them")
    directory = (output or Path("runs") / f"{command}-{time.strftime('%Y%m%d-%H%M%S')}").absolute()
    if resume and output is None:
        raise ConfigError("--resume needs --output: the folder of the run to continue")
    if resume and not directory.exists():
        raise ConfigError(f"--resume: there is no run in {directory}; leave --resume out to start one")
    check_writable("--output", directory)
    if directory.exists() and any(path.name != LOCK for path in directory.iterdir()):
        is_run = any((directory / marker).exists() for marker in MARKER_FILES)
        if not is_run:
            raise ConfigError(f"--output {directory} is not empty and not a run of copra-fl; choose another folder")
        if not (resume or overwrite):
            raise ConfigError(f"--output {directory} holds a run: --resume continues it, --overwrite deletes it")
        if resume:
            check_command(directory, command)
        if overwrite:
            check_deletable(directory)
    return directory


def check_command(directory: Path, command: str) -> None:
    """Raise ConfigError unless the folder holds what `command` ("simulate" or "compare") writes."""
    kind, right = ("comparison", "compare") if (directory / "comparison.toml").exists() else ("single run", "simulate")
    if command != right:
        raise ConfigError(f"{directory} holds a {kind}; to continue it: copra-fl {right} --resume --output {directory}")


def check_writable(option: str, directory: Path) -> None:
    """Raise ConfigError unless files can be made in the folder that `option` names, or in the nearest one above it that
    exists.
    """
    directory = directory.absolute()
    existing = next(path for path in (directory, *directory.parents) if path.exists())
    if not existing.is_dir():
        raise ConfigError(f"{option} {directory}: {existing} is a file, not a folder")
    try:
        with tempfile.TemporaryDirectory(prefix=".copra-fl-", dir=existing):
            pass
    except OSError as error:
        raise ConfigError(f"{option} {directory}: cannot write in {existing}: {error.strerror}") from None


def check_deletable(directory: Path) -> None:
    """Raise ConfigError if a run is writing to the folder, or if it holds anything that is not of a run."""
    names = sorted(path.name for path in directory.iterdir())
    strangers = [name for name in names if not any(fnmatch(name, pattern) for pattern in OUR_FILES)]
    if strangers:
        raise ConfigError(
            f"--overwrite would delete {directory / strangers[0]}, which no run has written; move it away, or choose "
            "another --output"
        )
    with held(directory, timeout_s=0):
        pass


@contextmanager
def held(directory: Path, timeout_s: float | None = None) -> Iterator[None]:
    """Create the folder, and keep other runs from it during the block.

    Raises ConfigError if a run is still writing to it after `timeout_s` seconds; None: RELEASE_SECONDS.
    """
    directory.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(directory / LOCK).acquire(timeout=RELEASE_SECONDS if timeout_s is None else timeout_s)
    except Timeout:
        raise ConfigError(f"a run is writing to {directory}; stop it first, or wait until it has ended") from None
    with lock:
        yield


def delete_content(directory: Path) -> None:
    """Delete everything in the folder except its lock, which the caller has."""
    for path in directory.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()


def write_config(directory: Path, config: Config, lengthen: bool = False) -> None:
    """Write the run's ``config.toml``. Raises ConfigError with the changed keys if the folder has a different one.

    With `lengthen`, num-rounds may become larger, also of a finished run, as `check_lengthened` allows.
    """
    path = directory / "config.toml"
    if lengthen and path.exists() and _is_lengthened(Config.from_toml(path), config):
        check_lengthened(config)
        (directory / "summary.json").unlink(missing_ok=True)  # it marks a run as finished
    else:
        check_unchanged(directory, config)
    directory.mkdir(exist_ok=True)
    atomic_write(path, config.to_toml())


def check_unchanged(directory: Path, config: Config) -> None:
    """Raise ConfigError with the changed keys if the run in `directory` has another configuration."""
    path = directory / "config.toml"
    if path.exists() and (changed := Config.from_toml(path).differences(config)):
        raise ConfigError(
            f"cannot resume {directory} with a changed configuration: {'; '.join(changed)}; repeat the recipe and the "
            "settings (--recipe, --set) of the first command, or start a new run in another folder"
        )


def _is_lengthened(stored: Config, config: Config) -> bool:
    rounds = config.federation.num_rounds
    return rounds > stored.federation.num_rounds and stored.changed(num_rounds=rounds) == config


def check_lengthened(config: Config) -> None:
    """Raise ConfigError if the rounds that are done would have been others with the num-rounds of `config`."""
    copra, schedule = config.copra, ""
    if config.training.lr_schedule != "constant":
        schedule = f"lr-schedule = {config.training.lr_schedule!r}"
    if copra.local_training == "copra" and copra.schedule_progress == "federation" and copra.p0 != copra.p1:
        schedule = "local-training = 'copra' with schedule-progress = 'federation'"
    if config.training.engine == "trainer":
        schedule = "the learning rate of a Trainer (engine = 'trainer')"
    if schedule:
        raise ConfigError(
            f"num-rounds = {config.federation.num_rounds}: the run cannot be made longer, because {schedule} follows "
            "the progress of the whole run, so that its rounds would have been others; start a new run"
        )
