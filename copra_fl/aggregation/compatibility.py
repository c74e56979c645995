"""Settings that do not combine: one table of conditions and reasons, and the rules' own parameters.

`check` is called once per run before anything starts, by `simulation.preflight` and by the server. Single values and
counts are checked by `copra_fl.config` already. The rows on privacy are in `privacy_conflicts`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Protocol

from copra_fl.aggregation.privacy_conflicts import Conflicts, privacy_conflicts, secure_conflicts
from copra_fl.aggregation.rule import Rule
from copra_fl.aggregation.rules import RULES, find_rule, rule_names
from copra_fl.aggregation.rules.trimmed_mean import num_trimmed
from copra_fl.config import BY_LABEL, Config, ConfigError, Key, values_by_owner


class TaskTraits(Protocol):
    """The attributes of `copra_fl.tasks.Task` that decide what it combines with. Tasks import aggregation."""

    @property
    def name(self) -> str: ...

    @property
    def columns(self) -> tuple[str, ...]: ...

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
    tables = (
        _rule_conflicts(config, rule),
        _start_conflicts(config, rule),
        _optimizer_conflicts(config),
        _trainer_conflicts(config, rule, task),
        privacy_conflicts(config, rule),
        secure_conflicts(config, rule) if config.privacy.secure_aggregation else [],
        _task_conflicts(config, task),
    )
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
    values = values_by_owner(dict(config.rule_parameters), parameter_keys() | rule.keys, "rule parameter")
    return rule.parameters(**values.get(rule.name, {}))


def parameter_keys() -> dict[str, Key]:
    """Return the keys of all built-in rules' parameters, by name."""
    return {name: key for rule in RULES for name, key in rule.keys.items()}


def heads_of(config: Config) -> int:
    """Return the number of heads of the matrix R that the run's rule puts between B and A; 0 for a rule without."""
    return getattr(parameters_of(config), "heads", 1) if find_rule(config.aggregation.rule).core else 0


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
    moments = training.optimizer_state
    it, heads = f"rule = {rule.name!r} does not combine with", heads_of(config)
    copra, per_round = config.copra, f"layers-per-round = {config.copra.layers_per_round}"
    depths = f"client-depths = {copra.client_depths!r}"
    subset, remedy = (depths, "client-depths = ''") if copra.client_depths else (per_round, "layers-per-round = 0")
    trim, round_size = (
        getattr(parameters_of(config), "trim_fraction", None),
        config.federation.round_size(data.num_clients),
    )
    return [
        (
            trim is not None and round_size > 0 and num_trimmed(trim, round_size) == 0,
            f"rule = {rule.name!r} trims nobody: {rule.name}.trim-fraction = {trim} of {round_size} clients is less "
            "than one at each end; it must be at least 1 / (clients in a round), of which there must be 3 or more",
        ),
        (
            heads > 1 and model.rank % heads > 0,
            f"{it} rank = {model.rank}: {rule.name}.heads = {heads} does not divide it; set rank to a "
            f"multiple of {heads}, or {rule.name}.heads to a divisor of {model.rank}",
        ),
        (
            bool(rule.no_copra) and config.copra.local_training == "copra",
            f"{it} local-training = 'copra': {rule.no_copra}; use local-training = 'lora'",
        ),
        (
            bool(rule.no_copra) and copra.trains_subset,
            f"{it} {subset}: {rule.no_copra}; use {remedy}",
        ),
        (
            rule.trains(1) != rule.trains(2)
            and copra.layers_per_round > 0
            and copra.layer_selection == "cycle"
            and copra.rounds_per_layer % 2 == 1,
            f"{it} layer-selection = 'cycle' and rounds-per-layer = {copra.rounds_per_layer}: it trains A and B in "
            "turns, so layers could meet the same factor in every cycle; use an even rounds-per-layer, or "
            "layer-selection = 'random'",
        ),
        (
            copra.trains_subset and copra.local_training == "head",
            f"{subset} does not combine with local-training = 'head', which trains no layer; use {remedy}",
        ),
        (
            copra.layers_per_round > 0 and bool(copra.client_depths),
            f"{per_round} does not combine with {depths}: each says which layers a client trains; use {remedy}",
        ),
        (
            rule.name != "fedavg" and config.copra.local_training == "head",
            f"{it} local-training = 'head', which has no adapters to aggregate; use rule = 'fedavg'",
        ),
        (
            rule.core == "gradient" and model.quantization != "none",
            f"{it} quantization = {model.quantization!r}: it needs gradients of the base weights, which 4-bit weights "
            "do not have; use quantization = 'none'",
        ),
        (
            model.dora and not rule.takes_magnitudes,
            f"{it} dora = true: it computes products B A, which leave out DoRA's magnitudes; use dora = false, or "
            f"one of {rule_names(lambda other: other.takes_magnitudes)}",
        ),
        (
            model.dora and copra.local_training == "copra" and copra.rescale,
            "rescale = true does not combine with dora = true: it scales the product B A, which is not the whole "
            "change of a layer; use rescale = false",
        ),
        (
            model.dora and (copra.local_training == "copra" or copra.trains_subset) and copra.off == "global",
            "off = 'global' does not combine with dora = true: it adds the product B A of the round's start, which is "
            "not the whole change of a layer; use off = 'base'",
        ),
        (
            rule.personal and config.evaluation.target_accuracy > 0,
            f"{it} target-accuracy = {config.evaluation.target_accuracy:g}: it has no global model, so there is no "
            "validation accuracy to reach; use target-accuracy = 0",
        ),
        (
            rule.personal and config.evaluation.patience > 0,
            f"{it} patience = {config.evaluation.patience}: it has no global model, so there is no validation accuracy "
            "to improve; use patience = 0",
        ),
        (
            rule.needs_data and not data.dataset,
            f"{it} dataset = '' (a server without data): it needs validation data on the server; set dataset",
        ),
        (
            bool(settings.client_ranks) and not rule.unequal_ranks,
            f"{it} client-ranks = {settings.client_ranks!r}: it needs equal ranks; rules for unequal ranks are "
            f"{rule_names(lambda other: other.unequal_ranks)}",
        ),
        (
            settings.server_optimizer != "none" and not rule.averages,
            f"{it} server-optimizer = {settings.server_optimizer!r}: its next adapter is not an average of the "
            f"clients' adapters, so there is no step to take; use server-optimizer = 'none', or one of "
            f"{rule_names(lambda other: other.averages)}",
        ),
        (
            settings.control_variates and (not rule.averages or heads > 1),
            f"{it} control-variates = true: control variates need factors that keep their meaning over rounds; use "
            "control-variates = false",
        ),
        (
            settings.control_variates and bool(settings.client_ranks),
            f"client-ranks = {settings.client_ranks!r} does not combine with control-variates = true: control variates "
            "need factors that all clients share and that keep their meaning over rounds; use control-variates = false",
        ),
        (
            moments != "fresh" and not rule.keeps_factors,
            f"{it} optimizer-state = {moments!r}: it draws or recomputes the factors in each round, so moments of "
            "earlier rounds do not fit them; use optimizer-state = 'fresh'",
        ),
        (
            moments == "shared" and (rule.personal or heads > 1),
            f"{it} optimizer-state = 'shared': a part of each model stays with its client, and so must its moments; "
            "use optimizer-state = 'client'",
        ),
    ]


