"""Values and tables in TOML's notation, and lists as a line of CSV."""

from __future__ import annotations

import csv
import io
import json
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from copra_fl.config.keys import ConfigError, Key, Value

#: a number that Python writes and TOML does not: .5, 5., 1.e-3
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)
#: part of a name that csv quotes only if it quotes all: white space around it, or a line break
NEEDS_QUOTES = re.compile(r"^\s|\s$|[\r\n]")


def csv_line(names: Iterable[str]) -> str:
    """Return `names` as a line of CSV, which `csv_list` reads."""
    names, line = list(names), io.StringIO()
    needs_quotes = any(map(NEEDS_QUOTES.search, names))
    writer = csv.writer(line, lineterminator="", quoting=csv.QUOTE_ALL if needs_quotes else csv.QUOTE_MINIMAL)
    writer.writerow(names)
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


def as_table(name: str, value: Any) -> Mapping[str, Any]:
    """Return `value`, the table `name`. Raises ConfigError for anything else."""
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name} = {value!r} must be a table of settings, as in [{name}]")
    return value


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file. Raises ConfigError for a file that is missing, unreadable or not TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not text in UTF-8: byte {error.start} is {error.object[error.start]:#04x}"
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None


def parse_override(text: str, keys: Mapping[str, Key] | None = None) -> tuple[str, Value]:
    """Parse ``key=value`` from the command line, where a string needs no quotes.

    The value is TOML, or a number or truth value as Python writes it, and else a string. `keys` are the known keys: the
    value of one whose type is a string is always a string. Raises ConfigError for a text without ``=``.

    >>> parse_override("learning-rate=1e-3"), parse_override("model=minilm"), parse_override("rescale=True")
    (('learning-rate', 0.001), ('model', 'minilm'), ('rescale', True))
    """
    name, equals, raw = text.partition("=")
    if not equals:
        raise ConfigError(f"--set {text!r} must have the form KEY=VALUE")
    name = name.strip()
    value = _parse_value(raw)
    if keys and name in keys and isinstance(keys[name].default, str) and not isinstance(value, str):
        value = raw.strip()
    return name, value


def _parse_value(raw: str) -> Any:
    try:
        return tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        pass
    if raw.strip().lower() in ("true", "false"):
        return raw.strip().lower() == "true"
    return float(raw) if NUMBER.fullmatch(raw.strip()) else raw
