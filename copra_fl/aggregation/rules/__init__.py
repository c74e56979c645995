"""Aggregation rules: one file per rule, named as its paper names it. Each ends in ``RULE = Rule(...)``."""

from __future__ import annotations

from collections.abc import Callable

from copra_fl.aggregation.rule import Rule
from copra_fl.aggregation.rules import (
    connectivity,
    fed_sb,
    fedavg,
    fedex_lora,
    fedrot_lora,
    fedrpca,
    fedsa_lora,
    fedsvd,
    ffa_lora,
    ffa_lora_gram,
    flexlora,
    flora,
    florist,
    hetlora,
    lora_fair,
    median,
    median_product,
    norm_clipped,
    ravan,
    rolora,
    rolora_gram,
    trimmed_mean,
    trimmed_mean_product,
    zero_pad,
)
from copra_fl.config import ConfigError
from copra_fl.wording import unknown_name

RULES: tuple[Rule, ...] = (
    fedavg.RULE,
    ffa_lora.RULE,
    ffa_lora_gram.RULE,
    fedsvd.RULE,
    rolora.RULE,
    rolora_gram.RULE,
    fedsa_lora.RULE,
    zero_pad.RULE,
    hetlora.RULE,
    flora.RULE,
    florist.RULE,
    flexlora.RULE,
    fedex_lora.RULE,
    lora_fair.RULE,
    fedrot_lora.RULE,
    fedrpca.RULE,
    fed_sb.RULE,
    ravan.RULE,
    connectivity.RULE,
    trimmed_mean.RULE,
    median.RULE,
    trimmed_mean_product.RULE,
    median_product.RULE,
    norm_clipped.RULE,
)


def find_rule(name: str) -> Rule:
    """Return the rule called `name`. Raises ConfigError with the known names for an unknown one."""
    for rule in RULES:
        if rule.name == name:
            return rule
    raise ConfigError(unknown_name("rule", name, [rule.name for rule in RULES]))


def rule_names(matches: Callable[[Rule], bool]) -> str:
    """Return the names of the rules that match, separated by commas."""
    return ", ".join(rule.name for rule in RULES if matches(rule))