def _optimizer_conflicts(config: Config) -> Conflicts:
    training = config.training
    it = f"optimizer-state = {training.optimizer_state!r}"
    return [
        (
            training.optimizer_state != "fresh" and training.optimizer == "sgd" and training.momentum == 0,
            f"{it} has no effect with optimizer = 'sgd' and momentum = 0, which has no state; set momentum, or use "
            "optimizer-state = 'fresh'",
        ),
        (
            training.optimizer_state == "shared" and bool(config.aggregation.client_ranks),
            f"{it} does not combine with client-ranks = {config.aggregation.client_ranks!r}: moments of unequal ranks "
            "cannot be averaged; use optimizer-state = 'client'",
        ),
    ]


def _trainer_conflicts(config: Config, rule: Rule, task: TaskTraits) -> Conflicts:
    """Settings of the local training that a user's Trainer does not follow (`training.trainer`)."""
    training, settings, copra = config.training, config.aggregation, config.copra
    if training.engine != "trainer":
        return [
            (
                bool(training.script),
                f"script = {training.script!r} has no effect with engine = {training.engine!r}; use engine = 'trainer'",
            )
        ]
    it = "engine = 'trainer' does not combine with"
    return [
        (not training.script, "engine = 'trainer' needs script, the Python file that makes the Trainer"),
        (
            task.trains_head,
            f"{it} task = {task.name!r}, which trains a head that no Transformers model has; use a task without one, "
            "such as causal-lm or label-words",
        ),
        (
            bool(rule.core) or rule.grams,
            f"{it} rule = {rule.name!r}, whose clients train or send more than PEFT's LoRA adapter (a matrix between A "
            "and B, or Gram matrices); use another rule",
        ),
        (
            training.local_epochs > 0,
            f"{it} local-epochs = {training.local_epochs}: the Trainer decides the size of a step; use local-steps",
        ),
        (
            training.optimizer_state != "fresh",
            f"{it} optimizer-state = {training.optimizer_state!r}: each round begins with a new optimizer of the "
            "Trainer's; use optimizer-state = 'fresh'",
        ),
        (
            copra.local_training == "line" or copra.off == "global",
            f"{it} local-training = 'line' and off = 'global', which need a training loop of copra-fl; use "
            "local-training = 'copra' or 'lora', and off = 'base'",
        ),
        (
            copra.local_training == "copra" and copra.p0 < 1 and not copra.min_active,
            f"{it} local-training = 'copra' with p0 = {copra.p0:g} and min-active = 0: a Trainer trains adapters "
            "alone, and a step in which all of them are off has no gradient; use min-active = 1",
        ),
        (
            bool(copra.client_depths),
            f"{it} client-depths = {copra.client_depths!r}: a Trainer does not count the memory of a step; use "
            "layers-per-round",
        ),
        (
            settings.control_variates or settings.proximal_mu > 0 or settings.gucci_beta > 0,
            f"{it} control-variates = true, proximal-mu and gucci-beta, which change the gradients of each step; use "
            "control-variates = false, proximal-mu = 0 and gucci-beta = 0",
        ),
        (
            len(config.data.datasets) > 1,
            f"{it} dataset = {config.data.dataset!r} (several data sets): rows of one table are dealt out to the "
            "scripts; use one dataset",
        ),
    ]


