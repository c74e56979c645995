"""Handlers of secure aggregation: steps 1, 2, 4 and 5 as messages of their own, step 3 as a part of the training.

A node's secrets lie in its Flower state, which stays on the node. They are replaced in step 1 and deleted in step 5.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from flwr.app import Context, RecordDict

from clients.node_config import NodeConfig, Rejected
from clients.policy import Policy
from copra_fl import secure_wire, wire
from copra_fl.adapters.compression import Arrays
from copra_fl.adapters.state import Update, parts
from copra_fl.aggregation.private_sums import private_scale, private_vector
from copra_fl.aggregation.secure_sums import vector_of
from copra_fl.config import Config
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
        session, messages = protocol.share_secrets(secrets, roster, node.peer_keys())
        secure_wire.write_session(context.state, session)
        return secure_wire.pack_shares(messages)


def survivors(node: NodeConfig, content: RecordDict, context: Context) -> RecordDict:
    """Step 4: sign one list of the nodes whose vectors are in the sum."""
    with named_refusals():
        session = open_session(context, node)
        identity = node.identity(context.state, session.roster.run)
        session, confirmation = protocol.confirm(session, secure_wire.unpack_survivors(content), identity)
        secure_wire.write_session(context.state, session)
        return secure_wire.pack_confirmation(confirmation)


def unmask(node: NodeConfig, content: RecordDict, context: Context) -> RecordDict:
    """Step 5: reveal shares once; whatever the answer, the secrets of the round are deleted."""
    with named_refusals():
        try:
            session = open_session(context, node)
        finally:
            secure_wire.forget_session(context.state)
        return secure_wire.pack_revealed(protocol.reveal(session, *secure_wire.unpack_confirmed(content)))


@dataclass(frozen=True)
class MaskedUpload:
    """Step 3: the neighbours' shares are opened before the training, the vector is masked after it.

    Attributes:
        config: as the server has sent it, without the node's own paths.
    """

    context: Context
    session: protocol.Session
    scale: float
    config: Config

    @classmethod
    def open(cls, content: RecordDict, context: Context, plan: Plan) -> MaskedUpload:
        """Open the shares in a training message with the `plan`. Raises Rejected if they are refused."""
        with named_refusals():
            session = secure_wire.read_session(context.state)
            if session is None:
                raise SecureAggregationError("this node has not shared its secrets for this round")
            here = (wire.unpack_delta(content).run, plan.server_round)
            if (session.roster.run, session.roster.server_round) != here:
                raise SecureAggregationError(
                    f"this node has shared its secrets for round {session.roster.server_round} of run "
                    f"{session.roster.run}, not for round {here[1]} of {here[0]}"
                )
            if session.roster.share != (threshold := plan.config.privacy.secure_threshold):
                raise SecureAggregationError(
                    f"the list of nodes has a threshold of {session.roster.share:g}, the configuration {threshold:g}"
                )
            opened = protocol.receive_shares(session, secure_wire.unpack_shares(content))
            return cls(context, opened, secure_wire.unpack_scale(content), wire.unpack_plan(content).config)

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

        Of numbers from the server, the share depends on those of the configuration and on the list of nodes only, which
        this node has checked.

        Raises Rejected for a value that does not fit, and without noise if the node has no update: its vector would be
        known, and the sum that of fewer nodes.
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
                weighting, number = plan.config.aggregation.weighting, len(roster.keys)
                vector = vector_of(start, updates, weighting, group_of, num_groups, self.scale, number)
            inputs = secure_wire.inputs_of(self.config, state)
            session, masked = protocol.mask_vector(self.session, vector, inputs)
            secure_wire.write_session(self.context.state, session)
            return secure_wire.masked_arrays(masked)
