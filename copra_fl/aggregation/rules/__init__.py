"""Aggregation rules: one file per rule, named as its paper names it. Each ends in ``RULE = Rule(...)``.

Rules of other packages are plugins (`copra_fl.plugins`).
"""

from __future__ import annotations

import re
from collections.abc import Callable

from copra_fl import plugins
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

#: form of the name of a rule: the first part of its parameters' keys
NAME = re.compile(r"[a-z0-9-]+")

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
    """Return the rule called `name`: a built-in one or a plugin.

    Raises ConfigError for an unknown name, as `plugins.Kind.find` does, and for a plugin whose own name is that of a
    built-in rule or has other characters than lower-case letters, digits and -.
    """
    built_in = {rule.name: rule for rule in RULES}
    if name in built_in:
        return built_in[name]
    plugin: Rule = plugins.RULE.find(name, Rule, built_in)
    if not NAME.fullmatch(plugin.name) or plugin.name in built_in:
        problem = "that of a built-in rule" if plugin.name in built_in else "not of lower-case letters, digits and -"
        raise ConfigError(f"rule = {name!r}: its name {plugin.name!r} is {problem}; give the Rule another name")
    return plugin


def rule_names(matches: Callable[[Rule], bool]) -> str:
    """Return the names of the rules that match, separated by commas."""
    return ", ".join(rule.name for rule in RULES if matches(rule))
