"""Buffers of a node's updates, as it sends them to the server where secure aggregation does not mask them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from clients.client_state import ClientState
from copra_fl import wire
from copra_fl.adapters.compression import Arrays, encode, encode_with_feedback
from copra_fl.adapters.state import Adapter, Update, parts
from copra_fl.aggregation import find_rule
from copra_fl.aggregation.grams import templates
from copra_fl.aggregation.pooling import pool
from copra_fl.aggregation.ranks import as_sent
from copra_fl.aggregation.scaffold import minus
from copra_fl.aggregation.shared_moments import moment_kinds
from copra_fl.config import Config
from copra_fl.training.plan import Plan, feeds_back, reported_metrics


def shared(config: Config, updates: Sequence[Update]) -> list[Update]:
    """Return the updates without the tensors that stay with the clients."""
    rule = find_rule(config.aggregation.rule)
    return [replace(update, adapter=parts(update.adapter, rule.shares)) for update in updates]


def reported(config: Config, updates: Sequence[Update]) -> list[Update]:
    """Return the updates with the metrics that the server may see."""
    if not config.privacy.is_local:
        return list(updates)
    names = reported_metrics(config)
    return [
        replace(update, metrics={name: value for name, value in update.metrics.items() if name in names})
        for update in updates
    ]


def encode_updates(
    plan: Plan,
    updates: Sequence[Update],
    global_starts: Mapping[int, Adapter],
    server_state: wire.Payload,
    kept: Mapping[int, ClientState],
    group_of: dict[str, int],
) -> tuple[dict[str, Arrays], dict[int, Adapter]]:
    """Encode updates, Gram matrices, changes of control variates and moments, as far as the run has them.

    Also returns each client's quantization error, with error feedback the new one. `kept` is each client's state before
    the training, `global_starts` the global adapter that it started from.
    """
    config, rule = plan.config, find_rule(plan.config.aggregation.rule)
    starts = {client: parts(start, rule.sends(plan.server_round)) for client, start in global_starts.items()}
    errors = {client: state.quantization_error for client, state in kept.items()}
    buffers, errors = _encode_tensors(plan, updates, starts, errors, group_of)
    if server_state.control and updates:
        changes = [replace(update, adapter=minus(update.gradient, kept[update.client].control)) for update in updates]
        buffers["controls"] = encode(changes, starts, group_of, "float32")
    if server_state.optimizer and updates:
        for kind in moment_kinds(config.training):
            moments = [replace(update, adapter=update.optimizer.get(kind, {})) for update in updates]
            buffers[kind] = encode(moments, starts, group_of, config.federation.moments_dtype)
    return buffers, errors


def _encode_tensors(
    plan: Plan,
    updates: Sequence[Update],
    starts: Mapping[int, Adapter],
    quantization_errors: dict[int, Adapter],
    group_of: dict[str, int],
) -> tuple[dict[str, Arrays], dict[int, Adapter]]:
    """Encode one buffer for the inspected clients, one pooled update of all the others, and the Gram matrices of both.

    `starts` have the tensors that a client may send.
    """
    config, uplink = plan.config, plan.config.federation.uplink_dtype
    sent = [as_sent(config, update) for update in shared(config, updates)]
    inspected = [update for update in sent if update.client in plan.inspected]
    others = [update for update in sent if update.client not in plan.inspected]
    buffers, pooled = {}, list[Update]()
    if others:
        start = starts[others[0].client]
        pooled = [pool(start, others, config.aggregation.weighting, group_of)]
        buffers["pooled"] = encode(pooled, {pooled[0].client: start}, group_of, "float32")
    if plan.collects_grams and updates:
        of_grams = [replace(update, adapter=update.grams) for update in [*inspected, *pooled]]
        gram_starts = {update.client: templates(starts[update.client]) for update in of_grams}
        buffers["grams"] = encode(of_grams, gram_starts, group_of, "float32")
    if inspected and feeds_back(config):
        buffers["adapters"], quantization_errors = encode_with_feedback(
            inspected, starts, group_of, uplink, quantization_errors
        )
    elif inspected:
        buffers["adapters"] = encode(inspected, starts, group_of, uplink)
    return buffers, quantization_errors
