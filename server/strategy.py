"""The Flower strategy: sample clients, group them into cohorts by node, check replies, call the rule.

The federation calls `configure_train` and `aggregate_train` round by round. Flower's own
`Strategy.start` is not used: it cannot resume, and it averages whatever came back.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from logging import INFO

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from copra_fl import wire
from copra_fl.adapter import Adapter, Update
from copra_fl.aggregation import find_rule
from copra_fl.config import Config
from copra_fl.seeding import generator
from copra_fl.training import Plan


class FederationError(RuntimeError):
    """A federation that cannot go on. The message says what happened, where, and what to do."""


class BadUpdate(ValueError):
    """An update that must not be averaged, with the reason."""


def check_update(
    update: Update, global_adapter: Adapter, group_of: Mapping[str, int], num_groups: int, num_examples: int
) -> None:
    """Raise BadUpdate unless `update` is what a client of `num_examples` examples can have trained."""
    if update.num_examples <= 0 or update.num_examples != num_examples:
        raise BadUpdate(f"it claims {update.num_examples} examples; at the start it had {num_examples}")
    if len(update.active_steps) != num_groups or min(update.active_steps, default=0) < 0:
        raise BadUpdate(f"its active steps {update.active_steps} are not {num_groups} counts, one per gate group")
    unexpected = update.adapter.keys() - global_adapter.keys()
    if unexpected:
        raise BadUpdate(f"unknown tensors {sorted(unexpected)[:3]}")
    for name, tensor in global_adapter.items():
        trained = name not in group_of or update.active_steps[group_of[name]] > 0
        if name not in update.adapter:
            if trained:
                raise BadUpdate(f"tensor {name} is missing")
            continue
        got = update.adapter[name]
        if got.shape != tensor.shape or got.dtype != tensor.dtype:
            raise BadUpdate(
                f"tensor {name} is {got.dtype} of shape {tuple(got.shape)}, not {tensor.dtype} of {tuple(tensor.shape)}"
            )
        if not torch.isfinite(got).all():
            raise BadUpdate(f"tensor {name} has values that are not finite; a lower learning rate may help")
    if not math.isfinite(update.metrics.get("loss", math.nan)):
        raise BadUpdate(f"its training loss is {update.metrics.get('loss')}")


class CohortStrategy(Strategy):
    """One message a node a round carries the node's cohort; the rule of the configuration averages.

    Attributes:
        updates: the good updates of the last round, in the order of their clients.
        missing: clients of the last round without one, with the reason.
    """

    def __init__(
        self, config: Config, group_of: Mapping[str, int], num_groups: int, nodes: Mapping[int, wire.Hello]
    ) -> None:
        self.config = config
        self.group_of = group_of
        self.num_groups = num_groups
        self.rule = find_rule(config.federation.rule)
        self.node_of = {client: node for node, hello in nodes.items() for client in hello.num_examples}
        self.num_examples = {c: n for hello in nodes.values() for c, n in hello.num_examples.items()}
        self.validating = sorted(c for hello in nodes.values() for c, n in hello.num_validation.items() if n > 0)
        self.updates: list[Update] = []
        self.missing: dict[int, str] = {}
        self._global_adapter: Adapter = {}
        self._cohorts: dict[int, list[int]] = {}

    @property
    def eligible(self) -> list[int]:
        """Clients that have training examples."""
        return sorted(client for client, count in self.num_examples.items() if count > 0)

    def sample(self, server_round: int) -> list[int]:
        """The clients of a round, drawn from the ``sampling`` stream."""
        federation, eligible = self.config.federation, self.eligible
        number = federation.clients_per_round or max(1, round(federation.fraction_clients * len(eligible)))
        rng = generator(federation.seed, "sampling", server_round)
        return sorted(int(c) for c in rng.choice(eligible, size=min(number, len(eligible)), replace=False))

    def cohort_messages(
        self, server_round: int, clients: Iterable[int], adapter: Adapter, message_type: str
    ) -> list[Message]:
        """One message for each node that hosts some of `clients`."""
        self._cohorts = {}
        for client in clients:
            self._cohorts.setdefault(self.node_of[client], []).append(client)
        return [
            Message(wire.pack_plan(Plan(server_round, tuple(cohort), self.config), adapter), node, message_type)
            for node, cohort in sorted(self._cohorts.items(), key=lambda item: item[1])
        ]

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        self._global_adapter = dict(arrays.to_torch_state_dict())
        return self.cohort_messages(server_round, self.sample(server_round), self._global_adapter, MessageType.TRAIN)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The next global adapter and the mean training loss, weighted by examples.

        Raises FederationError when a client failed (strict) or too few are left (tolerant).
        """
        self.updates, self.missing = [], {}
        for client, reply in self._by_client(replies):
            try:
                update = wire.unpack_update(reply, client)
                check_update(update, self._global_adapter, self.group_of, self.num_groups, self.num_examples[client])
                self.updates.append(update)
            except (KeyError, ValueError, TypeError) as error:
                self.missing[client] = f"its update was refused: {error}"
        self.updates.sort(key=lambda update: update.client)
        self.check_missing(f"round {server_round}", len(self.updates))
        weights = [update.num_examples for update in self.updates]
        loss = sum(n * u.metrics["loss"] for n, u in zip(weights, self.updates, strict=True)) / sum(weights)
        adapter = self.rule(self._global_adapter, self.updates, self.config.federation.weighting, self.group_of)
        return ArrayRecord(torch_state_dict=adapter), MetricRecord({"loss": loss})

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Every client with validation data evaluates the global adapter on it."""
        adapter = dict(arrays.to_torch_state_dict())
        return self.cohort_messages(server_round, self.validating, adapter, MessageType.EVALUATE)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Lists in the order of the clients: ``client``, ``loss``, ``accuracy``, ``examples``."""
        self.missing = {}
        rows = []
        for client, reply in self._by_client(replies):
            try:
                rows.append({"client": client, **wire.unpack_evaluation(reply, client)})
            except KeyError as error:
                self.missing[client] = f"its evaluation is missing {error}"
        if self._cohorts:
            self.check_missing("the evaluation by the clients", len(rows))
        rows.sort(key=lambda row: row["client"])
        return MetricRecord({name: [row[name] for row in rows] for name in ("client", "loss", "accuracy", "examples")})

    def check_missing(self, where: str, num_good: int) -> None:
        """Raise FederationError if what is in `missing` must stop the run."""
        federation = self.config.federation
        if self.missing and federation.failures == "strict":
            client, reason = min(self.missing.items())
            others = f" ({len(self.missing)} clients in all)" if len(self.missing) > 1 else ""
            raise FederationError(f"client {client} failed in {where}{others}: {reason}")
        for client, reason in sorted(self.missing.items()):
            log(INFO, "client %s is missing in %s: %s", client, where, reason)
        if num_good < federation.min_replies:
            raise FederationError(
                f"{where}: {num_good} good replies, min-replies = {federation.min_replies}; missing clients: "
                + "; ".join(f"{client}: {reason.strip().splitlines()[-1]}" for client, reason in self.missing.items())
            )

    def summary(self) -> None:
        federation = self.config.federation
        log(INFO, "%s over %s clients on %s nodes", federation.rule, len(self.node_of), len(set(self.node_of.values())))

    def _by_client(self, replies: Iterable[Message]) -> Iterable[tuple[int, wire.RecordDict]]:
        """The reply's content for each client that answered; the others go to `missing`."""
        contents = {}
        errors = {}
        for reply in replies:
            node = reply.metadata.src_node_id
            if reply.has_error():
                errors[node] = f"its node failed: {reply.error.reason}"
            else:
                contents[node] = reply.content
        timeout = self.config.federation.round_timeout
        for node, cohort in self._cohorts.items():
            failures = wire.unpack_failures(contents[node]) if node in contents else {}
            for client in cohort:
                if node not in contents:
                    self.missing[client] = errors.get(node, f"no reply within round-timeout = {timeout:g} s")
                elif client in failures:
                    self.missing[client] = failures[client]
                else:
                    yield client, contents[node]
