"""Handlers of secure aggregation: steps 1, 2, 4 and 5 as messages of their own, step 3 as a part of the training.

A node's secrets lie in its Flower state, which stays on the node. They are replaced in step 1 and deleted in step 5.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from flwr.app import Context, RecordDict

from clients.client_state import ClientStateStore
from clients.node_config import NodeConfig, Rejected
from clients.policy import Policy
from clients.revealed_rounds import RevealedRounds
from copra_fl import secure_wire, wire
from copra_fl.adapters.compression import Arrays
from copra_fl.adapters.state import Update, parts
from copra_fl.aggregation.private_sums import private_scale, private_vector
from copra_fl.aggregation.secure_sums import sum_scale, vector_of
from copra_fl.secure_aggregation import node as protocol
from copra_fl.secure_aggregation.errors import SecureAggregationError
from copra_fl.training.plan import Plan, sent_parts


@contextmanager
def named_refusals() -> Iterator[None]:
    """Let the reasons of secure aggregation leave the node: they quote nothing of its data."""
    try:
        yield
    except SecureAggregationError as error:
        raise Rejected(f"secure aggregation: {error}") from None


def open_session(context: Context, node: NodeConfig) -> protocol.Session:
    """Return the node's session of a round. Raises SecureAggregationError without one."""
    session = secure_wire.read_session(context.state)
    if session is None:
        raise SecureAggregationError(f"node {node.partition} takes part in no round, or has revealed its shares")
    return session


def round_of(content: RecordDict, context: Context) -> tuple[str, int]:
    """Return run and round of the message of a step; empty and 0 for a node that takes part in no round."""
    if "secure-round" in content:
        return secure_wire.unpack_secure_round(content)
    session = secure_wire.read_session(context.state)
    return (session.roster.run, session.roster.server_round) if session else ("", 0)


def keys(node: NodeConfig, content: RecordDict, context: Context) -> RecordDict:
    """Step 1: make keys for a round and sign them."""
    run, server_round = secure_wire.unpack_secure_round(content)
    with named_refusals():
        secrets, offered = protocol.offer_keys(run, server_round, node.partition, node.identity(context.state, run))
        secure_wire.write_secrets(context.state, secrets)
        return secure_wire.pack_keys(offered)


def shares(node: NodeConfig, content: RecordDict, context: Context) -> RecordDict:
    """Step 2: check the list of nodes, and send each neighbour its sealed shares."""
    with named_refusals():
        secrets = secure_wire.read_secrets(context.state)
        if secrets is None or secure_wire.read_session(context.state) is not None:
            raise SecureAggregationError(f"node {node.partition} has not made keys for this step, or has used them")
        roster = secure_wire.unpack_roster(content)
        Policy.of(node).check_nodes(len(roster.keys))
        RevealedRounds(roster.run, node.partition).check_present(roster.server_round, roster.by_node.keys())
        session, messages = protocol.share_secrets(secrets, roster, node.peer_keys())
        secure_wire.write_session(context.state, session)
        return secure_wire.pack_shares(messages)


def survivors(node: NodeConfig, content: RecordDict, context: Context) -> RecordDict:
    """Step 4: sign one list of the nodes whose vectors are in the sum."""
    with named_refusals():
        session = open_session(context, node)
        identity, nodes = node.identity(context.state, session.roster.run), secure_wire.unpack_survivors(content)
        revealed_rounds(session).check_nodes(session.roster.server_round, nodes)
        session, confirmation = protocol.confirm(session, nodes, identity)
        secure_wire.write_session(context.state, session)
        return secure_wire.pack_confirmation(confirmation)


def unmask(node: NodeConfig, content: RecordDict, context: Context) -> RecordDict:
    """Step 5: reveal shares once; whatever the answer, the secrets of the round are deleted.

    In a run without noise the sum is written down before: the node reveals its shares of this round for no other.
    """
    with named_refusals():
        try:
            session = open_session(context, node)
        finally:
            secure_wire.forget_session(context.state)
        nodes, signatures = secure_wire.unpack_confirmed(content)
        revealed, server_round = protocol.reveal(session, nodes, signatures), session.roster.server_round
        if session.roster.clients:
            earlier = revealed_rounds(session)
            earlier.check_nodes(server_round, nodes)
            earlier.add(server_round, nodes, session.vector)
        return secure_wire.pack_revealed(revealed)


def revealed_rounds(session: protocol.Session) -> RevealedRounds:
    """Return the rounds of the session's run in which this node has revealed shares."""
    return RevealedRounds(session.roster.run, session.secrets.node)


