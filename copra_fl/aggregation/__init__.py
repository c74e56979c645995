"""Aggregation rules: what clients trained in, next global adapter out. One file a rule, pure functions.

`RULES` says of each what it asks of local training, what travels, and whether it changes the frozen weights.
To add a rule, write its file and name it there; docs/aggregation.md says where each comes from and when to use it.
"""

from __future__ import annotations

from collections.abc import Iterator

from copra_fl.aggregation.ranks import client_ranks
from copra_fl.aggregation.rule import ALL, Rule
from copra_fl.aggregation.rules.connectivity import connectivity
from copra_fl.aggregation.rules.fedavg import fedavg
from copra_fl.aggregation.rules.fedex_lora import fedex_lora
from copra_fl.aggregation.rules.fedrot_lora import fedrot_lora
from copra_fl.aggregation.rules.flexlora import flexlora
from copra_fl.aggregation.rules.flora import flora
from copra_fl.aggregation.rules.hetlora import hetlora
from copra_fl.aggregation.rules.lora_fair import lora_fair
from copra_fl.aggregation.rules.median import median
from copra_fl.aggregation.rules.norm_clipped import norm_clipped
from copra_fl.aggregation.rules.trimmed_mean import trimmed_mean
from copra_fl.aggregation.rules.zero_pad import zero_pad
from copra_fl.config import Config, ConfigError
from copra_fl.wording import unknown_name

RULES: dict[str, Rule] = {
    "fedavg": Rule(fedavg, linear=True),
    "ffa-lora": Rule(fedavg, linear=True, trains=lambda server_round: ALL - {"A"}),
    "rolora": Rule(fedavg, linear=True, trains=lambda server_round: ALL - {"A" if server_round % 2 else "B"}),
    "fedsa-lora": Rule(
        fedavg,
        linear=True,
        shares=frozenset({"A"}),
        averages=False,
        no_copra="a client keeps its own B, so that a layer that is off at some clients gets an A that fits no B",
    ),
    "zero-pad": Rule(zero_pad, unequal_ranks=True),
    "hetlora": Rule(hetlora, unequal_ranks=True),
    "flora": Rule(flora, changes_base=True, unequal_ranks=True, averages=False),
    "flexlora": Rule(flexlora, unequal_ranks=True, averages=False),
    "fedex-lora": Rule(fedex_lora, changes_base=True, averages=False),
    "lora-fair": Rule(lora_fair),
    "fedrot-lora": Rule(fedrot_lora),
    "fed-sb": Rule(
        fedavg,
        core=True,
        linear=True,
        needs_data=True,
        trains=lambda server_round: frozenset({"R", "head"}),
        no_copra="B and A are fixed for good by a first gradient, taken with every layer on; they do not fit a model "
        "in which layers are off",
    ),
    "connectivity": Rule(connectivity, averages=False, needs_data=True),
    "trimmed-mean": Rule(trimmed_mean),
    "median": Rule(median),
    "norm-clipped": Rule(norm_clipped),
}


def find_rule(name: str) -> Rule:
    """The rule of that name. Raises ConfigError with the names there are."""
    if name not in RULES:
        raise ConfigError(unknown_name("rule", name, RULES))
    return RULES[name]


def pools(config: Config) -> bool:
    """Whether nodes may send a pooled update in place of their clients' own."""
    federation, aggregation = config.federation, config.aggregation
    return (
        federation.updates == "pooled"
        and find_rule(aggregation.rule).linear
        and federation.uplink_dtype == "float32"
        and aggregation.weighting != "equal"
        and not aggregation.control_variates
        and not aggregation.client_ranks
        and len(config.data.datasets) < 2
    )


def check(config: Config) -> None:
    """Raise ConfigError where the rule is unknown, or does not combine with the rest, with the reason."""
    name = config.aggregation.rule
    for reason in _conflicts(config, find_rule(name)):
        raise ConfigError(f"rule = {name!r} does not combine with {reason}")
    if config.data.num_clients:
        client_ranks(config, config.data.num_clients)


def _conflicts(config: Config, rule: Rule) -> Iterator[str]:
    settings, training = config.aggregation, config.copra.local_training
    if rule.no_copra and training == "copra":
        yield f"local-training = 'copra': {rule.no_copra}"
    if settings.rule != "fedavg" and training == "head":
        yield "local-training = 'head': there are no adapters to aggregate; use rule = 'fedavg'"
    if rule.core and config.model.quantization != "none":
        yield f"quantization = {config.model.quantization!r}: it begins with the gradient of W0, which has none there"
    if rule.needs_data and not config.data.dataset:
        yield "dataset = '': it needs validation data on the server"
    if config.privacy.dp_clip and not rule.linear:
        able = ", ".join(name for name, other in RULES.items() if other.linear)
        yield (
            f"dp-clip = {config.privacy.dp_clip:g}: it is no average of changes, so that one client could move it by "
            f"more than its share; these rules are: {able}"
        )
    if settings.client_ranks and not rule.unequal_ranks:
        able = ", ".join(name for name, other in RULES.items() if other.unequal_ranks)
        yield f"client-ranks = {settings.client_ranks!r}: it needs equal ranks; these rules do not: {able}"
    if settings.server_optimizer != "none" and not rule.averages:
        yield (
            f"server-optimizer = {settings.server_optimizer!r}: its next adapter is no average of the clients', so "
            "there is no step to take"
        )
    if settings.control_variates and (not rule.averages or settings.client_ranks):
        yield "control-variates: they need factors that all clients share and that keep their meaning over rounds"
    if len(config.data.datasets) > 1:
        yield from (f"dataset = {config.data.dataset!r} (several data sets): {why}" for why in _one_task_only(config))
    if config.training.hidden_state_cache_mb and rule.changes_base:
        cache = config.training.hidden_state_cache_mb
        yield f"hidden-state-cache-mb = {cache}: it changes W0, and the cache holds what the old W0 gave"


def _one_task_only(config: Config) -> Iterator[str]:
    """Why clients must all learn the same."""
    rule = find_rule(config.aggregation.rule)
    if rule.personal:
        yield "a part of each model stays with its client, so that there is no global model to test on each"
    if config.aggregation.rule == "connectivity":
        yield "it scores each client's adapter on all validation data, of which a client has learnt one data set"
    if config.aggregation.control_variates:
        yield "control-variates would move the rows of the head that a client does not train"
    if config.privacy.dp_clip:
        yield f"dp-clip = {config.privacy.dp_clip:g} divides by all clients, and a row of the head has few"
