"""Settings that do not combine, and the rules' own parameters."""

from __future__ import annotations

from typing import Any

import pytest

from copra_fl.aggregation import RULES, Rule, compatibility, find_rule
from copra_fl.aggregation.compatibility import parameters_of, require_global_model, with_explicit_parameters
from copra_fl.config import Config, ConfigError
from copra_fl.tasks import find_task
from tests.support.compatibility import check

Settings = dict[str, Any]

LORA = {"local-training": "lora"}
PRIVATE = {"dp-clip": 1.0, "weighting": "equal"}
TWO = {"dataset": "a.csv, b.csv", "num-clients": 4}
SECURE = {"secure-aggregation": True}
NO_DATA = {"dataset": "", "partitioner": "own", "labels": "a,b"}
CAUSAL = {"task": "causal-lm", "partitioner": "iid"}

#: for each row of the table: settings that do not combine, settings that remedy it, the reason
CONFLICTS: list[tuple[Settings, Settings, str]] = [
    ({"rule": "ravan", "rank": 6}, {"ravan.heads": 3}, "rank = 6: ravan.heads = 4 does not divide it"),
    ({"rule": "fedsa-lora", "local-training": "copra"}, LORA, "each client keeps its own B"),
    (
        {"rule": "flora", "dora": True},
        {"rule": "rolora"},
        "leave out DoRA's magnitudes; use dora = false, or one of fedavg, ffa-lora, rolora, ",
    ),
    ({"dora": True, "local-training": "copra", "rescale": True}, {"rescale": False}, "rescale = true does not combine"),
    (
        {"dora": True, "local-training": "copra", "off": "global"},
        {"off": "base"},
        "off = 'global' does not combine",
    ),
    (
        {"rule": "trimmed-mean", "num-clients": 4},
        {"trimmed-mean.trim-fraction": 0.25},
        "trims nobody: trimmed-mean.trim-fraction = 0.2 of 4 clients",
    ),
    ({"rule": "fed-sb", "layers-per-round": 3} | LORA, {"layers-per-round": 0}, "fixed by a first gradient"),
    (
        {"rule": "rolora", "layers-per-round": 1, "layer-selection": "cycle"} | LORA,
        {"rounds-per-layer": 2},
        "trains A and B in turns, so layers could meet the same factor",
    ),
    ({"client-depths": "1,2", "local-training": "head"}, {"client-depths": ""}, "client-depths = '1,2' does not .* no"),
    ({"client-depths": "1,2", "layers-per-round": 3}, {"client-depths": ""}, "each says which layers a client trains"),
    ({"rule": "flora", "local-training": "head"}, {"rule": "fedavg"}, "no adapters to aggregate"),
    ({"rule": "fed-sb", "quantization": "4bit"} | LORA, {"quantization": "none"}, "gradients of the base weights"),
    (
        LORA | {"rule": "fedsa-lora", "target-accuracy": 0.5},
        {"target-accuracy": 0.0},
        "no validation accuracy to reach",
    ),
    (LORA | {"rule": "fedsa-lora", "patience": 3}, {"patience": 0}, "no validation accuracy to improve"),
    (NO_DATA | {"rule": "connectivity"}, {"dataset": "a.csv"}, "validation data on the server"),
    (
        {"rule": "median", "client-ranks": "8,4"},
        {"rule": "flexlora"},
        "rules for unequal ranks are zero-pad, hetlora, flora, florist, flexlora, trimmed-mean-product, median-pr",
    ),
    ({"rule": "flexlora", "server-optimizer": "fedadam"}, {"server-optimizer": "none"}, "no step to take"),
    ({"rule": "flora", "control-variates": True}, {"control-variates": False}, "keep their meaning over rounds"),
    (
        {"rule": "zero-pad", "client-ranks": "8,4", "control-variates": True},
        {"control-variates": False},
        "client-ranks = '8,4' does not combine with control-variates",
    ),
    (
        {"rule": "ffa-lora", "start": "own"},
        {"rule": "fedavg"},
        "under an A that all clients share; use start = 'common'",
    ),
    (
        {"start": "own", "server-optimizer": "fedavgm"},
        {"server-optimizer": "none"},
        "average of random factors is no gradient step",
    ),
    (
        {"rule": "flexlora", "gucci-beta": 0.1, "gucci-anchors": 3},
        {"gucci-anchors": 1},
        "it draws or recomputes the factors in each round, so the midpoint",
    ),
    (
        {"gucci-beta": 0.1, "gucci-anchors": 3, "stale-clients": 0.5},
        {"gucci-anchors": 1},
        "gucci-anchors = 3 does not combine with stale-clients = 0.5",
    ),
    ({"rule": "flora", "stale-clients": 0.5}, {"rule": "flexlora"}, "an old adapter belongs to an old W0"),
    (
        {"rule": "rolora", "stale-clients": 0.5},
        {"rule": "ffa-lora"},
        "rule = 'rolora' .* and an old adapter has an old one; use stale-clients = 0",
    ),
    (
        {"stale-clients": 0.5, "control-variates": True},
        {"control-variates": False},
        "control-variates = true does not combine with stale-clients = 0.5: .* use control-variates = false or stale-",
    ),
    (PRIVATE | {"start": "own"}, {"start": "common"}, "dp-clip = 1 does not combine with start = 'own'"),
    ({"rule": "flexlora", "optimizer-state": "client"}, {"optimizer-state": "fresh"}, "do not fit them"),
    (LORA | {"rule": "fedsa-lora", "optimizer-state": "shared"}, {"optimizer-state": "client"}, "so must its moments"),
    ({"optimizer": "sgd", "optimizer-state": "client"}, {"momentum": 0.9}, "has no effect with optimizer = 'sgd'"),
    (
        {"rule": "zero-pad", "client-ranks": "8,4", "optimizer-state": "shared"},
        {"optimizer-state": "client"},
        "moments of unequal ranks cannot be averaged",
    ),
    (PRIVATE | {"optimizer-state": "shared"}, {"optimizer-state": "client"}, "moments travel without clipping"),
    (TWO | {"optimizer-state": "shared"}, {"optimizer-state": "client"}, "a client has no moments for the rows"),
    (PRIVATE | {"rule": "median"}, {"rule": "rolora"}, "rule = 'median' does not combine with dp-clip = 1"),
    (PRIVATE | {"weighting": "examples"}, {"weighting": "equal"}, "dp-clip = 1 needs weighting = 'equal'"),
    (PRIVATE | {"rule": "ffa-lora-gram"}, {"rule": "ffa-lora"}, "Gram matrices travel without clipping and noise"),
    (PRIVATE | {"control-variates": True}, {"control-variates": False}, "without clipping and noise"),
    (
        PRIVATE | {"over-sample": 0.5, "failures": "tolerant"},
        {"over-sample": 0.0},
        "another would take its place; use over-sample = 0",
    ),
    (
        SECURE | {"rule": "median"},
        {"rule": "rolora"},
        "rule = 'median' does not combine with secure-aggregation = true",
    ),
    (SECURE | {"rule": "ffa-lora-gram"}, {"rule": "ffa-lora"}, "Gram matrices would travel without masks"),
    (SECURE | {"updates": "individual"}, {"updates": "pooled"}, "needs updates = 'pooled', not 'individual'"),
    (SECURE | {"uplink-dtype": "int8"}, {"uplink-dtype": "float32"}, "64-bit fixed-point numbers"),
    (SECURE | {"weighting": "equal"}, {"weighting": "activity"}, "updates are pooled by examples"),
    (SECURE | {"max-update-norm": 0.0}, {"max-update-norm": 10.0}, "it bounds the fixed-point numbers"),
    (SECURE | {"max-update-ratio": 100.0}, {"max-update-ratio": 0.0}, "does not know the length of single updates"),
    (
        SECURE | {"over-sample": 0.5, "failures": "tolerant"},
        {"over-sample": 0.0},
        "the slowest nodes would count as dropped out",
    ),
    (
        SECURE | {"merge-gap-clients": 4},
        {"merge-gap-clients": 0},
        "merge-gap-clients = 4 .* of single clients",
    ),
    (SECURE | {"path-pairs": 2}, {"path-pairs": 0}, "path-pairs = 2 .* adapters of single clients"),
    (SECURE | {"control-variates": True}, {"control-variates": False}, "control variates would travel without masks"),
    (SECURE | {"optimizer-state": "shared"}, {"optimizer-state": "client"}, "moments would travel without masks"),
    (SECURE | {"start": "own"}, {"start": "common"}, "updates from different starts are not pooled"),
    (SECURE | {"stale-clients": 0.5}, {"stale-clients": 0.0}, "stale-clients = 0.5 .* different starts are not pooled"),
    (SECURE | TWO, {"dataset": "a.csv"}, "several data sets. does not combine with secure-aggregation"),
    (CAUSAL | {"partitioner": "shards"}, {"partitioner": "iid"}, "does not have exactly one label per example"),
    (CAUSAL | {"shots": 4}, {"shots": 0, "client-examples": 4}, "counts examples by label"),
    ({"task": "image-classification", "duplicates": "near"}, {"duplicates": "exact"}, "compares texts"),
    (NO_DATA | {"labels": ""}, {"labels": "a,b"}, "need the list of labels; set labels"),
    (CAUSAL | {"local-training": "head"}, {"local-training": "copra"}, "the task has no head to train"),
    (TWO | LORA | {"rule": "fedsa-lora"}, {"rule": "fedavg"}, "no global model to test on each data set"),
    (TWO | {"control-variates": True}, {"control-variates": False}, "rows of the head that a client does not train"),
    (TWO | PRIVATE, {"dp-clip": 0.0}, "dp-clip = 1: it divides by the number of all clients"),
    (TWO | CAUSAL, {"task": "text-classification"}, "does not have exactly one label per example"),
    (TWO | {"task": "label-words"}, {"task": "text-classification"}, "no head with rows for the labels"),
    (TWO | {"num-clients": 1}, {"num-clients": 2}, "set num-clients to 2 or more"),
    (TWO | {"partitioner": "own"}, {"partitioner": "iid"}, "where each node has its own file"),
    (TWO | {"labels": "a,b"}, {"labels": ""}, "leave labels empty"),
    (TWO | {"test-file": "test.csv"}, {"test-file": ""}, "leave test-file empty"),
    (
        TWO | {"partitioner": "natural", "client-column": "owner", "held-out-clients": 1},
        {"held-out-clients": 0},
        "not supported with several data sets",
    ),
]


