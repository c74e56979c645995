"""Settings that do not combine: one table of conditions and reasons, and the rules' own parameters.

`check` is called once per run before anything starts, by `simulation.preflight` and by the server. Single values and
counts are checked by `copra_fl.config` already.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

from copra_fl.aggregation.rule import Rule
from copra_fl.aggregation.rules import RULES, find_rule
from copra_fl.config import BY_LABEL, Config, ConfigError, Key, values_by_owner

#: rows of the table: whether it applies, and the sentence that says so
Conflicts = list[tuple[bool, str]]


class TaskTraits(Protocol):
    """The attributes of `copra_fl.tasks.Task` that decide what it combines with. Tasks import aggregation."""

    @property
    def name(self) -> str: ...

    @property
    def labels(self) -> str: ...

    @property
    def trains_head(self) -> bool: ...


def check(config: Config, task: TaskTraits) -> None:
    """Check that the settings of `config` combine with each other, with the rule and with `task`.

    Raises ConfigError for an unknown rule or rule parameter, and with every reason of the table that applies, one per
    line.
    """
    rule = find_rule(config.aggregation.rule)
    parameters_of(config)
    tables = (_rule_conflicts(config, rule), _privacy_conflicts(config, rule), _task_conflicts(config, task))
    reasons = [reason for table in tables for applies, reason in table if applies]
    if len(config.data.datasets) > 1:
        reasons += [reason for applies, reason in _several_datasets_conflicts(config, rule, task) if applies]
    if reasons:
        raise ConfigError("\n".join(reasons))


def parameters_of(config: Config) -> Any:
    """Return the parameters of the run's rule, as an instance of `Rule.parameters`: given values, else defaults.

    Raises ConfigError that lists every unknown rule parameter of `config` and every wrong value, also of other rules.
    """
    rule = find_rule(config.aggregation.rule)
    values = values_by_owner(dict(config.rule_parameters), parameter_keys(), "rule parameter")
    return rule.parameters(**values.get(rule.name, {}))


def parameter_keys() -> dict[str, Key]:
    """Return the keys of all rules' parameters, by name."""
    return {name: key for rule in RULES for name, key in rule.keys.items()}


def with_explicit_parameters(config: Config) -> Config:
    """Return `config` with every parameter of its own rule, and none of other rules.

    Two such configurations are equal exactly if they run alike, whichever defaults were written out in them.
    """
    rule, parameters = find_rule(config.aggregation.rule), parameters_of(config)
    values = {name: getattr(parameters, key.attribute) for name, key in rule.keys.items()}
    return replace(config, rule_parameters=tuple(sorted(values.items())))


def require_global_model(config: Config, purpose: str) -> None:
    """Raise ConfigError if the rule has no global model; `purpose` says what one is needed for."""
    if find_rule(config.aggregation.rule).personal:
        raise ConfigError(
            f"rule = {config.aggregation.rule!r} leaves a part of each model with its client, so there is no global "
            f"model {purpose}"
        )


def _rule_conflicts(config: Config, rule: Rule) -> Conflicts:
    settings, training, model, data = config.aggregation, config.training, config.model, config.data
    it = f"rule = {rule.name!r} does not combine with"
    return [
        (
            bool(rule.no_copra) and config.copra.local_training == "copra",
            f"{it} local-training = 'copra': {rule.no_copra}; use local-training = 'lora'",
        ),
        (
            rule.name != "fedavg" and config.copra.local_training == "head",
            f"{it} local-training = 'head', which has no adapters to aggregate; use rule = 'fedavg'",
        ),
        (
            rule.core and model.quantization != "none",
            f"{it} quantization = {model.quantization!r}: it needs gradients of the base weights, which 4-bit weights "
            "do not have; use quantization = 'none'",
        ),
        (
            rule.needs_data and not data.dataset,
            f"{it} dataset = '' (a server without data): it needs validation data on the server; set dataset",
        ),
        (
            bool(settings.client_ranks) and not rule.unequal_ranks,
            f"{it} client-ranks = {settings.client_ranks!r}: it needs equal ranks; rules for unequal ranks are "
            f"{_names(lambda other: other.unequal_ranks)}",
        ),
        (
            settings.server_optimizer != "none" and not rule.averages,
            f"{it} server-optimizer = {settings.server_optimizer!r}: its next adapter is not an average of the "
            f"clients' adapters, so there is no step to take; use server-optimizer = 'none', or one of "
            f"{_names(lambda other: other.averages)}",
        ),
        (
            settings.control_variates and not rule.averages,
            f"{it} control-variates = true: control variates need factors that keep their meaning over rounds; use "
            "control-variates = false",
        ),
        (
            settings.control_variates and bool(settings.client_ranks),
            f"client-ranks = {settings.client_ranks!r} does not combine with control-variates = true: control variates "
            "need factors that all clients share and that keep their meaning over rounds; use control-variates = false",
        ),
        (
            training.hidden_state_cache_mb > 0 and rule.changes_base,
            f"{it} hidden-state-cache-mb = {training.hidden_state_cache_mb}: it changes W0, and the cache holds hidden "
            "states of the old W0; use hidden-state-cache-mb = 0",
        ),
    ]


