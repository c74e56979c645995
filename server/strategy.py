"""The strategy of the server: configure a round's messages, aggregate the replies.

`CohortStrategy` has the four steps of a Flower strategy, but plain arguments. Flower's own `Strategy.start` is not
used: it cannot resume, and it averages whatever the nodes reply. The loop is in `server.federation`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from logging import INFO
from math import isfinite
from typing import Any

from flwr.app import Message, MessageType
from flwr.supercore.logger import log

from copra_fl import wire
from copra_fl.adapters.server_state import ServerState
from copra_fl.adapters.state import Update, parts
from copra_fl.aggregation.pooling import pool_scalars
from copra_fl.aggregation.scaffold import global_control
from copra_fl.aggregation.shared_moments import moment_kinds
from copra_fl.aggregation.starts import ages, client_starts, has_own_start
from copra_fl.copra.layers import deep_enough
from copra_fl.records import AggregationError, ClientEvaluation
from copra_fl.training.plan import Plan, leaves_state, num_trained, sent_parts
from server import sampling
from server.aggregate import aggregate
from server.errors import FederationError
from server.eval_selection import evaluating_clients, inspected_clients
from server.placement import place
from server.replies import CHANGES, check_missing, decode_evaluations, decode_updates, read_replies, without_outliers
from server.round_request import RoundRequest
from server.run_context import RunContext
from server.secure_round import SecureRound
from server.state_sync import StateSync


@dataclass(frozen=True)
class TrainResult:
    """Result of a round of training.

    Attributes:
        updates: of the clients that replied, sorted by client; pooled ones have no tensors.
        missing: sampled client without a valid update -> reason.
        loss: mean training loss, weighted by examples; None if no client reports one.
        error: aggregation error; None if it cannot be computed.
        notes: of the rule.
        lengths: client -> norm of its change; pooled ones under the first of them.
    """

    updates: list[Update]
    missing: dict[int, str]
    loss: float | None
    error: AggregationError | None
    notes: dict[str, Any]
    lengths: dict[int, float] = field(default_factory=dict)


class CohortStrategy:
    """One message per node and round carries the node's cohort; the configuration's rule aggregates.

    Attributes:
        run: settings that stay the same in all rounds.
        state: state that passes from round to round; `aggregate_train` replaces it.
        hosts: node -> clients that it can host.
        partitions: node -> its partition-id.
        num_examples: client -> training examples.
        num_validation: client -> validation examples, of clients that have any.
        eligible: clients that have training examples, and that ``min-depth`` admits.
    """

    def __init__(self, run: RunContext, nodes: Mapping[int, wire.Handshake], state: ServerState) -> None:
        self.run = run
        self.state = state
        self.set_nodes(nodes)
        self._sync = StateSync(run)

    def set_nodes(self, nodes: Mapping[int, wire.Handshake]) -> None:
        """Replace the nodes that take part. Raises FederationError if no client of theirs can train."""
        by_partition = dict(sorted(nodes.items(), key=lambda item: item[1].partition))
        self.partitions = {node: handshake.partition for node, handshake in by_partition.items()}
        self.hosts = {node: handshake.num_examples.keys() for node, handshake in by_partition.items()}
        counts = {client: count for handshake in nodes.values() for client, count in handshake.counts.items()}
        self.num_examples = {client: train for client, (train, _) in counts.items()}
        self.num_validation = {client: validation for client, (_, validation) in counts.items() if validation > 0}
        self.eligible = deep_enough(self.run.config, sampling.eligible(self.num_examples))
        if not self.eligible:
            raise FederationError(
                f"none of the {len(self.num_examples)} clients on the connected nodes can train: each has no training "
                "examples, or a depth below min-depth"
            )

    @property
    def sampling_rate(self) -> float:
        """Probability that a given client is in a round."""
        return sampling.rate(self.run.config.federation, len(self.eligible))

    def configure_train(self, server_round: int) -> tuple[RoundRequest, list[Message]]:
        """Sample the round's clients and place them on nodes, balanced by the number of examples they train on."""
        config, eligible = self.run.config, self.eligible
        clients = sampling.sample(config, eligible, server_round)
        work = {client: num_trained(config.training, self.num_examples[client]) for client in clients}
        number = server_round - 1
        ages_of = ages(config, number, clients)
        by_age = {age: self.state.of_age(age) for age in ages_of.values()}
        starts = client_starts(config, number, by_age, ages_of)
        cohorts, is_secure = place(work, self.hosts), config.privacy.secure_aggregation
        if config.privacy.is_local:  # the other nodes add their share of the noise
            cohorts = {node: cohorts.get(node, []) for node in self.hosts}
        request = RoundRequest(
            server_round,
            cohorts=cohorts,
            num_wanted=sampling.num_wanted(config, len(eligible), len(clients)),
            inspected=frozenset(inspected_clients(config, server_round, clients)),
            starts={client: parts(start, self.run.rule.sends(server_round)) for client, start in starts.items()},
            has_control=bool(self.state.control_sum),
            has_grams=self.run.rule.sends_grams(server_round),
            moments=moment_kinds(config.training) if self.state.optimizer else (),
            ages=ages_of,
            apart=frozenset(client for client in clients if ages_of[client] or has_own_start(config, number)),
            masked=parts(self.state.adapter, sent_parts(config, server_round)) if is_secure else {},
        )
        return request, self.messages(request, number, MessageType.TRAIN)

    def aggregate_train(
        self, request: RoundRequest, replies: Sequence[Message], secure: SecureRound | None = None
    ) -> TrainResult:
        """Aggregate the replies and replace the state; `secure` unmasks the sum of masked vectors.

        Raises FederationError if a client failed (strict) or too few replied (tolerant).
        """
        decode = partial(decode_updates, self.run, request, self.num_examples)
        results, missing = read_replies(self.run, request, replies, decode)
        self._update_sync(request, results)
        kept, outlying = without_outliers(self.run.config, results)
        missing = dict(sorted((missing | outlying | (secure.missing if secure else {})).items()))
        node_replies = list(kept.values())
        updates = [update for reply in node_replies for update in reply.updates]
        updates.sort(key=lambda update: update.client)
        check_missing(self.run.config, request, missing, len(updates), f"round {request.server_round}")
        summed = secure.unmask(kept, missing) if secure else None
        aggregated = aggregate(
            self.run,
            request.server_round,
            self.state,
            summed.updates if summed else [update for reply in node_replies for update in reply.averaged],
            [control for reply in node_replies for control in reply.controls.values()],
            len(self.eligible),
            summed.private_sum if summed else None,
        )
        self._sync.advance(self.state, aggregated.state, aggregated.residual)
        self.state = replace(aggregated.state, last_rounds=self._last_rounds_after(request.server_round, updates))
        has_losses = updates and not self.run.config.privacy.is_local
        loss = pool_scalars(updates).metrics["loss"] if has_losses else None
        lengths = {
            client: length for reply in node_replies for client, length in reply.lengths.get(CHANGES, {}).items()
        }
        notes = aggregated.notes | (secure.notes if secure else {})
        return TrainResult(updates, missing, loss, aggregated.error, notes, lengths)

    def restore(self, state: ServerState) -> None:
        """Replace the state by an earlier one; nodes get all of it with the next message."""
        self.state = state
        self._sync = StateSync(self.run)

    def configure_evaluate(self, server_round: int) -> tuple[RoundRequest, list[Message]]:
        """Place the clients that evaluate the global adapter after the round (`eval_selection.evaluating_clients`)."""
        max_examples = self.run.config.evaluation.client_eval_examples
        clients = evaluating_clients(self.run.config, self.num_validation)
        work = {client: min(self.num_validation[client], max_examples) for client in clients}
        request = RoundRequest(server_round, cohorts=place(work, self.hosts), num_wanted=len(work))
        return request, self.messages(request, server_round, MessageType.EVALUATE)

    def aggregate_evaluate(self, request: RoundRequest, replies: Sequence[Message]) -> list[ClientEvaluation]:
        """Return the clients' evaluations, sorted by client. Raises FederationError as `aggregate_train` does.

        A client whose loss is not finite is left out, unless no client has a finite loss. It does not stop a strict
        run, which could never end: the evaluation of a resumed run is the same.
        """
        decode = partial(decode_evaluations, self.run.config, self.num_validation)
        results, missing = read_replies(self.run, request, replies, decode)
        self._update_sync(request, results)
        evaluations = [evaluation for node_evaluations in results.values() for evaluation in node_evaluations]
        if finite := [evaluation for evaluation in evaluations if isfinite(evaluation.loss)]:
            for one in evaluations:
                if not isfinite(one.loss):
                    log(INFO, "client %s is left out of the evaluation: its loss is %s", one.client, one.loss)
            evaluations = finite
        if request.cohorts:
            check_missing(self.run.config, request, missing, len(evaluations), "the evaluation by the clients")
        return sorted(evaluations, key=lambda evaluation: evaluation.client)

    def messages(self, request: RoundRequest, number: int, message_type: str) -> list[Message]:
        """Return one message with the state for each node of the request; `number` of rounds led to the state."""
        messages, known = [], self.state.last_rounds
        control = global_control(self.state.control_sum, len(self.eligible))
        for node, cohort in request.cohorts.items():
            inspected = tuple(client for client in cohort if client in request.inspected)
            last_rounds = {client: known[client] for client in cohort if client in known}
            plan = Plan(request.server_round, tuple(cohort), self.run.config, inspected, last_rounds)
            messages.append(Message(self._sync.pack(plan, self.state, control, number, node), node, message_type))
        return messages

    def _last_rounds_after(self, server_round: int, updates: Sequence[Update]) -> Mapping[int, int]:
        """Return `ServerState.last_rounds` after a round that used `updates`."""
        if not leaves_state(self.run.config):
            return {}
        return {**self.state.last_rounds, **dict.fromkeys((update.client for update in updates), server_round)}

    def _update_sync(self, request: RoundRequest, answered: Mapping[int, Any]) -> None:
        """Record which nodes have a known cached state: those with a valid reply."""
        for node in request.cohorts:
            if node in answered:
                self._sync.acknowledge(node)
            else:
                self._sync.forget(node)