@pytest.mark.parametrize(("settings", "remedy", "reason"), CONFLICTS)
def test_a_conflict_is_refused_with_its_reason_and_the_remedy_works(
    settings: Settings, remedy: Settings, reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason) as caught:
        check(Config.from_flat(settings))
    assert len(str(caught.value).splitlines()) == 1, "one conflict, one line"
    check(Config.from_flat(settings | remedy))


def test_the_cases_above_cover_every_row_of_the_table() -> None:
    config, rule, task = Config(), find_rule("fedavg"), find_task("text-classification")
    rows = [
        *compatibility._rule_conflicts(config, rule),
        *compatibility._start_conflicts(config, rule),
        *compatibility._optimizer_conflicts(config),
        *compatibility.privacy_conflicts(config, rule),
        *compatibility.secure_conflicts(config, rule),
        *compatibility._task_conflicts(config, task),
        *compatibility._several_datasets_conflicts(config, rule, task),
    ]
    assert len(CONFLICTS) == len(rows)


def test_secure_aggregation_alone_is_enough_and_changes_no_key_that_is_set() -> None:
    config = Config.from_flat(SECURE)
    check(config)
    assert Config.from_flat(config.to_flat()) == config, "what travels to the nodes"
    assert {key: value for key, value in config.to_flat().items() if value != Config().to_flat()[key]} == {
        **SECURE, "updates": "pooled", "merge-gap-clients": 0, "path-pairs": 0, "max-update-norm": 100.0,
        "max-update-ratio": 0.0,
    }  # fmt: skip
    assert Config.from_flat({"secure-aggregation": False}) == Config()
    check(Config.from_flat(SECURE | PRIVATE))
    for rule in ("fedavg", "fedsa-lora"):
        with pytest.raises(ConfigError, match="merge-gap-clients = 4 does not combine with secure-aggregation = true"):
            check(Config.from_flat(SECURE | LORA | {"rule": rule, "merge-gap-clients": 4}))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_every_rule_runs_with_its_defaults(rule: Rule) -> None:
    check(Config().changed(rule=rule.name, local_training="lora" if rule.no_copra else "copra"))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_a_rule_that_needs_copra_off_or_one_data_set_says_why(rule: Rule) -> None:
    two = TWO | LORA | {"num-clients": 6}
    for settings, reason in (({"local-training": "copra"}, rule.no_copra), (two, rule.no_several_datasets)):
        config = Config.from_flat(settings | {"rule": rule.name})
        if reason:
            with pytest.raises(ConfigError, match=reason):
                check(config)
        else:
            check(config)