def _start_conflicts(config: Config, rule: Rule) -> Conflicts:
    """Clients that need other adapters than the newest global one (`aggregation.starts`)."""
    federation, settings = config.federation, config.aggregation
    has_own, has_stale = federation.start == "own", federation.stale_clients > 0
    own, stale = "start = 'own'", f"stale-clients = {federation.stale_clients:g}"
    either = own if has_own else stale
    remedy = "start = 'common'" if has_own else "stale-clients = 0"
    has_older_anchors = settings.gucci_beta > 0 and settings.gucci_anchors > 1
    anchors = f"gucci-anchors = {settings.gucci_anchors}"
    older, newest_only = (stale, "stale-clients = 0") if has_stale else (anchors, "gucci-anchors = 1")
    fixes_a = bool(rule.core) or rule.keeps_factors
    return [
        (
            has_own and "A" not in rule.sends(1),
            f"rule = {rule.name!r} does not combine with {own}: in the first round it averages the rest of the model "
            "only, under an A that all clients share; use start = 'common'",
        ),
        (
            has_own and settings.server_optimizer != "none",
            f"server-optimizer = {settings.server_optimizer!r} does not combine with {own}: the change from the "
            "initial adapter to an average of random factors is no gradient step; use server-optimizer = 'none'",
        ),
        (
            has_stale and has_older_anchors,
            f"{anchors} does not combine with {stale}: stale clients have not received the newest global adapters; use "
            "gucci-anchors = 1 or stale-clients = 0",
        ),
        (
            (has_stale or has_older_anchors) and rule.changes_base,
            f"rule = {rule.name!r} does not combine with {older}: it changes W0 in every round, and an old adapter "
            f"belongs to an old W0; use {newest_only}",
        ),
        (
            (has_stale or has_older_anchors)
            and (rule.trains(1) != rule.trains(2) or not (fixes_a or "A" in rule.sends(1))),
            f"rule = {rule.name!r} does not combine with {older}: clients train one factor under the newest value of "
            f"another, which changes from round to round, and an old adapter has an old one; use {newest_only}",
        ),
        (
            has_older_anchors and not fixes_a,
            f"rule = {rule.name!r} does not combine with {anchors}: it draws or recomputes the factors in each round, "
            "so the midpoint to an older adapter mixes factors that do not fit; use gucci-anchors = 1",
        ),
        (
            (has_own or has_stale) and settings.control_variates,
            f"control-variates = true does not combine with {either}: control variates compare gradients at one "
            f"adapter; use control-variates = false or {remedy}",
        ),
        (
            (has_own or has_stale) and config.privacy.dp_clip > 0,
            f"dp-clip = {config.privacy.dp_clip:g} does not combine with {either}: the distance of a client's start "
            f"from the global adapter would be clipped as if the client had learned it; use dp-clip = 0 or {remedy}",
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
            data.shots > 0 and task.labels != "one",
            f"shots = {data.shots} counts examples by label, but {it} does not have exactly one label per example; use "
            "client-examples",
        ),
        (
            data.duplicates == "near" and task.columns[0] != "text-column",
            f"duplicates = 'near' compares texts, but the content of {it} is its {task.columns[0]}; use duplicates = "
            "'exact'",
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
            config.training.optimizer_state == "shared",
            f"{it} optimizer-state = 'shared': a client has no moments for the rows of the head that it does not train",
        ),
        (
            config.privacy.dp_clip > 0,
            f"{it} dp-clip = {config.privacy.dp_clip:g}: it divides by the number of all clients, but only some of "
            "them train a given row of the head",
        ),
        (task.labels != "one", f"{it} task = {task.name!r}, which does not have exactly one label per example"),
        (
            task.labels == "one" and not task.trains_head,
            f"{it} task = {task.name!r}, which has no head with rows for the labels of each data set",
        ),
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
