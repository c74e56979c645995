"""The configuration of a run. `sections` has all keys: names, defaults, types, ranges.

A run's configuration is flat TOML with kebab-case keys, because that is what Flower passes around
(``[tool.flwr.app.config]``, ``--run-config``). In code the same keys are frozen dataclasses, one per section.
`Config.from_flat` is the only way in: it converts, checks and names every wrong value. Whether settings combine with
each other, with the rule and with the task is checked by `copra_fl.aggregation.compatibility`.

A rule declares its own parameters in its own file. Their keys are dotted, RULE.KEY (``trimmed-mean.trim-fraction``).
This module does not import the rules, so it keeps such keys as they are given, and
`aggregation.compatibility.parameters_of` checks them.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from copra_fl.config.keys import ConfigError, Key, Value, kebab, keys_of, option, unknown_key, values_by_owner
from copra_fl.config.sections import (
    BY_LABEL,
    SECURE_DEFAULTS,
    AggregationConfig,
    CopraConfig,
    DataConfig,
    EvaluationConfig,
    FederationConfig,
    ModelConfig,
    PrivacyConfig,
    TrainingConfig,
)
from copra_fl.config.toml import as_table, csv_line, csv_list, flatten, parse_override, read_toml, toml_value
from copra_fl.files import digest_of

__all__ = [
    "BY_LABEL",
    "KEYS",
    "SECTIONS",
    "AggregationConfig",
    "Config",
    "ConfigError",
    "CopraConfig",
    "DataConfig",
    "EvaluationConfig",
    "FederationConfig",
    "Key",
    "ModelConfig",
    "PrivacyConfig",
    "TrainingConfig",
    "Value",
    "as_table",
    "csv_line",
    "csv_list",
    "flatten",
    "kebab",
    "keys_of",
    "option",
    "parse_override",
    "read_toml",
    "toml_value",
    "unknown_key",
    "values_by_owner",
]

#: key of a Flower run with rule parameters as TOML
PARAMETERS = "rule-parameters"
#: form of a rule parameter's key, RULE.KEY
RULE_PARAMETER = re.compile(r"[a-z0-9-]+\.[a-z0-9-]+")


@dataclass(frozen=True)
class Config:
    """The configuration of one run. Build it with `from_flat` or `from_toml`.

    Attributes:
        rule_parameters: (key, value) of the rule parameters that are given, sorted by key, unchecked.
    """

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    copra: CopraConfig = CopraConfig()
    training: TrainingConfig = TrainingConfig()
    federation: FederationConfig = FederationConfig()
    aggregation: AggregationConfig = AggregationConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    rule_parameters: tuple[tuple[str, Value], ...] = ()

    @classmethod
    def from_flat(cls, flat: Mapping[str, Any]) -> Config:
        """Return the configuration with the values of `flat` (key -> value) and defaults for all other keys.

        Some defaults depend on secure-aggregation (`sections.SECURE_DEFAULTS`). A table is accepted in place of dotted
        keys. Raises ConfigError that lists every unknown key, wrong type and value out of range, one per line.
        """
        flat = flatten(flat)
        if flat.get("secure-aggregation") is True:
            flat = SECURE_DEFAULTS | flat
        parameters = {name: value for name, value in flat.items() if RULE_PARAMETER.fullmatch(name)}
        for name, value in parameters.items():
            if not isinstance(value, Value):
                raise ConfigError(f"{name} = {value!r} must be true, false, a number or a string")
        others = {name: value for name, value in flat.items() if name not in parameters}
        values = values_by_owner(others, KEYS, "configuration key")
        sections = {name: section(**values.get(name, {})) for name, section in SECTIONS.items()}
        config = cls(**sections, rule_parameters=tuple(sorted(parameters.items())))
        config._check_values()
        return config

    @classmethod
    def from_toml(cls, path: Path) -> Config:
        """Read a run folder's ``config.toml``. Raises ConfigError with the path as `from_flat` does."""
        flat = read_toml(path)
        try:
            return cls.from_flat(flat)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    def to_flat(self) -> dict[str, Value]:
        """Return every key with its value: the inverse of `from_flat`. Of rule parameters those that are given."""
        values = {name: getattr(getattr(self, key.owner), key.attribute) for name, key in KEYS.items()}
        return values | dict(self.rule_parameters)

    def to_run_config(self) -> dict[str, Value]:
        """Return `to_flat` for Flower, which takes keys of pyproject.toml only: rule parameters are one text."""
        parameters = dict(self.rule_parameters)
        values = {key: value for key, value in self.to_flat().items() if key not in parameters}
        return values | {PARAMETERS: "\n".join(f"{key} = {toml_value(value)}" for key, value in parameters.items())}

    @classmethod
    def from_run_config(cls, flat: Mapping[str, Any]) -> Config:
        """Return the configuration of a Flower run: the inverse of `to_run_config`.

        Raises ConfigError as `from_flat` does, and for rule parameters that are not TOML.
        """
        try:
            parameters = tomllib.loads(str(flat.get(PARAMETERS, "")))
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{PARAMETERS} = {flat[PARAMETERS]!r} is not valid TOML: {error}") from None
        values = {key: value for key, value in flat.items() if key != PARAMETERS}
        return cls.from_flat(values | flatten(parameters))

    @property
    def digest(self) -> str:
        """The SHA-256 of `to_flat`, which names the configuration in audit logs."""
        return digest_of(self.to_flat())

    def to_toml(self) -> str:
        """Return `to_flat` as TOML."""
        return "".join(f"{key} = {toml_value(value)}\n" for key, value in self.to_flat().items())

    def changed(self, **flat: Value) -> Config:
        """Return this configuration with the given keys (in snake_case) replaced. Raises ConfigError as `from_flat`."""
        return Config.from_flat(self.to_flat() | {kebab(key): value for key, value in flat.items()})

    def differences(self, other: Config) -> list[str]:
        """Return the keys with different values, as ``key: value here -> value in other``."""
        ours, theirs = ({key: repr(value) for key, value in config.to_flat().items()} for config in (self, other))
        return [
            f"{key}: {ours.get(key, 'not set')} -> {theirs.get(key, 'not set')}"
            for key in ours | theirs
            if ours.get(key) != theirs.get(key)
        ]

    def _check_values(self) -> None:
        """Raise ConfigError for values that contradict each other.

        `changed` repeats these checks, so counts that depend on num-clients are among them: it may become known late.
        """
        data, copra, federation = self.data, self.copra, self.federation
        if data.partitioner == "natural" and not data.client_column:
            raise ConfigError(
                "partitioner = 'natural' needs client-column: the name of the column with the client id of each example"
            )
        if data.held_out_clients and data.partitioner != "natural":
            raise ConfigError(
                f"held-out-clients = {data.held_out_clients} needs partitioner = 'natural', not {data.partitioner!r}: "
                "held-out clients are values of client-column"
            )
        if not data.dataset and data.partitioner != "own":
            raise ConfigError("dataset = '' (a server without data) needs partitioner = 'own'; else set dataset")
        if data.dataset and not all(data.datasets):
            raise ConfigError(f"dataset = {data.dataset!r} has an empty name; remove the extra comma")
        if len(set(labels := data.label_list)) < len(labels) or len(labels) == 1:
            raise ConfigError(f"labels = {data.labels!r} must be at least two different labels")
        if copra.p0 > copra.p1:
            raise ConfigError(f"p0 = {copra.p0} must not exceed p1 = {copra.p1}")
        if federation.over_sample and federation.failures == "strict":
            raise ConfigError(
                f"over-sample = {federation.over_sample:g} leaves the slowest clients out, which failures = 'strict' "
                "does not allow; set failures = 'tolerant'"
            )
        if data.num_clients and federation.clients_per_round > data.num_clients:
            raise ConfigError(
                f"clients-per-round = {federation.clients_per_round} must not exceed num-clients = {data.num_clients}"
            )
        if data.num_clients and federation.min_replies > (size := federation.round_size(data.num_clients)):
            raise ConfigError(
                f"min-replies = {federation.min_replies} must not exceed the number of clients in a round, which is "
                f"{size}; lower it, or raise clients-per-round or fraction-clients"
            )
        self._check_client_ranks()
        self._check_client_depths()

    def _check_client_ranks(self) -> None:
        """Raise ConfigError unless client-ranks is a list of ranks with, where listed, one for each client."""
        text, ranks = self.aggregation.client_ranks, self.aggregation.rank_list
        if not all(1 <= rank <= self.model.rank for rank in ranks):
            raise ConfigError(f"client-ranks = {text!r}: each must be at least 1 and at most rank = {self.model.rank}")
        self._check_length("rank", text, ranks, self.aggregation.rank_assignment)

    def _check_client_depths(self) -> None:
        """Raise ConfigError unless client-depths is a list of depths, and min-depth leaves some of them."""
        text, depths, min_depth = self.copra.client_depths, self.copra.depth_list, self.copra.min_depth
        if min(depths, default=1) < 1:
            raise ConfigError(f"client-depths = {text!r}: each must be at least 1")
        if min_depth and not depths:
            raise ConfigError(f"min-depth = {min_depth} needs client-depths; set both, or min-depth = 0")
        if min_depth > max(depths, default=0):
            raise ConfigError(
                f"min-depth = {min_depth} leaves all clients out: the largest of client-depths = {text!r} is "
                f"{max(depths)}"
            )
        self._check_length("depth", text, depths, self.copra.depth_assignment)

    def _check_length(self, kind: str, text: str, values: list[int], assignment: str) -> None:
        """Raise ConfigError unless client-`kind`s, where listed, has one value for each client."""
        num_clients = self.data.num_clients
        if values and num_clients and assignment == "listed" and len(values) != num_clients:
            raise ConfigError(
                f"client-{kind}s = {text!r} has {len(values)} {kind}s for {num_clients} clients; list one {kind} per "
                f"client, or set {kind}-assignment = 'drawn'"
            )


#: section name -> its dataclass
SECTIONS: dict[str, Any] = {f.name: type(f.default) for f in fields(Config) if f.name != "rule_parameters"}


#: every key but the rules' parameters, by name
KEYS: dict[str, Key] = {
    name: key for section, options in SECTIONS.items() for name, key in keys_of(section, options).items()
}
