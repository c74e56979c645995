"""Values and tables in TOML's notation, and lists as a line of CSV."""

from __future__ import annotations

import csv
import io
import json
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from copra_fl.config.keys import ConfigError, Value


def csv_line(names: Iterable[str]) -> str:
    """Return `names` as a line of CSV, which `csv_list` reads."""
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow(names)
    return line.getvalue()


def csv_list(line: str) -> list[str]:
    """Return the names in a line of CSV; none if it is empty. A space after a comma does not count."""
    return next(csv.reader([line], skipinitialspace=True), [])


def toml_value(value: Value) -> str:
    """Return `value` in TOML's notation."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)  # a JSON string is a TOML basic string
    return repr(value)


def flatten(table: Mapping[str, Any]) -> dict[str, Any]:
    """Return `table` without nested tables: ``{"a": {"b": 1}}`` becomes ``{"a.b": 1}``."""
    flat: dict[str, Any] = {}
    for name, value in table.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}.{rest}": nested for rest, nested in flatten(value).items()}
        else:
            flat[name] = value
    return flat


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file. Raises ConfigError for a file that is missing, unreadable or not TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None


def parse_override(text: str) -> tuple[str, Value]:
    """Parse ``key=value`` from the command line; a value that is not TOML is a string.

    >>> parse_override("learning-rate=1e-3"), parse_override("model=minilm")
    (('learning-rate', 0.001), ('model', 'minilm'))
    """
    key, equals, raw = text.partition("=")
    if not equals:
        raise ConfigError(f"--set {text!r} must have the form KEY=VALUE")
    try:
        value = tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        value = raw
    return key.strip(), value
