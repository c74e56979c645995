"""Settings that do not combine with differential privacy or secure aggregation: rows for `compatibility`."""

from __future__ import annotations

from copra_fl.aggregation.rule import Rule
from copra_fl.aggregation.rules import rule_names
from copra_fl.config import Config

#: rows of the table: whether it applies, and the sentence that says so
Conflicts = list[tuple[bool, str]]


def summed_rules() -> str:
    """Return the names of the rules that need nothing but the sum of the clients' changes."""
    return rule_names(lambda rule: rule.linear and not rule.grams)


def privacy_conflicts(config: Config, rule: Rule) -> Conflicts:
    """Differential privacy: adding or removing one client may move the sum of changes by dp-clip and no more."""
    settings, over_sample = config.aggregation, config.federation.over_sample
    private, it = config.privacy.dp_clip > 0, f"dp-clip = {config.privacy.dp_clip:g}"
    return [
        (
            private and not rule.linear,
            f"rule = {rule.name!r} does not combine with {it}: it does not average changes, so one client could move "
            f"the result by more than its share; use one of {summed_rules()}",
        ),
        (
            private and settings.weighting != "equal",
            f"{it} needs weighting = 'equal', not {settings.weighting!r}: all clients must have the same weight",
        ),
        (
            private and rule.grams,
            f"rule = {rule.name!r} does not combine with {it}: Gram matrices travel without clipping and noise; use "
            f"one of {summed_rules()}",
        ),
        (
            private and settings.control_variates,
            f"{it} does not combine with control-variates = true: control variates travel without clipping and noise; "
            "use control-variates = false",
        ),
        (
            private and config.training.optimizer_state == "shared",
            f"{it} does not combine with optimizer-state = 'shared': moments travel without clipping and noise; use "
            "optimizer-state = 'client'",
        ),
        (
            private and over_sample > 0,
            f"{it} does not combine with over-sample = {over_sample:g}: if one client were missing, another would take "
            "its place; use over-sample = 0",
        ),
    ]


def secure_conflicts(config: Config, rule: Rule) -> Conflicts:
    """Secure aggregation: the server learns the sum of the nodes' pooled updates, and no single update."""
    federation, settings, evaluation = config.federation, config.aggregation, config.evaluation
    it = "secure-aggregation = true"
    return [
        (
            not rule.linear,
            f"rule = {rule.name!r} does not combine with {it}: it needs the clients' own updates; use one of "
            f"{summed_rules()}",
        ),
        (
            rule.grams,
            f"rule = {rule.name!r} does not combine with {it}: Gram matrices would travel without masks; use one of "
            f"{summed_rules()}",
        ),
        (
            federation.updates != "pooled",
            f"{it} needs updates = 'pooled', not {federation.updates!r}: a node adds up its clients' updates first",
        ),
        (
            federation.uplink_dtype != "float32",
            f"uplink-dtype = {federation.uplink_dtype!r} does not combine with {it}: masked vectors are 64-bit "
            "fixed-point numbers; use uplink-dtype = 'float32'",
        ),
        (
            settings.weighting == "equal" and config.privacy.dp_clip == 0,
            f"weighting = 'equal' does not combine with {it}: updates are pooled by examples; use weighting = "
            "'examples' or 'activity'",
        ),
        (
            federation.max_update_norm == 0 and config.privacy.dp_clip == 0,
            f"max-update-norm = 0 does not combine with {it}: nodes check it for their clients, and it bounds the "
            "fixed-point numbers; set max-update-norm",
        ),
        (
            federation.max_update_ratio > 0,
            f"max-update-ratio = {federation.max_update_ratio:g} does not combine with {it}: the server does not know "
            "the length of single updates; use max-update-ratio = 0",
        ),
        (
            federation.over_sample > 0,
            f"over-sample = {federation.over_sample:g} does not combine with {it}: the slowest nodes would count as "
            "dropped out in each round; use over-sample = 0",
        ),
        (
            evaluation.merge_gap_clients > 0 and bool(config.data.dataset),
            f"merge-gap-clients = {evaluation.merge_gap_clients} does not combine with {it}: the server would need "
            "the adapters of single clients; use merge-gap-clients = 0",
        ),
        (
            evaluation.path_pairs > 0 and bool(config.data.dataset),
            f"path-pairs = {evaluation.path_pairs} does not combine with {it}: the server would need the adapters of "
            "single clients; use path-pairs = 0",
        ),
        (
            settings.control_variates,
            f"control-variates = true does not combine with {it}: the changes of single clients' control variates "
            "would travel without masks; use control-variates = false",
        ),
        (
            config.training.optimizer_state == "shared",
            f"optimizer-state = 'shared' does not combine with {it}: the clients' moments would travel without masks; "
            "use optimizer-state = 'client'",
        ),
        (
            federation.start == "own",
            f"start = 'own' does not combine with {it}: updates from different starts are not pooled; use start = "
            "'common'",
        ),
        (
            federation.stale_clients > 0,
            f"stale-clients = {federation.stale_clients:g} does not combine with {it}: updates from different starts "
            "are not pooled; use stale-clients = 0",
        ),
        (
            len(config.data.datasets) > 1,
            f"dataset = {config.data.dataset!r} (several data sets) does not combine with {it}: their updates are not "
            "pooled",
        ),
    ]