def test_scales_that_stay_with_a_client_have_no_shared_control_variates_or_moments() -> None:
    with pytest.raises(ConfigError, match="'ravan' does not combine with control-variates = true"):
        check(Config().changed(rule="ravan", control_variates=True))
    with pytest.raises(ConfigError, match="'ravan' does not combine with optimizer-state = 'shared'"):
        check(Config().changed(rule="ravan", optimizer_state="shared"))
    check(Config().changed(rule="ravan", optimizer_state="client"))


@pytest.mark.parametrize("changes", [{"layers-per-round": 1}, {"client-depths": "1,2"}])
def test_layers_that_are_left_out_do_not_fall_back_to_a_dora_adapter(changes: Settings) -> None:
    with pytest.raises(ConfigError, match="off = 'global' does not combine with dora = true"):
        check(Config.from_flat(LORA | {"dora": True, "off": "global"} | changes))
    check(Config.from_flat(LORA | {"dora": True, "off": "global"}))


@pytest.mark.parametrize("rule", ["flora", "rolora"])
def test_older_anchors_need_a_base_and_factors_that_stay(rule: str) -> None:
    settings = {"rule": rule, "gucci-beta": 0.1, "gucci-anchors": 3}
    with pytest.raises(ConfigError, match=f"'{rule}' does not combine with gucci-anchors = 3: .* gucci-anchors = 1"):
        check(Config.from_flat(settings))
    check(Config.from_flat(settings | {"gucci-beta": 0}))


