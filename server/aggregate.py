"""Aggregation of a round: the rule or the private average, then the next state of the server."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from copra_fl.adapters.residual import add
from copra_fl.adapters.server_state import ServerState
from copra_fl.adapters.state import Adapter, Update, draw
from copra_fl.aggregation import client_ranks, heads, pools, scaffold, server_optimizers
from copra_fl.aggregation.compatibility import parameters_of
from copra_fl.aggregation.private import moved, private_average
from copra_fl.aggregation.products import aggregation_error, modules
from copra_fl.aggregation.rule import Outcome, Round
from copra_fl.aggregation.shared_moments import average_moments
from copra_fl.aggregation.starts import num_earlier
from copra_fl.config import Config
from copra_fl.records import AggregationError
from copra_fl.seeding import derive
from copra_fl.training.plan import sent_parts
from server.run_context import RunContext


@dataclass(frozen=True)
class Aggregate:
    """Result of the aggregation of a round.

    Attributes:
        state: the server's next state.
        residual: what this round adds to W0.
        notes: of the rule, for the journal.
        error: aggregation error (`products.aggregation_error`); None if it cannot be computed.
    """

    state: ServerState
    residual: Adapter
    notes: dict[str, Any]
    error: AggregationError | None


def aggregate(
    run: RunContext,
    server_round: int,
    state: ServerState,
    updates: Sequence[Update],
    controls: Sequence[Adapter],
    num_eligible: int,
    private_sum: Adapter | None = None,
) -> Aggregate:
    """Aggregate the `updates` of a round.

    Args:
        state: before the round.
        updates: individual or pooled.
        controls: change of each client's control variate; empty without control variates.
        num_eligible: number of clients that have training examples.
        private_sum: noisy sum of the clients' changes, if nodes have clipped them and added the noise.
    """
    round_ = rule_round(run, server_round, state, updates)
    is_private = bool(run.config.privacy.dp_clip)
    if is_private:
        outcome = average_privately(run, round_, server_round, num_eligible, private_sum)
    else:
        outcome = run.rule.aggregate(round_)
    error = None
    if not (pools(run.config) or run.rule.personal or is_private):
        error = AggregationError(**aggregation_error(round_, outcome))
    next_state = state_after(run, state, outcome, updates, controls)
    return Aggregate(next_state, outcome.residual, outcome.notes, error)


def rule_round(run: RunContext, server_round: int, state: ServerState, updates: Sequence[Update]) -> Round:
    """Return the input of the rule; with several data sets the head is in parts (`aggregation.heads`)."""
    config, before = run.config, heads.split(state.adapter, run.head_sizes)
    stream = torch.Generator().manual_seed(derive(config.federation.seed, "init", server_round))
    ranks = client_ranks(config, config.data.num_clients)
    return Round(
        before=before,
        updates=[without_other_heads(run, update) for update in updates],
        group_of=run.group_of,
        scaling=config.model.scaling(config.model.rank),
        settings=config.aggregation,
        ranks={update.client: ranks[update.client] for update in updates},
        fresh=lambda: draw(before, stream),
        score=lambda adapters: run.score([heads.join(adapter) for adapter in adapters], state.residual),
        parameters=parameters_of(config),
    )


def without_other_heads(run: RunContext, update: Update) -> Update:
    """Return `update` without the parts of the head that belong to other data sets than the client's."""
    for number, dataset in enumerate(run.datasets):
        if update.client in dataset.clients:
            adapter = heads.split(update.adapter, run.head_sizes)
            return replace(update, adapter=heads.without_others(adapter, number))
    return update


def average_privately(
    run: RunContext, round_: Round, server_round: int, num_eligible: int, private_sum: Adapter | None
) -> Outcome:
    """Return the average with differential privacy, refactored if the rule does."""
    privacy, number = run.config.privacy, run.config.federation.round_size(num_eligible)
    if private_sum is None:
        travels = sent_parts(run.config, server_round)
        outcome = private_average(round_, travels, privacy.dp_clip, privacy.dp_noise_multiplier, number)
    else:
        outcome = Outcome(moved(round_.before, private_sum, number))
    if run.rule.refactor:
        return replace(outcome, adapter=run.rule.refactor(outcome.adapter, modules(outcome.adapter)))
    return outcome


def state_after(
    run: RunContext,
    state: ServerState,
    outcome: Outcome,
    updates: Sequence[Update],
    controls: Sequence[Adapter],
) -> ServerState:
    """Return the server's next state: server optimizer's step, residual, control variates, moments, old adapters."""
    settings = run.config.aggregation
    adapter, first, second = outcome.adapter, state.first_moment, state.second_moment
    if settings.server_optimizer != "none":
        before = heads.split(state.adapter, run.head_sizes)
        adapter, first, second = server_optimizers.step(settings, before, adapter, first, second)
    return ServerState(
        adapter=heads.join(adapter),
        residual=add(state.residual, outcome.residual),
        control_sum=scaffold.next_sum(state.control_sum, controls),
        first_moment=first,
        second_moment=second,
        optimizer=average_moments(state.optimizer, updates, settings.weighting, run.group_of),
        earlier=earlier_after(run.config, state),
    )


def earlier_after(config: Config, state: ServerState) -> tuple[Adapter, ...]:
    """Return the older global adapters of the state that follows `state`.

    Its adapter is copied: the next one may have tensors of it, and no file takes a tensor under two names.
    """
    number = num_earlier(config)
    copy = {name: tensor.clone() for name, tensor in state.adapter.items()} if number else {}
    return (copy, *state.earlier)[:number]