def _privacy_conflicts(config: Config, rule: Rule) -> Conflicts:
    """Differential privacy: adding or removing one client may move the sum of changes by dp-clip and no more."""
    settings, over_sample = config.aggregation, config.federation.over_sample
    private, it = config.privacy.dp_clip > 0, f"dp-clip = {config.privacy.dp_clip:g}"
    return [
        (
            private and not rule.linear,
            f"rule = {rule.name!r} does not combine with {it}: it does not average changes, so one client could move "
            f"the result by more than its share; use one of {_names(lambda other: other.linear and not other.grams)}",
        ),
        (
            private and settings.weighting != "equal",
            f"{it} needs weighting = 'equal', not {settings.weighting!r}: all clients must have the same weight",
        ),
        (
            private and rule.grams,
            f"rule = {rule.name!r} does not combine with {it}: Gram matrices travel without clipping and noise; use "
            f"one of {_names(lambda other: other.linear and not other.grams)}",
        ),
        (
            private and settings.control_variates,
            f"{it} does not combine with control-variates = true: control variates travel without clipping and noise; "
            "use control-variates = false",
        ),
        (
            private and over_sample > 0,
            f"{it} does not combine with over-sample = {over_sample:g}: if one client were missing, another would take "
            "its place; use over-sample = 0",
        ),
    ]


def _task_conflicts(config: Config, task: TaskTraits) -> Conflicts:
    data, it = config.data, f"task = {task.name!r}"
    return [
        (
            data.partitioner in BY_LABEL and task.labels != "one",
            f"partitioner = {data.partitioner!r} splits examples by label, but {it} does not have exactly one label "
            "per example; use natural, iid or own",
        ),
        (
            not (data.dataset or data.labels) and task.labels != "none",
            f"dataset = '' (a server without data) and {it} need the list of labels; set labels",
        ),
        (
            config.copra.local_training == "head" and not task.trains_head,
            f"{it} does not combine with local-training = 'head': the task has no head to train; use copra or lora",
        ),
    ]


def _several_datasets_conflicts(config: Config, rule: Rule, task: TaskTraits) -> Conflicts:
    data, settings = config.data, config.aggregation
    it = f"dataset = {data.dataset!r} (several data sets) does not combine with"
    return [
        (
            bool(rule.no_several_datasets),
            f"{it} rule = {rule.name!r}: {rule.no_several_datasets}",
        ),
        (
            settings.control_variates,
            f"{it} control-variates = true: they would move the rows of the head that a client does not train",
        ),
        (
            config.privacy.dp_clip > 0,
            f"{it} dp-clip = {config.privacy.dp_clip:g}: it divides by the number of all clients, but only some of "
            "them train a given row of the head",
        ),
        (task.labels != "one", f"{it} task = {task.name!r}, which does not have exactly one label per example"),
        (
            data.num_clients < len(data.datasets),
            f"{it} num-clients = {data.num_clients}: each data set needs at least one client; set num-clients to "
            f"{len(data.datasets)} or more",
        ),
        (data.partitioner == "own", f"{it} partitioner = 'own', where each node has its own file"),
        (bool(data.labels), f"{it} labels = {data.labels!r}: each data set has its own list; leave labels empty"),
        (
            bool(data.test_file),
            f"{it} test-file = {data.test_file!r}: each data set has its own test set; leave test-file empty",
        ),
        (
            data.held_out_clients > 0,
            f"{it} held-out-clients = {data.held_out_clients}, which is not supported with several data sets",
        ),
    ]


def _names(matches: Callable[[Rule], bool]) -> str:
    return ", ".join(rule.name for rule in RULES if matches(rule))
