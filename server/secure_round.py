"""A round with secure aggregation: keys and shares before the training, the list of survivors and shares after it.

The training itself is the third step (`clients.secure_handlers`). A node that fails a step, or whose message is
refused, has dropped out: its clients are missing. The round fails if too few nodes are left, and its error names them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from logging import INFO
from typing import TypeVar

import numpy as np
from flwr.app import Message
from flwr.serverapp import Grid
from flwr.supercore.logger import log

from copra_fl import secure_wire, wire
from copra_fl.adapters.state import Adapter, Update
from copra_fl.aggregation import private_sums, secure_sums
from copra_fl.aggregation.checking import check_tensors
from copra_fl.records import PrivacySpent
from copra_fl.secure_aggregation import fixed_point
from copra_fl.secure_aggregation.errors import SecureAggregationError
from copra_fl.secure_aggregation.messages import Confirmation, Keys, Revealed, SealedShares
from copra_fl.secure_aggregation.node import check_confirmation
from copra_fl.secure_aggregation.roster import check_keys
from copra_fl.secure_aggregation.server import Relay, check_shares, list_nodes
from copra_fl.wording import foreign, listed
from server.errors import FederationError
from server.messaging import exchange
from server.replies import TrainReply, check_missing
from server.round_request import RoundRequest
from server.run_context import RunContext
from server.unmaskings import Unmaskings

Answer = TypeVar("Answer")
#: bytes of a node's message in steps 1, 2, 4 and 5, per node of the round; far more than they need
STEP_BYTES = 1 << 12


@dataclass(frozen=True)
class SecureSum:
    """The unmasked sum of a round.

    Attributes:
        updates: one pooled update of all clients; in a private run without tensors.
        private_sum: in a private run the noisy sum of the clients' changes; else None.
    """

    updates: list[Update]
    private_sum: Adapter | None = None


class SecureRound:
    """The secure aggregation of one round.

    Attributes:
        missing: client -> reason, of the nodes that dropped out before the training.
        bytes_down, bytes_up: contents of the messages of steps 1, 2, 4 and 5, and of the shares in the third.
        notes: for the journal.
        privacy: spent up to this round; None before the nodes are asked to unmask, and in a run that is not private.
    """

    def __init__(
        self,
        grid: Grid,
        run: RunContext,
        request: RoundRequest,
        numbers: Mapping[int, int],
        charge: Callable[[], PrivacySpent | None],
    ) -> None:
        """Start the secure aggregation of a round.

        Args:
            numbers: node -> its partition-id, the number that secure aggregation knows it by.
            charge: charges the privacy budget for a release, and returns the privacy spent.
        """
        self.missing: dict[int, str] = {}
        self.bytes_down = self.bytes_up = 0
        self.notes: dict[str, object] = {}
        self.privacy: PrivacySpent | None = None
        self._charge = charge
        self._grid, self._run, self._request = grid, run, request
        self._numbers = {node: numbers[node] for node in request.cohorts}
        self._unmaskings = Unmaskings(run.directory)
        is_private = run.config.privacy.is_local  # its sums have new noise each time
        self._asked_before = () if is_private else self._unmaskings.nodes(request.server_round)

    def open(self, messages: Sequence[Message]) -> list[Message]:
        """Steps 1 and 2: return the training messages of the nodes that are still there, with the shares for them.

        In a round that is done again after its nodes were asked to unmask the sum, only those nodes take part.

        Raises FederationError if too few nodes are there, one of a sum that was asked for before, or one is missing and
        failures are not tolerated.
        """
        run, number = self._run.run, self._request.server_round
        config = self._run.config
        with self._named_failure():
            self._leave_out_others()
            asked = {node: secure_wire.pack_secure_round(run, number) for node in self._numbers}
            keys = self._ask("keys", asked, self._read_keys)
            self._check_same_nodes(self._numbers[node] for node in keys)
            cohorts = {} if config.privacy.is_local else self._request.cohorts
            clients = {self._numbers[node]: cohort for node, cohort in cohorts.items() if node in keys}
            threshold = config.privacy.secure_threshold
            roster = list_nodes(run, number, threshold, keys.values(), clients, config.digest)

            def read_shares(node: int, content: wire.RecordDict) -> list[SealedShares]:
                shares = secure_wire.unpack_shares(content)
                check_shares(roster, self._numbers[node], shares)
                return shares

            sent = self._ask("shares", {node: secure_wire.pack_roster(roster) for node in keys}, read_shares)
            self._check_same_nodes(self._numbers[node] for node in sent)
            self._relay = Relay.of(roster, {self._numbers[node]: shares for node, shares in sent.items()})
            if config.privacy.is_local:
                num_honest = roster.num_honest(config.privacy.dp_colluding_nodes)
                self._scale = private_sums.private_scale(config.privacy, num_honest)
            else:
                self._scale = secure_sums.sum_scale(config.federation.max_update_norm, len(roster.keys))
        if config.federation.failures == "strict":
            num_left = sum(len(self._request.cohorts[node]) for node in sent)
            check_missing(config, self._request, self.missing, num_left, f"round {number}")
        remaining = [message for message in messages if message.metadata.dst_node_id in sent]
        for message in remaining:
            shares = self._relay.for_receiver(self._numbers[message.metadata.dst_node_id])
            secure_wire.add_shares(message.content, shares)
            self.bytes_down += message.content["secure-shares"].count_bytes()
        return remaining

    def unmask(self, replies: Mapping[int, TrainReply], missing: Mapping[int, str]) -> SecureSum:
        """Steps 4 and 5: return the sum of the nodes' vectors without masks. `missing` clients are named in errors.

        The privacy budget is charged before the nodes are asked for shares, because the server can read the sum then.

        Raises FederationError if too few nodes answer, and if the sum is not that of the clients' updates.
        """
        vectors = {self._numbers[node]: r.masked for node, r in replies.items() if r.masked is not None}
        updates = sorted((one for reply in replies.values() for one in reply.updates), key=lambda one: one.client)
        refused: dict[int, str] = {}

        def read_confirmation(node: int, content: wire.RecordDict) -> Confirmation:
            answer = secure_wire.unpack_confirmation(content)
            check_confirmation(self._relay.roster, self._numbers[node], answer.signature, vectors)
            return answer

        def is_confirmed(answers: Mapping[int, Confirmation]) -> bool:
            return len(answers) >= self._relay.roster.min_nodes

        def read_revealed(node: int, content: wire.RecordDict) -> Revealed:
            revealed = secure_wire.unpack_revealed(content, self._numbers[node])
            if reason := self._relay.wrong_shares(revealed, vectors):
                raise SecureAggregationError(reason)
            return revealed

        def enough(answers: Mapping[int, Revealed]) -> bool:
            return self._relay.can_unmask(self._numbers[node] for node in answers)

        with self._named_failure(missing, refused):
            self._check_same_nodes(vectors)
            self._relay.check_number(vectors, "sent a vector")
            asked = {node: secure_wire.pack_survivors(vectors) for node in replies}
            confirmed = self._ask("survivors", asked, read_confirmation, is_confirmed, refused)
            self._check_confirmed(len(confirmed))
            self.privacy = self._charge()
            self._unmaskings.add(self._request.server_round, vectors)
            signatures = {self._numbers[node]: answer.signature for node, answer in confirmed.items()}
            asked = {node: secure_wire.pack_confirmed(vectors, signatures) for node in replies}
            revealed = self._ask("unmask", asked, read_revealed, enough, refused)
            [(inputs, _)] = Counter(answer.inputs for answer in confirmed.values()).most_common(1)
            total = self._relay.unmask(vectors, list(revealed.values()), inputs)
            notes: dict[str, object]
            if self._run.config.privacy.is_local:
                result = SecureSum([], private_sums.private_sum(total, self._request.masked, len(updates), self._scale))
                notes = {"noise_multiplier": self._noise_multiplier(len(vectors))}
            else:
                result = SecureSum([self._pooled(total, updates)])
                error = fixed_point.largest_error(self._scale, len(vectors)) / self._least_weight(updates)
                notes = {"error": error}
        self.notes = {
            "secure_aggregation": {
                "nodes": sorted(vectors),
                "dropped": sorted(self._numbers[node] for node in self._numbers.keys() - replies.keys()),
                "refused": sorted(set(refused.values())),
                **notes,
            }
        }
        return result

    def _leave_out_others(self) -> None:
        """Leave out the nodes that are not in the sum that was asked for before."""
        self._check_same_nodes(self._numbers.values())
        for node, number in list(self._numbers.items()) if self._asked_before else ():
            if number not in self._asked_before:
                del self._numbers[node]
                reason = "its node was not there when the nodes were asked to unmask this round for the first time"
                self.missing.update(dict.fromkeys(self._request.cohorts[node], reason))

    def _check_same_nodes(self, present: Iterable[int]) -> None:
        """Raise SecureAggregationError if a node of the sum that was asked for before is not `present`."""
        if absent := sorted(set(self._asked_before) - set(present)):
            raise SecureAggregationError(
                f"nodes {listed(self._asked_before)} were asked before to unmask their sum, and reveal shares for the "
                f"same sum only; node {listed(absent)} is missing now. Start it again, or start the run anew with "
                "--overwrite"
            )

    def _check_confirmed(self, number: int) -> None:
        """Raise SecureAggregationError if fewer nodes have signed the list of survivors than the others ask for."""
        if number < self._relay.roster.min_nodes:
            raise SecureAggregationError(
                f"{number} of {len(self._relay.roster.keys)} nodes have signed the list of survivors; "
                f"{self._relay.roster.min_nodes} are needed"
            )

    def _noise_multiplier(self, num_nodes: int) -> float:
        """Return the noise multiplier of the sum of `num_nodes` nodes; it is more than the configured one."""
        privacy = self._run.config.privacy
        num_honest = self._relay.roster.num_honest(privacy.dp_colluding_nodes)
        return private_sums.noise_multiplier(privacy, num_honest, num_nodes)

    def _least_weight(self, updates: Sequence[Update]) -> float:
        """Return the smallest weight of a value in the sum, by which its rounding error is divided."""
        weights = secure_sums.total_weights(updates, self._run.config.aggregation.weighting, self._run.num_groups)
        return float(weights[weights > 0].min())

    def _pooled(self, total: np.ndarray, updates: Sequence[Update]) -> Update:
        start, config, run = self._request.masked, self._run.config, self._run
        weighting = config.aggregation.weighting
        update = secure_sums.pooled_update(total, start, updates, weighting, run.group_of, run.num_groups, self._scale)
        check_tensors(update, start, run.group_of, config.federation.max_update_norm)
        return update

    def _read_keys(self, node: int, content: wire.RecordDict) -> Keys:
        keys = secure_wire.unpack_keys(content)
        if keys.node != self._numbers[node]:
            raise SecureAggregationError(f"node {self._numbers[node]} sends keys as node {keys.node}")
        check_keys(self._run.run, self._request.server_round, keys)
        return keys

    def _ask(
        self,
        action: str,
        contents: Mapping[int, wire.RecordDict],
        read: Callable[[int, wire.RecordDict], Answer],
        enough: Callable[[Mapping[int, Answer]], bool] = lambda answers: False,
        missing: dict[int, str] | None = None,
    ) -> dict[int, Answer]:
        """Send each node its content, and return node -> answer; clients of refused nodes are added to `missing`.

        The wait ends when all nodes have answered, the answers so far are `enough`, or after round-timeout-s; in the
        last case the clients of silent nodes are missing too.
        """
        timeout = self._run.config.federation.round_timeout_s
        messages = [Message(content, node, f"query.{action}") for node, content in contents.items()]
        limit = STEP_BYTES * (len(self._numbers) + 1)

        answers: dict[int, Answer] = {}
        reasons: dict[int, str] = {}

        def is_enough(replies: Sequence[Message]) -> bool:
            for reply in replies:
                node = reply.metadata.src_node_id
                if node in answers or node in reasons:
                    continue
                try:
                    if reply.has_error():
                        raise SecureAggregationError(reply.error.reason)
                    if (size := wire.all_bytes(reply.content)) > limit:
                        raise SecureAggregationError(f"it has {size} bytes; an answer has at most {limit}")
                    answers[node] = read(node, reply.content)
                except Exception as error:  # a node can have sent anything
                    reasons[node] = foreign(f"its node dropped out in step {action!r} of secure aggregation: {error}")
            return enough(answers)

        replies = exchange(self._grid, messages, timeout, is_enough)
        is_enough(replies)
        silent = f"its node dropped out in step {action!r} of secure aggregation: no answer within {timeout:g} s"
        without_answer = reasons.keys() if enough(answers) else contents.keys() - answers.keys()
        for node in without_answer:
            reason = reasons.get(node, silent)
            log(INFO, "node %s: %s", self._numbers[node], reason)
            (self.missing if missing is None else missing).update(dict.fromkeys(self._request.cohorts[node], reason))
        self.bytes_down += sum(wire.all_bytes(message.content) for message in messages)
        self.bytes_up += sum(wire.all_bytes(reply.content) for reply in replies if reply.has_content())
        return answers

    @contextmanager
    def _named_failure(self, *missing: Mapping[int, str]) -> Iterator[None]:
        """Turn an error of the protocol inside the block into one that stops the run, with the missing clients."""
        try:
            yield
        except ValueError as error:
            reasons = dict(self.missing)
            for of_step in missing:
                reasons |= of_step
            others = "".join(f"; client {client}: {reason}" for client, reason in sorted(reasons.items()))
            raise FederationError(
                f"round {self._request.server_round}: secure aggregation failed: {error}{others}. --resume does the "
                "round again"
            ) from error