def test_all_conflicts_are_listed() -> None:
    config = Config.from_flat({"rule": "flora", "server-optimizer": "fedadam", "dp-clip": 1.0})
    with pytest.raises(ConfigError) as caught:
        check(config)
    assert len(str(caught.value).splitlines()) == 3


def test_an_unknown_rule_is_named_with_the_closest() -> None:
    with pytest.raises(ConfigError, match="unknown rule 'fedavgg'. Did you mean 'fedavg'"):
        check(Config().changed(rule="fedavgg"))


def test_parameters_are_given_ones_and_defaults() -> None:
    assert parameters_of(Config().changed(rule="trimmed-mean")).trim_fraction == 0.2
    given = Config.from_flat({"rule": "trimmed-mean", "trimmed-mean.trim-fraction": 0})
    assert parameters_of(given).trim_fraction == 0.0 and isinstance(parameters_of(given).trim_fraction, float)
    assert parameters_of(given.changed(rule="norm-clipped")).clip_norm == 0.0
    assert vars(parameters_of(given.changed(rule="median"))) == {}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"trimmed-mean.trim-fractoin": 0.1},
            "unknown rule parameter 'trimmed-mean.trim-fractoin'. Did you mean 'trimmed-mean.trim-fraction'",
        ),
        ({"trimed-mean.trim-fraction": 0.1}, "Did you mean 'trimmed-mean.trim-fraction'"),
        ({"median.trim-fraction": 0.1}, "unknown rule parameter 'median.trim-fraction'"),
        ({"trimmed-mean.trim-fraction": 0.5}, "trimmed-mean.trim-fraction = 0.5 must be at least 0 and at most 0.49"),
        ({"trimmed-mean.trim-fraction": "half"}, "trimmed-mean.trim-fraction = 'half' must be a number"),
        ({"lora-fair.regularization": 0.0}, "lora-fair.regularization = 0.0 must be more than 0"),
        ({"connectivity.bound": float("nan")}, "connectivity.bound = nan must be"),
    ],
)
def test_a_wrong_rule_parameter_is_named_whatever_the_rule(settings: Settings, message: str) -> None:
    for rule in ("fedavg", "trimmed-mean"):
        with pytest.raises(ConfigError, match=message):
            check(Config.from_flat(settings | {"rule": rule}))


def test_explicit_parameters_make_configurations_comparable() -> None:
    """Flower passes every default, the command line only what was set: both must describe the same run."""
    passed = {name: key.default for name, key in compatibility.parameter_keys().items()}
    by_flower = Config.from_flat({"rule": "norm-clipped"} | passed)
    by_command_line = Config.from_flat({"rule": "norm-clipped"})
    assert by_flower != by_command_line
    assert with_explicit_parameters(by_flower) == with_explicit_parameters(by_command_line)
    assert with_explicit_parameters(by_flower).rule_parameters == (("norm-clipped.clip-norm", 0.0),)
    assert with_explicit_parameters(Config()).rule_parameters == ()


def test_personal_rules_have_no_global_model() -> None:
    require_global_model(Config(), "to test")
    with pytest.raises(ConfigError, match="rule = 'fedsa-lora' .* no global model to test$"):
        require_global_model(Config().changed(rule="fedsa-lora"), "to test")
