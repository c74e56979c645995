"""Replies of nodes: read, decode and check. A node can send anything; an invalid reply costs only its own clients."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from logging import INFO
from typing import TypeVar

import numpy as np
from flwr.app import Message
from flwr.supercore.logger import log

from copra_fl import secure_wire, wire
from copra_fl.adapters.compression import decode
from copra_fl.adapters.state import Adapter, Update, difference, norm
from copra_fl.aggregation.checking import (
    MAX_METRIC,
    BadUpdate,
    check_grams,
    check_moments,
    check_scalars,
    check_tensors,
    outliers,
)
from copra_fl.aggregation.grams import templates
from copra_fl.aggregation.pooling import pool_scalars
from copra_fl.aggregation.ranks import as_global
from copra_fl.aggregation.secure_sums import vector_size
from copra_fl.config import Config
from copra_fl.records import ClientEvaluation
from copra_fl.training.plan import expected_update, reported_metrics
from copra_fl.wording import LINE_END, foreign
from server.errors import FederationError
from server.round_request import RoundRequest
from server.run_context import RunContext

Result = TypeVar("Result")
#: (clients of a node that did not fail, content of its reply) -> result; raises an error for an invalid reply
Decoder = Callable[[Sequence[int], wire.RecordDict], Result]

#: bytes of a client's scalars or error message and of the headers of its tensors; far more than they need
REPORT_BYTES = 1 << 16
#: largest norm of control variates and moments
MAX_OTHER_NORM = 1e6
#: kind of the buffers with adapters
CHANGES = "change"


@dataclass(frozen=True)
class TrainReply:
    """The decoded reply of one node to a training message.

    Attributes:
        updates: of every client that it trained; pooled ones have no tensors.
        averaged: input of the rule: the inspected clients' updates, and one pooled update of all the others.
        controls: client -> change of its control variate; empty without control variates.
        pooled: the clients of the pooled update, which has the number of the first.
        lengths: kind of buffer -> client of each update in it -> Euclidean norm: of changes, or of moments.
        masked: the node's masked vector (size,) uint64, with secure aggregation in place of `averaged`.
    """

    updates: list[Update]
    averaged: list[Update]
    controls: dict[int, Adapter] = field(default_factory=dict)
    pooled: tuple[int, ...] = ()
    lengths: dict[str, dict[int, float]] = field(default_factory=dict)
    masked: np.ndarray | None = None

    def without(self, gone: Container[int]) -> TrainReply:
        """Return the reply without the clients in `gone`, which has all of the pooled ones or none."""
        return replace(
            self,
            updates=[update for update in self.updates if update.client not in gone],
            averaged=[update for update in self.averaged if update.client not in gone],
            controls={client: change for client, change in self.controls.items() if client not in gone},
            lengths={
                kind: {client: length for client, length in lengths.items() if client not in gone}
                for kind, lengths in self.lengths.items()
            },
        )


def read_replies(
    run: RunContext, request: RoundRequest, replies: Sequence[Message], decode_reply: Decoder[Result]
) -> tuple[dict[int, Result], dict[int, str]]:
    """Decode each node's reply.

    Returns node -> result, and missing client -> reason: the clients that failed, and all clients of nodes whose reply
    did not come or was rejected.
    """
    contents, errors = {}, {}
    for reply in replies:
        node = reply.metadata.src_node_id
        if reply.has_error():
            errors[node] = foreign(f"its node failed: {reply.error.reason}")
        else:
            contents[node] = reply.content
    no_reply = f"no reply within round-timeout-s = {run.config.federation.round_timeout_s:g} s"
    if request.enough(replies):
        no_reply = f"not among the first {request.num_wanted} clients"
    results: dict[int, Result] = {}
    missing: dict[int, str] = {}
    for node, cohort in request.cohorts.items():
        if node not in contents:
            missing |= dict.fromkeys(cohort, errors.get(node, no_reply))
            continue
        try:
            wire.check_reply(contents[node], run.run, request.server_round, max_bytes(request, cohort))
            failures = wire.unpack_failures(contents[node])
            missing |= {client: failures[client] for client in cohort if client in failures}
            results[node] = decode_reply([client for client in cohort if client not in failures], contents[node])
        except Exception as error:  # a node can have sent anything; other nodes' clients must not suffer for it
            reason = foreign(f"its node's reply was rejected: {error}")
            missing = dict.fromkeys(cohort, reason) | missing
    return results, dict(sorted(missing.items()))


def max_bytes(request: RoundRequest, cohort: Sequence[int]) -> int:
    """Return an upper limit for the size of a reply.

    It has tensors in float32, as many controls and moments, Gram matrices, and reports; or reports and a masked vector
    of 64-bit numbers, whose weights fit into the bytes of one more report.
    """
    if request.is_masked:
        return 8 * sum(tensor.numel() for tensor in request.masked.values()) + REPORT_BYTES * (1 + len(cohort))
    starts = [request.starts.get(client, {}) for client in cohort]
    num_values = sum(tensor.numel() for start in starts for tensor in start.values())
    num_values *= 1 + request.has_control + len(request.moments)
    if request.has_grams:
        num_values += sum(tensor.numel() for start in starts for tensor in templates(start).values())
    return 4 * num_values + REPORT_BYTES * len(cohort)


def decode_updates(
    run: RunContext,
    request: RoundRequest,
    num_examples: Mapping[int, int],
    clients: Sequence[int],
    content: wire.RecordDict,
) -> TrainReply:
    """Decode the updates of `clients` of one node. Raises ValueError for an update that must not be averaged."""
    updates = [wire.unpack_scalars(content, client) for client in clients]
    for update in updates:
        check_scalars(update, expected_update(run.config, run.num_groups, num_examples[update.client]))
        if unreported := sorted(reported_metrics(run.config) - update.metrics.keys()):
            raise BadUpdate(f"client {update.client} does not report {', '.join(unreported)}")
    if request.is_masked:
        size = vector_size(request.masked, run.config.aggregation.weighting, run.num_groups)
        return TrainReply(updates, averaged=[], masked=secure_wire.unpack_masked(content, size))
    inspected = [update for update in updates if update.client in request.inspected]
    others = [update for update in updates if update.client not in request.inspected]

    read, federation = partial(read_buffer, run, request, content), run.config.federation
    individual, pooled, controls = list[Update](), list[Update](), list[Update]()
    moments: dict[str, list[Update]] = {}
    if inspected:
        individual = read("adapters", inspected, federation.uplink_dtype, federation.max_update_norm)
        controls = read("controls", inspected, "float32") if request.has_control else []
        moments = {kind: read(kind, inspected, federation.moments_dtype) for kind in request.moments}
    if others:
        pooled = read("pooled", [pool_scalars(others)], "float32", federation.max_update_norm)
    changes = {
        update.client: norm(difference(update.adapter, request.starts[update.client]))
        for update in [*individual, *pooled]
    }
    buffers = {"controls": controls, **moments}
    lengths = {CHANGES: changes} | {kind: checked_norms(kind, decoded) for kind, decoded in buffers.items()}
    if moments:
        individual = [with_moments(update, moments, row) for row, update in enumerate(individual)]
    averaged = [*individual, *pooled]
    if averaged and request.has_grams:
        averaged = with_grams(run, request, content, averaged)
    individual = [as_global(run.config, completed(request, update)) for update in averaged[: len(individual)]]
    pooled = averaged[len(individual) :]
    return TrainReply(
        updates=individual + others,
        averaged=individual + pooled,
        controls={change.client: change.adapter for change in controls},
        pooled=tuple(sorted(update.client for update in others)),
        lengths=lengths,
    )


def read_buffer(
    run: RunContext,
    request: RoundRequest,
    content: wire.RecordDict,
    name: str,
    updates: Sequence[Update],
    uplink: str,
    max_change: float = 0.0,
) -> list[Update]:
    """Return `updates` with their tensors in the buffer `name`. Raises BadUpdate as `check_tensors` does."""
    decoded = decode(wire.unpack_arrays(content, name), updates, request.starts, run.group_of, uplink)
    for update in decoded:
        check_tensors(update, request.starts[update.client], run.group_of, max_change)
    return decoded


def checked_norms(kind: str, updates: Sequence[Update]) -> dict[int, float]:
    """Return client -> norm of its control variate or moments. Raises BadUpdate above `MAX_OTHER_NORM`."""
    lengths = {update.client: norm(update.adapter) for update in updates}
    for client, length in lengths.items():
        if length > MAX_OTHER_NORM:
            raise BadUpdate(f"client {client}: the norm of its {kind} is {length:.4g}, more than {MAX_OTHER_NORM:g}")
    return lengths


def with_grams(
    run: RunContext, request: RoundRequest, content: wire.RecordDict, updates: Sequence[Update]
) -> list[Update]:
    """Return `updates` with their Gram matrices. Raises BadUpdate as `check_grams` does."""
    starts = {update.client: templates(request.starts[update.client]) for update in updates}
    decoded = decode(wire.unpack_arrays(content, "grams"), updates, starts, run.group_of, "float32")
    complete = [replace(update, grams=grams.adapter) for update, grams in zip(updates, decoded, strict=True)]
    for update in complete:
        check_grams(update, request.starts[update.client], run.group_of)
    return complete


def without_outliers(config: Config, replies: Mapping[int, TrainReply]) -> tuple[dict[int, TrainReply], dict[int, str]]:
    """Return the replies without updates that are far longer than those of the round, and client -> reason of those.

    Clipping bounds the updates of a private run already, and leaving one out by the others would reveal more than noise
    hides.
    """
    if config.privacy.dp_clip:
        return dict(replies), {}
    factor = config.federation.max_update_ratio
    reasons: dict[int, str] = {}
    for kind in sorted({kind for reply in replies.values() for kind in reply.lengths}):
        lengths = {
            client: length for reply in replies.values() for client, length in reply.lengths.get(kind, {}).items()
        }
        for client, ratio in outliers(lengths, factor).items():
            members = next((reply.pooled for reply in replies.values() if client in reply.pooled), (client,))
            reason = f"the norm of its {kind} is {ratio:.3g} times the median of the round, more than max-update-ratio"
            reasons |= dict.fromkeys(members, f"{reason} = {factor:g}")
    return {node: reply.without(reasons) for node, reply in replies.items()}, reasons


def with_moments(update: Update, moments: Mapping[str, Sequence[Update]], row: int) -> Update:
    """Return `update` with the moments in `row` of each kind. Raises BadUpdate as `check_moments` does."""
    update = replace(update, optimizer={kind: decoded[row].adapter for kind, decoded in moments.items()})
    check_moments(update)
    return update


def completed(request: RoundRequest, update: Update) -> Update:
    """Return `update` with the tensors that its client has not trained, if it did not start from the global adapter.

    Otherwise a rule takes those from the global adapter.
    """
    if update.client not in request.apart:
        return update
    return replace(update, adapter=request.starts[update.client] | update.adapter)


def decode_evaluations(
    config: Config, num_validation: Mapping[int, int], clients: Sequence[int], content: wire.RecordDict
) -> list[ClientEvaluation]:
    """Decode the evaluations of `clients` of one node. Raises ValueError for impossible values.

    A loss may be infinite or NaN: the adapter can be the cause. A finite one is limited, so that no client's overflows
    the mean of all.
    """
    evaluations = []
    for client in clients:
        metrics = wire.unpack_evaluation(content, client)
        examples = min(num_validation[client], config.evaluation.client_eval_examples)
        if metrics["examples"] != examples:
            raise ValueError(f"client {client} claims {metrics['examples']} validation examples; it has {examples}")
        if math.isfinite(metrics["loss"]) and abs(metrics["loss"]) > MAX_METRIC:
            raise ValueError(f"client {client} has a loss of {metrics['loss']:g}")
        if not 0 <= metrics["accuracy"] <= 1:
            raise ValueError(f"client {client} has an accuracy of {metrics['accuracy']}")
        evaluations.append(
            ClientEvaluation(client=client, loss=metrics["loss"], accuracy=metrics["accuracy"], examples=examples)
        )
    return evaluations


def check_missing(config: Config, request: RoundRequest, missing: Mapping[int, str], num_valid: int, step: str) -> None:
    """Log the missing clients. Raise FederationError if they must stop the run.

    Args:
        num_valid: number of clients with a valid reply.
        step: what the round was doing, for the message.
    """
    federation = config.federation
    if missing and federation.failures == "strict":
        client, reason = min(missing.items())
        others = f" ({len(missing)} clients in all)" if len(missing) > 1 else ""
        raise FederationError(f"client {client} failed in {step}{others}: {reason}")
    for client, reason in sorted(missing.items()):
        log(INFO, "client %s is missing in %s: %s", client, step, reason)
    needed = federation.min_replies
    if not request.starts or config.privacy.dp_clip:  # an evaluation asks few clients, a Poisson sample can be empty
        needed = min(needed, len(request.clients))
    if num_valid < needed:
        reasons = "; ".join(f"{client}: {reason.rpartition(LINE_END)[2]}" for client, reason in missing.items())
        raise FederationError(
            f"{step}: {num_valid} valid replies, min-replies = {federation.min_replies}; missing clients: {reasons}"
        )
