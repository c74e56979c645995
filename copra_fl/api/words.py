"""Errors in Python's words: arguments in place of options of the command line, objects in place of files of the cache.

Commands and calls share all code below this package, and the server app, whose errors name options.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from copra_fl.api.inputs import MODELS, TABLES
from copra_fl.config import ConfigError
from copra_fl.files import cache_dir
from copra_fl.simulation.superlink import RunFailed

#: setting -> the object in memory whose file in the cache is its value
OBJECTS = {
    "dataset": "the table passed as data",
    "test-file": "the table passed as test_data",
    "model": "the model passed as model",
}
#: TOML's truth values in Python
TRUTH = {"true": "True", "false": "False"}
#: parts of a message, and Python's words for them
PHRASES: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
    (r"copra-fl (simulate|compare) --resume --output (.+)", r"copra_fl.\1(output='\2', resume=True)"),
    (r" \(--recipe, --set\) of the first command", " of the first call"),
    (r"--set ([\w.-]+)=(\S+)", lambda match: f"{python_name(match[1])}={TRUTH.get(match[2], match[2])}"),
    (r"--(resume|overwrite)\b", r"\1=True"),
    (
        r"--(gpus-per-worker|methods|output|ray-address|recipe|seeds|track|workers)\b",
        lambda match: python_name(match[1]),
    ),
)


@contextmanager
def python_words(settings: Mapping[str, Any]) -> Iterator[None]:
    """Reword a ConfigError or RunFailed of the block, a call with these `settings`."""
    try:
        yield
    except (ConfigError, RunFailed) as error:
        error.args = (reworded(str(error), settings), *error.args[1:])
        raise


def reworded(message: str, settings: Mapping[str, Any]) -> str:
    """Return `message` in Python's words, in a call with these `settings`."""
    for pattern, phrase in PHRASES:
        message = re.sub(pattern, phrase, message)
    folders = {cache_dir() / TABLES: "a table of an earlier call", cache_dir() / MODELS: "a model of an earlier call"}
    for key, words in OBJECTS.items():
        value = str(settings.get(key, ""))
        if Path(value).parent in folders:
            message = re.sub(_named(re.escape(value)), words, message)
    for folder, words in folders.items():
        message = re.sub(_named(rf"{re.escape(str(folder))}/[\w.-]+"), words, message)
    return message


def python_name(key: str) -> str:
    """Return the Python spelling of a key or option: ``learning_rate`` of ``learning-rate``."""
    return key.replace("-", "_")


def _named(path: str) -> str:
    """Return a pattern of the pattern `path`, alone, in quotes, or as the value of a setting."""
    return rf"(?:[\w-]+ = )?'{path}'|{path}"
