"""The Flower strategy: sample clients, place them on nodes as cohorts, check replies, call the rule.

The federation calls `configure_train` and `aggregate_train` round by round. Flower's own
`Strategy.start` is not used: it cannot resume, and it averages whatever came back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from logging import INFO
from typing import Any, TypeVar

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from copra_fl import wire
from copra_fl.adapters.compression import decode
from copra_fl.adapters.residual import add
from copra_fl.adapters.server_state import State
from copra_fl.adapters.state import Adapter, Update, draw, parts
from copra_fl.aggregation import client_ranks, find_rule, heads, pools, scaffold, server_optimizers
from copra_fl.aggregation.checking import check_scalars, check_tensors
from copra_fl.aggregation.pooling import pool_scalars
from copra_fl.aggregation.private import private_average
from copra_fl.aggregation.products import aggregation_error
from copra_fl.aggregation.ranks import as_global, client_starts
from copra_fl.aggregation.rule import Outcome, Round
from copra_fl.config import Config
from copra_fl.data.multi import DatasetRanges
from copra_fl.seeding import derive, generator
from copra_fl.training.plan import Plan, expected_update, num_trained
from server.eval_selection import kept_clients
from server.placement import place
from server.state_sync import Deliveries

Result = TypeVar("Result")
#: a client's scalars, or its traceback, and the headers of its tensors: far more than they take
REPORT_BYTES = 1 << 16
#: (adapters, what W0 has changed by) -> metrics on the server's validation data
Score = Callable[[Sequence[Adapter], Adapter], Sequence[Mapping[str, float]]]


class FederationError(RuntimeError):
    """A federation that cannot go on. The message says what happened, where, and what to do."""


@dataclass(frozen=True)
class Reply:
    """What one node's reply to a training message holds.

    Attributes:
        updates: of every client that it trained; those that were pooled are without tensors.
        averaged: what goes into the rule: the kept clients' own updates, and one pooled update of all others.
        controls: how each client's control variate has changed; empty without control variates.
    """

    updates: list[Update]
    averaged: list[Update]
    controls: list[Adapter]


class CohortStrategy(Strategy):
    """One message a node a round carries the node's cohort; the rule of the configuration aggregates.

    Flower's `arrays` are the adapter of `state`.

    Attributes:
        state: what the server carries from round to round; `aggregate_train` moves it on.
        updates: of the last round's clients that replied, in their order; those that were pooled are without tensors.
        missing: clients of the last round that did not, with the reason.
        notes: the rule's, of the last round.
        error: the last round's aggregation error (`products.aggregation_error`); None where it cannot be known.
    """

    def __init__(
        self,
        config: Config,
        group_of: Mapping[str, int],
        num_groups: int,
        nodes: Mapping[int, wire.Hello],
        state: State,
        run: str,
        score: Score,
        secret: int = 0,
        datasets: Sequence[DatasetRanges] = (),
    ) -> None:
        self.config = config
        self.group_of = group_of
        self.num_groups = num_groups
        self.rule = find_rule(config.aggregation.rule)
        self.meet(nodes)
        self.state = state
        self.updates: list[Update] = []
        self.missing: dict[int, str] = {}
        self.notes: dict[str, Any] = {}
        self.error: dict[str, Any] | None = None
        self._score = score
        self._delivery = Deliveries(config, run)
        self._starts: dict[int, Adapter] = {}
        self._cohorts: dict[int, list[int]] = {}
        self._keep: set[int] = set()
        self._secret = secret
        self._datasets = datasets
        self._head_sizes = [len(dataset.labels) for dataset in datasets]
        self._asked = self._wanted = 0
        self._run = run

    def meet(self, nodes: Mapping[int, wire.Hello]) -> None:
        """Let `nodes`, and no others, take part from now on."""
        by_partition = dict(sorted(nodes.items(), key=lambda item: item[1].partition))
        self.hosts = {node: hello.num_examples.keys() for node, hello in by_partition.items()}
        self.num_examples = {c: n for hello in nodes.values() for c, n in hello.num_examples.items()}
        self.num_validation = {c: n for hello in nodes.values() for c, n in hello.num_validation.items() if n > 0}

    @property
    def eligible(self) -> list[int]:
        """Clients that have training examples."""
        return sorted(client for client, count in self.num_examples.items() if count > 0)

    def sample(self, server_round: int) -> list[int]:
        """The clients of a round, drawn from the ``sampling`` stream; in a private run each by itself, in secret."""
        federation, eligible = self.config.federation, self.eligible
        if self.config.privacy.dp_clip:
            drawn = generator(self._secret, "sampling", server_round).random(len(eligible))
            return [client for client, number in zip(eligible, drawn, strict=True) if number < self.sampling_rate]
        extra = math.ceil(federation.over_sample * self.num_wanted)
        number = min(self.num_wanted + extra, len(eligible))
        rng = generator(federation.seed, "sampling", server_round)
        return sorted(int(c) for c in rng.choice(eligible, size=number, replace=False))

    @property
    def num_wanted(self) -> int:
        """Clients that a round is made of, where all that are sampled reply."""
        federation, there = self.config.federation, len(self.eligible)
        return min(federation.clients_per_round or max(1, round(federation.fraction_clients * there)), there)

    @property
    def sampling_rate(self) -> float:
        """How likely a client is to be in a round."""
        return self.num_wanted / len(self.eligible)

    def is_enough(self, replies: Sequence[Message]) -> bool:
        """Whether `replies` bring as many clients as are wanted, so that nobody else is waited for."""
        return self.num_answered(reply for reply in replies if reply.has_content()) >= self._wanted

    def num_answered(self, replies: Iterable[Message]) -> int:
        """How many clients were asked through the nodes that `replies` come from."""
        nodes = {reply.metadata.src_node_id for reply in replies}
        return sum(len(cohort) for node, cohort in self._cohorts.items() if node in nodes)

    def cohort_messages(
        self, server_round: int, number: int, work: Mapping[int, float], message_type: str
    ) -> list[Message]:
        """One message with the server's state `number` for each node that some of the clients of `work` are on."""
        self._cohorts, self._asked = place(work, self.hosts), server_round
        self._wanted = min(self.num_wanted, len(work)) if message_type == MessageType.TRAIN else len(work)
        messages = []
        for node, cohort in self._cohorts.items():
            keep = tuple(client for client in cohort if client in self._keep)
            plan = Plan(server_round, tuple(cohort), self.config, keep)
            messages.append(Message(self._delivery.pack(plan, self.state, number, node), node, message_type))
        return messages

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Messages with the round's clients, balanced over the nodes by the examples that each trains on."""
        clients = self.sample(server_round)
        starts = client_starts(self.config, self.state.adapter, clients)
        self._starts = {client: parts(start, self.rule.sends(server_round)) for client, start in starts.items()}
        self._keep = kept_clients(self.config, server_round, clients)
        work = {client: num_trained(self.config.training, self.num_examples[client]) for client in clients}
        return self.cohort_messages(server_round, server_round - 1, work, MessageType.TRAIN)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The next global adapter and the mean training loss, weighted by examples.

        Raises FederationError when a client failed (strict) or too few are left (tolerant).
        """
        nodes = self._read(replies, self._read_updates)
        self.updates = sorted((u for node in nodes for u in node.updates), key=lambda update: update.client)
        self.check_missing(f"round {server_round}", len(self.updates))
        loss = pool_scalars(self.updates).metrics["loss"] if self.updates else math.nan
        round_ = self._round(server_round, [update for node in nodes for update in node.averaged])
        privacy = self.config.privacy
        outcome = self._private_average(round_, server_round) if privacy.dp_clip else self.rule.aggregate(round_)
        known = not (pools(self.config) or self.rule.personal or privacy.dp_clip)
        self.error = aggregation_error(round_, outcome) if known else None
        self.notes = outcome.notes
        self.state = self._next_state(outcome, [control for node in nodes for control in node.controls])
        self._delivery.changed = outcome.residual
        return ArrayRecord(torch_state_dict=self.state.adapter), MetricRecord({"loss": loss})

    def _private_average(self, round_: Round, server_round: int) -> Outcome:
        privacy, noise = self.config.privacy, derive(self._secret, "dp-noise", server_round)
        travels = self.rule.sends(server_round)
        if self.config.copra.local_training == "head":
            travels &= {"head"}
        return private_average(round_, travels, privacy.dp_clip, privacy.dp_noise_multiplier, self.num_wanted, noise)

    def _round(self, server_round: int, averaged: list[Update]) -> Round:
        """The round as the rule sees it: where there are several data sets with the head in parts (`heads`)."""
        config, before = self.config, heads.split(self.state.adapter, self._head_sizes)
        stream = torch.Generator().manual_seed(derive(config.federation.seed, "init", server_round))
        ranks = client_ranks(config, len(self.num_examples))
        return Round(
            before=before,
            updates=sorted(map(self._own_part, averaged), key=lambda update: update.client),
            group_of=self.group_of,
            scaling=config.model.scaling(config.model.rank),
            settings=config.aggregation,
            ranks={update.client: ranks[update.client] for update in averaged},
            fresh=lambda: draw(before, stream),
            score=lambda adapters: self._score([heads.join(adapter) for adapter in adapters], self.state.residual),
        )

    def _own_part(self, update: Update) -> Update:
        """The update without what it says of other data sets' parts of the head."""
        for number, dataset in enumerate(self._datasets):
            if update.client in dataset.clients:
                whole = heads.split(update.adapter, self._head_sizes)
                return replace(update, adapter=heads.without_others(whole, number))
        return update

    def _next_state(self, outcome: Outcome, controls: list[Adapter]) -> State:
        settings, state = self.config.aggregation, self.state
        adapter, first, second = outcome.adapter, state.first_moment, state.second_moment
        if settings.server_optimizer != "none":
            before = heads.split(state.adapter, self._head_sizes)
            adapter, first, second = server_optimizers.step(settings, before, adapter, first, second)
        return State(
            heads.join(adapter),
            add(state.residual, outcome.residual),
            scaffold.next_control(state.control, controls, len(self.eligible)),
            first,
            second,
        )

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Every client with validation data evaluates the global adapter on it."""
        most = self.config.evaluation.client_eval_examples
        work = {client: min(number, most) for client, number in self.num_validation.items()}
        self._keep = set()
        return self.cohort_messages(server_round, server_round, work, MessageType.EVALUATE)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Lists in the order of the clients: ``client``, ``loss``, ``accuracy``, ``examples``."""
        names = ("loss", "accuracy", "examples")

        def read(clients: list[int], content: wire.RecordDict) -> list[dict[str, float]]:
            metrics = {client: wire.unpack_evaluation(content, client) for client in clients}
            for client in clients:
                self._check_evaluation(client, metrics[client])
            return [{"client": client, **{name: metrics[client][name] for name in names}} for client in clients]

        rows = sorted(chain.from_iterable(self._read(replies, read)), key=lambda row: row["client"])
        if self._cohorts:
            self.check_missing("the evaluation by the clients", len(rows))
        return MetricRecord({name: [row[name] for row in rows] for name in ("client", *names)})

    def _check_evaluation(self, client: int, metrics: Mapping[str, float]) -> None:
        """Raise ValueError for what no evaluation of `client` gives."""
        examples = min(self.num_validation[client], self.config.evaluation.client_eval_examples)
        if metrics["examples"] != examples:
            raise ValueError(f"client {client} claims {metrics['examples']} validation examples; it has {examples}")
        if not (math.isfinite(metrics["loss"]) and 0 <= metrics["accuracy"] <= 1):
            raise ValueError(f"client {client} has a loss of {metrics['loss']}, an accuracy of {metrics['accuracy']}")

    def check_missing(self, where: str, num_good: int) -> None:
        """Raise FederationError if what is in `missing` must stop the run."""
        federation = self.config.federation
        if self.missing and federation.failures == "strict":
            client, reason = min(self.missing.items())
            others = f" ({len(self.missing)} clients in all)" if len(self.missing) > 1 else ""
            raise FederationError(f"client {client} failed in {where}{others}: {reason}")
        for client, reason in sorted(self.missing.items()):
            log(INFO, "client %s is missing in %s: %s", client, where, reason)
        needed = federation.min_replies
        if self.config.privacy.dp_clip:  # a Poisson sample can be small, or empty
            needed = min(needed, sum(map(len, self._cohorts.values())))
        if num_good < needed:
            raise FederationError(
                f"{where}: {num_good} good replies, min-replies = {federation.min_replies}; missing clients: "
                + "; ".join(f"{client}: {reason.strip().splitlines()[-1]}" for client, reason in self.missing.items())
            )

    def summary(self) -> None:
        log(
            INFO,
            "%s over %s clients on %s nodes",
            self.config.aggregation.rule,
            len(self.num_examples),
            len(self.hosts),
        )

    def _read_updates(self, clients: list[int], content: wire.RecordDict) -> Reply:
        """What `clients` of one node sent. Raises ValueError for what must not be averaged."""
        updates = [wire.unpack_scalars(content, client) for client in clients]
        for update in updates:
            check_scalars(update, expected_update(self.config, self.num_groups, self.num_examples[update.client]))
        kept = [update for update in updates if update.client in self._keep]
        others = [update for update in updates if update.client not in self._keep]
        arrived = self._decode(content, "adapters", kept, self.config.federation.uplink_dtype) if kept else []
        pooled = self._decode(content, "pooled", [pool_scalars(others)], "float32") if others else []
        moved = self._decode(content, "controls", kept, "float32") if self.state.control else []
        arrived = [as_global(self.config, update) for update in arrived]
        return Reply(arrived + others, arrived + pooled, [update.adapter for update in moved])

    def _decode(self, content: wire.RecordDict, name: str, updates: list[Update], uplink: str) -> list[Update]:
        """`updates` with their tensors from the buffer `name`, checked."""
        decoded = decode(wire.unpack_arrays(content, name), updates, self._starts, self.group_of, uplink)
        most = self.config.federation.max_update_norm if name != "controls" else 0.0
        for update in decoded:
            check_tensors(update, self._starts[update.client], self.group_of, most)
        return decoded

    def _most_bytes(self, cohort: list[int]) -> int:
        """Of a reply of these clients: their tensors in float32, twice with control variates, and what they report."""
        adapters = [self._starts.get(client, {}) for client in cohort]
        values = sum(tensor.numel() for adapter in adapters for tensor in adapter.values())
        return 4 * values * (2 if self.state.control else 1) + REPORT_BYTES * len(cohort)

    def _read(self, replies: Iterable[Message], read: Callable[[list[int], wire.RecordDict], Result]) -> list[Result]:
        """`read` of each node's reply and of the clients that did not fail there.

        The others go to `missing`, and so do all clients of a node whose reply `read` refuses.
        """
        contents, errors, came = {}, {}, list(replies)
        for reply in came:
            node = reply.metadata.src_node_id
            if reply.has_error():
                errors[node] = f"its node failed: {reply.error.reason}"
            else:
                contents[node] = reply.content
        silent = f"no reply within round-timeout-s = {self.config.federation.round_timeout_s:g} s"
        results = []
        self.missing = {}
        for node, cohort in self._cohorts.items():
            self._delivery.lost(node)
            if node not in contents:
                late = f"not among the first {self._wanted} clients" if self.is_enough(came) else silent
                reason = errors.get(node, late)
                self.missing |= dict.fromkeys(cohort, reason)
                continue
            try:
                wire.check_reply(contents[node], self._run, self._asked, self._most_bytes(cohort))
                failures = wire.unpack_failures(contents[node])
                self.missing |= {client: failures[client] for client in cohort if client in failures}
                results.append(read([client for client in cohort if client not in failures], contents[node]))
                self._delivery.arrived(node)
            except Exception as error:  # a node can have sent anything; other nodes' clients must not suffer for it
                self.missing = dict.fromkeys(cohort, f"its node's reply was refused: {error}") | self.missing
        return results