def check_plan(plan: Plan, run: str, session: protocol.Session) -> None:
    """Raise SecureAggregationError unless `plan`, as the server has sent it, is the one of the list of nodes."""
    roster = session.roster
    if (roster.run, roster.server_round) != (run, plan.server_round):
        raise SecureAggregationError(
            f"this node has shared its secrets for round {roster.server_round} of run {roster.run}, not for round "
            f"{plan.server_round} of {run}"
        )
    if roster.share != (threshold := plan.config.privacy.secure_threshold):
        raise SecureAggregationError(
            f"the list of nodes has a threshold of {roster.share:g}, the configuration {threshold:g}"
        )
    if roster.config != plan.config.digest:
        raise SecureAggregationError("the plan has another configuration than the list of nodes")
    listed = roster.clients.get(session.secrets.node, ())
    if plan.clients != listed and not plan.config.privacy.is_local:
        raise SecureAggregationError(
            f"the list of nodes has clients {list(listed)} for this node, the plan {list(plan.clients)}"
        )


def check_last_rounds(plan: Plan, revealed: RevealedRounds, store: ClientStateStore) -> None:
    """Raise SecureAggregationError for a client whose state after a revealed round is passed over."""
    for client in plan.clients:
        named = plan.last_rounds.get(client, 0)
        newest = revealed.newest(number for number in store.rounds(client) if number < plan.server_round)
        if named < newest:
            raise SecureAggregationError(
                f"client {client} is to go on from its state after round {named}, but its update of round {newest} is "
                "in a sum that this node has helped to unmask"
            )


@dataclass(frozen=True)
class MaskedUpload:
    """Step 3: the neighbours' shares are opened before the training, the vector is masked after it.

    Attributes:
        number: number of the server's state.
    """

    context: Context
    session: protocol.Session
    number: int

    @classmethod
    def open(cls, content: RecordDict, context: Context, plan: Plan) -> MaskedUpload:
        """Open the shares in a training message with the `plan`, as the server has sent it.

        It comes before everything else: no model is loaded for a plan that is refused.

        Raises Rejected if they are refused, if the plan is not that of the list of nodes, and for clients that would go
        on from a state before a sum that they were in: their next vector would say what that round has changed.
        """
        with named_refusals():
            session = secure_wire.read_session(context.state)
            if session is None:
                raise SecureAggregationError("this node has not shared its secrets for this round")
            delta = wire.unpack_delta(content)
            check_plan(plan, delta.run, session)
            check_last_rounds(plan, revealed_rounds(session), ClientStateStore(delta.run))
            opened = protocol.receive_shares(session, secure_wire.unpack_shares(content))
            return cls(context, opened, delta.number)

    def pack(
        self,
        plan: Plan,
        updates: Sequence[Update],
        failures: Mapping[int, str],
        state: wire.Payload,
        group_of: dict[str, int],
        num_groups: int,
    ) -> Arrays:
        """Return the masked vector of the node's clients, in a private run with the node's share of the noise.

        Scale and noise depend on the configuration, which is bound into the masks, and on the list of nodes, which this
        node has checked, and on no other number of the server.

        Raises Rejected for a value that does not fit. Without noise also if the node has no update, because its vector
        would be known, and the sum that of fewer nodes, and for another vector than the one that this node has revealed
        its shares of the round for.
        """
        privacy, roster = plan.config.privacy, self.session.roster
        start = parts(state.adapter, sent_parts(plan.config, plan.server_round))
        with named_refusals():
            if not updates and not privacy.is_local:
                reasons = "; ".join(f"client {client}: {reason}" for client, reason in sorted(failures.items()))
                raise SecureAggregationError(
                    f"no client of this node has an update: {reasons or 'no client was asked'}"
                )
            if privacy.is_local:
                scale = private_scale(privacy, roster.num_honest(privacy.dp_colluding_nodes))
                vector = private_vector(start, updates, privacy.dp_clip, scale, len(roster.keys))
            else:
                weighting, num_nodes = plan.config.aggregation.weighting, len(roster.keys)
                scale = sum_scale(plan.config.federation.max_update_norm, num_nodes)
                vector = vector_of(start, updates, weighting, group_of, num_groups, scale, num_nodes)
                revealed_rounds(self.session).check_vector(plan.server_round, protocol.vector_digest(vector))
            inputs = secure_wire.inputs_of(self.number, state)
            session, masked = protocol.mask_vector(self.session, vector, inputs)
            secure_wire.write_session(self.context.state, session)
            return secure_wire.masked_arrays(masked)
