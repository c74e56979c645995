"""`copra-fl config`: all configuration keys, or one in full."""

from __future__ import annotations

import json
import math
from typing import Annotated, Any

import typer
from rich.table import Column, Table

from copra_fl.config import KEYS, ConfigError, Key, toml_value, unknown_key
from copra_fl.console import plain_console


def config(
    name: Annotated[str | None, typer.Argument(metavar="[KEY]", help="Show this key only, in full.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Explain the configuration keys: default, allowed values, meaning, and the section or rule they belong to."""
    keys = all_keys()
    if name is not None:
        if name not in keys:
            raise ConfigError(unknown_key("configuration key", name, keys))
        print(json.dumps(as_record(keys[name]), indent=2) if as_json else in_full(keys[name]))
    elif as_json:
        print(json.dumps([as_record(key) for key in keys.values()], indent=2))
    else:
        print_tables(keys)


def all_keys() -> dict[str, Key]:
    """Return every configuration key by name, those of the rules' parameters last."""
    from copra_fl.aggregation.compatibility import parameter_keys  # imports torch, which is slow

    return KEYS | parameter_keys()


def belongs_to(key: Key) -> str:
    """Return ``section NAME`` or ``rule NAME``."""
    return f"{'section' if key.name in KEYS else 'rule'} {key.owner}"


def as_record(key: Key) -> dict[str, Any]:
    """Return `key` as plain data for JSON; a limit that does not exist is null."""
    limits = {"minimum": key.low, "maximum": key.high, "exclusive_minimum": key.above}
    return {
        "key": key.name,
        "belongs_to": belongs_to(key),
        "type": type(key.default).__name__,
        "default": key.default,
        "choices": list(key.choices),
        **{name: limit if math.isfinite(limit) else None for name, limit in limits.items()},
        "meaning": key.doc,
    }


def in_full(key: Key) -> str:
    """Return `key` in full, as lines of text."""
    return (
        f"{key.name}\n"
        f"  meaning     {key.doc}\n"
        f"  default     {toml_value(key.default)}\n"
        f"  allowed     {key.allowed}\n"
        f"  belongs to  {belongs_to(key)}"
    )


def print_tables(keys: dict[str, Key]) -> None:
    """Print one table per section and rule."""
    console = plain_console()
    for owner in dict.fromkeys(map(belongs_to, keys.values())):
        default, meaning = (
            Column("key = default", ratio=2, overflow="fold"),
            Column("meaning, and allowed values", ratio=3),
        )
        table = Table(default, meaning, title=owner, title_justify="left", show_lines=True, expand=True)
        for key in keys.values():
            if belongs_to(key) == owner:
                table.add_row(f"{key.name} = {toml_value(key.default)}", f"{key.doc}\n({key.allowed})")
        console.print(table)
