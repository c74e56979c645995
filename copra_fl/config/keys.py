"""Declaration and check of configuration keys: name, owner, default, meaning, allowed values."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from importlib.metadata import entry_points
from typing import Any, cast

from copra_fl.config.other_names import OTHER_NAMES

Value = bool | int | float | str


class ConfigError(ValueError):
    """A configuration that cannot run. The message names the key, the value and what is allowed."""


@dataclass(frozen=True)
class Key:
    """A configuration key.

    Attributes:
        name: the key in TOML, ``learning-rate`` or ``trimmed-mean.trim-fraction``.
        owner: the section of `Config`, or the rule, that the key belongs to.
        attribute: the field of the owner's dataclass that stores the value.
        default: the default; its type is the type of all values.
        doc: the meaning, in one line for users.
        choices: the allowed values; empty: any value of the type.
        plugins: group of entry points; their names and dotted names are allowed beside `choices` (`copra_fl.plugins`).
        low: smallest allowed number.
        high: largest allowed number.
        above: numbers must be greater than this.
    """

    name: str
    owner: str
    attribute: str
    default: Value
    doc: str
    choices: tuple[str, ...] = ()
    plugins: str = ""
    low: float = -math.inf
    high: float = math.inf
    above: float = -math.inf

    @property
    def type_name(self) -> str:
        """The type of the values, as a phrase for messages."""
        return {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}[type(self.default)]

    @property
    def limits(self) -> str:
        """The allowed range of numbers as a phrase; empty if every finite number is allowed."""
        limits = [f"more than {self.above:g}"] if self.above > -math.inf else []
        limits += [f"at least {self.low:g}"] if self.low > -math.inf else []
        limits += [f"at most {self.high:g}"] if self.high < math.inf else []
        return " and ".join(limits)

    @property
    def allowed(self) -> str:
        """The allowed values as a phrase."""
        if self.choices:
            return " | ".join(self.choices) + (" | the name of a plugin" if self.plugins else "")
        return f"{self.type_name}, {self.limits}" if self.limits else self.type_name

    def check(self, value: Any) -> Value:
        """Return `value`, as a float where the key has floats. Raises ConfigError for a value that is not allowed."""
        if (type(self.default), type(value)) == (float, int):  # TOML and Flower write 1 for 1.0
            value = float(value)
        if type(value) is not type(self.default):
            hint = f', in quotes: "{value}"' if isinstance(self.default, str) and isinstance(value, int | float) else ""
            raise ConfigError(f"{self.name} = {value!r} must be {self.type_name}{hint}")
        if self.choices and value not in self.choices and not self._is_plugin(cast(str, value)):
            or_plugin = ", or the name of a plugin, as in hospital.splits:BY_YEAR" if self.plugins else ""
            raise ConfigError(f"{self.name} = {value!r} must be one of {', '.join(self.choices)}{or_plugin}")
        if isinstance(value, int | float) and not (
            math.isfinite(value) and self.low <= value <= self.high and value > self.above
        ):
            raise ConfigError(f"{self.name} = {value!r} must be {self.limits or 'finite'}")
        return value

    def _is_plugin(self, name: str) -> bool:
        """Return whether `name` can be that of a plugin; whether the plugin exists is checked where it is used."""
        return bool(self.plugins) and ("." in name or ":" in name or name in entry_points(group=self.plugins).names)


def option(
    default: Value,
    doc: str,
    *,
    choices: tuple[str, ...] = (),
    plugins: str = "",
    low: float = -math.inf,
    high: float = math.inf,
    above: float = -math.inf,
) -> Any:
    """Declare a field of a section, or of a rule's parameters, as a configuration key. For the arguments see `Key`."""
    limits = {"low": low, "high": high, "above": above}
    return field(default=default, metadata={"doc": doc, "choices": choices, "plugins": plugins, **limits})


def keys_of(owner: str, options: type, prefix: str = "") -> dict[str, Key]:
    """Return the keys, by name, that the fields of the dataclass `options` declare."""
    keys = [Key(prefix + kebab(f.name), owner, f.name, cast(Value, f.default), **f.metadata) for f in fields(options)]
    return {key.name: key for key in keys}


def values_by_owner(given: Mapping[str, Any], keys: Mapping[str, Key], kind: str) -> dict[str, dict[str, Value]]:
    """Return owner -> attribute -> value of the keys in `given`, checked; `kind` is the name for one of `keys`.

    Raises ConfigError that lists every unknown key and every value that is not allowed, one per line.
    """
    values: dict[str, dict[str, Value]] = {}
    problems = []
    for name, value in given.items():
        if name not in keys:
            problems.append(unknown_key(kind, name, keys))
            continue
        key = keys[name]
        try:
            values.setdefault(key.owner, {})[key.attribute] = key.check(value)
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))
    return values


def unknown_key(kind: str, name: str, keys: Iterable[str]) -> str:
    """Return the error message for a key that is not one of `keys`, with the one that is meant, or else the closest."""
    keys = list(keys)
    meant = [key for key in keys if kebab(name) in OTHER_NAMES.get(kebab(key), ())]
    close = meant or difflib.get_close_matches(name, keys, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"unknown {kind} {name!r}.{hint} `copra-fl config` lists all keys"


def kebab(name: str) -> str:
    """Return the TOML spelling of a Python name: ``learning-rate`` of ``learning_rate``."""
    return name.replace("_", "-")
