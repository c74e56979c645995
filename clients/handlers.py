"""Handlers of the messages of a node: unpack the content, call the library, pack the reply.

If a client fails, the other clients of its cohort still send their updates: its error message goes into the reply and
the server decides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from logging import WARNING
from pathlib import Path
from typing import TypeVar

from flwr.app import Context, RecordDict
from flwr.supercore.logger import log

from copra_fl import startup

startup.prepare()

from clients import secure_handlers
from clients.audit import AuditLog
from clients.client_state import ClientState, ClientStateStore
from clients.node_config import NodeConfig, Rejected
from clients.policy import Policy
from clients.starts import make_global_starts, make_starts
from clients.uplink import encode_updates, reported, shared
from clients.warm_cache import open_engine
from copra_fl import plugins, wire
from copra_fl.adapters.residual import add
from copra_fl.adapters.state import Adapter, Update, parts
from copra_fl.aggregation.checking import BadUpdate, check_grams, check_update
from copra_fl.aggregation.compatibility import heads_of
from copra_fl.aggregation.ranks import pad
from copra_fl.aggregation.shared_moments import no_moments
from copra_fl.config import Config, ConfigError
from copra_fl.data.federated import FederatedData
from copra_fl.events import emit
from copra_fl.models.build import check_weights
from copra_fl.provenance import library_digest
from copra_fl.records import NodeRecord
from copra_fl.records.audit import MessageKind, now
from copra_fl.training.engine import Engine
from copra_fl.training.evaluation import evaluate as evaluate_adapters
from copra_fl.training.plan import Plan, Start, caches_state, expected_update, leaves_state
from copra_fl.wording import foreign, listed

Result = TypeVar("Result")
#: the work that a message asks of a node; its reply
Work = Callable[[NodeConfig, RecordDict, Context], RecordDict]
#: longest reason in the audit log, in characters
MAX_REASON = 500


def handshake(content: RecordDict, context: Context) -> RecordDict:
    """Describe the node and the clients that it can host, or give the reason why it rejects the run."""
    node, digest = NodeConfig.of(context), library_digest(Path(__file__).parent)
    config, audit = wire.unpack_config(content), AuditLog(node.audit_path)
    record = NodeRecord(time=now(), kind="handshake", flower_run=context.run_id, config_digest=config.digest)
    try:
        policy = Policy.of(node)
        policy.check_run(node.adapt(config), config.model.model, config.data.num_clients or node.num_partitions)
        following = "train" if wire.unpack_has_rounds(content) else "evaluate"
        with node.redact_errors():
            policy.check_counts(audit.counted(record.model_copy(update={"kind": following})))
        check_weights(node.adapt(config).model)
        digests = plugins.digests(node.with_script(config))
        with node.redact_errors():
            answer = replace(_describe(node, digest, node.adapt(config)), plugins=digests)
        record = record.model_copy(update={"examples": sum(answer.num_examples.values())})
        policy.check_examples(config, answer.num_examples)
    except Exception as error:
        record = _rejected(record, error)
        if not isinstance(error, Rejected | ConfigError):
            raise
        answer = wire.Handshake(node.partition, digest, rejection_reason=node.without_paths(str(error)))
    finally:
        with node.redact_errors():
            audit.append(record)
    return wire.pack_handshake(answer)


def _allowed(kind: MessageKind, work: Work, content: RecordDict, context: Context) -> RecordDict:
    """Return the reply of `work` to a message if the node's policy allows both, and log the message.

    Raises Rejected if it does not.
    """
    node = NodeConfig.of(context)
    with node.redact_errors():
        if not (node.policy_path or node.audit_path):
            return work(node, content, context)
        plan, audit = wire.unpack_plan(content) if "plan" in content else None, AuditLog(node.audit_path)
        record = _record(kind, plan, content, context)
        try:
            policy = Policy.of(node)
            policy.check_counts(audit.counted(record))
            if plan:
                config = node.adapt(plan.config)
                policy.check_run(config, plan.config.model.model, config.data.num_clients or node.num_partitions)
                data = node.open_data(config)
                num_examples = {client: len(data.train[client]) for client in plan.clients}
                record = record.model_copy(update={"examples": sum(num_examples.values())})
                policy.check_examples(config, num_examples)
            reply = work(node, content, context)
            record = record.model_copy(update={"time": now(), "bytes_up": _num_bytes(reply)})
            audit.append(record, policy.check_counts)
            return reply
        except Exception as error:
            audit.append(_rejected(record, error))
            raise


def _record(kind: MessageKind, plan: Plan | None, content: RecordDict, context: Context) -> NodeRecord:
    """Return the audit record of a message before it is answered; a step of secure aggregation has no plan."""
    record = NodeRecord(
        time=now(), kind=kind, flower_run=context.run_id, config_digest="", bytes_down=_num_bytes(content)
    )
    if plan is None:
        run, server_round = secure_handlers.round_of(content, context)
        return record.model_copy(update={"run": run, "round": server_round})
    run, digest = wire.unpack_delta(content).run, plan.config.digest
    of_plan = {"run": run, "round": plan.server_round, "clients": plan.clients, "config_digest": digest}
    return record.model_copy(update=of_plan)


def _num_bytes(content: RecordDict) -> int:
    """Return the bytes of a message's arrays and metrics, and of what it has of secure aggregation."""
    secure = sum(record.count_bytes() for name, record in content.items() if name.startswith("secure-"))
    return wire.num_bytes(content) + secure


def _rejected(record: NodeRecord, error: Exception) -> NodeRecord:
    """Return the audit record of a message that is answered by `error`."""
    is_rejection = isinstance(error, Rejected | ConfigError)
    reason = str(error) if isinstance(error, Rejected) else type(error).__name__
    decision = "rejected" if is_rejection else "failed"
    return record.model_copy(update={"decision": decision, "reason": foreign(reason, MAX_REASON), "bytes_up": 0})


def _describe(node: NodeConfig, digest: str, config: Config) -> wire.Handshake:
    one_client_per_node = config.data.num_clients == 0 and config.data.partitioner != "natural"
    data = node.open_data(config.changed(num_clients=node.num_partitions) if one_client_per_node else config)
    clients = range(len(data.train))
    if one_client_per_node or config.data.partitioner == "own" or leaves_state(config):  # clients bound to their node
        clients = clients[node.partition :: node.num_partitions]
    return wire.Handshake(
        partition=node.partition,
        digest=digest,
        num_clients=len(data.train),
        num_examples={client: len(data.train[client]) for client in clients},
        num_validation={client: len(data.validation[client]) for client in clients},
        label_names=data.label_names,
    )


def train(content: RecordDict, context: Context) -> RecordDict:
    """Train the plan's clients, each from its start, and return their updates."""
    return _allowed("train", _train, content, context)


def _train(node: NodeConfig, content: RecordDict, context: Context) -> RecordDict:
    sent = wire.unpack_plan(content)
    secure = sent.config.privacy.secure_aggregation
    upload = secure_handlers.MaskedUpload.open(content, context, sent) if secure else None
    plan, engine, data, server_state = _open(node, sent, content, context)
    config, group_of = plan.config, engine.model.group_of
    delta = wire.unpack_delta(content)
    store = ClientStateStore(delta.run)

    def read_states(clients: Sequence[int]) -> list[tuple[int, ClientState]]:
        return [(client, store.read(client, plan.last_rounds.get(client, 0))) for client in clients]

    states, without_state = _isolate_failures(node, plan.clients, read_states)
    kept = dict(states)
    plan = replace(plan, clients=tuple(kept))
    global_starts = make_global_starts(plan, delta.number, server_state)
    starts = make_starts(plan, delta.number, server_state, global_starts, kept)
    updates, failures = _train_clients(node, plan, engine, data, starts)

    quantization_errors: dict[int, Adapter] = {}
    if upload:
        num_groups = len(engine.model.gates.names)
        masked = upload.pack(
            plan, shared(config, updates), without_state | failures, server_state, group_of, num_groups
        )
        buffers = {"masked": masked}
    else:
        buffers, quantization_errors = encode_updates(plan, updates, global_starts, server_state, kept, group_of)
    if leaves_state(config):
        for update in updates:
            after = kept[update.client].after(update, config, quantization_errors.get(update.client, {}))
            store.write(update.client, plan.server_round, after, plan.last_rounds.get(update.client, 0))
    return wire.echo(content, wire.pack_updates(reported(config, updates), buffers, without_state | failures))


def _train_clients(
    node: NodeConfig,
    plan: Plan,
    engine: Engine,
    data: FederatedData,
    starts: Mapping[int, Start],
) -> tuple[list[Update], dict[int, str]]:
    """Return the valid updates of the plan's clients, sorted by client, and the error messages of the other clients.

    The server reads buffers in this order, whatever the order in which an engine trains.
    """
    updates: list[Update] = []
    failures: dict[int, str] = {}

    def train_slice(clients: Sequence[int]) -> list[Update]:
        return engine.train(data, plan, clients, starts, _report_progress)

    for clients in engine.slices(data, plan):
        trained, failed = _isolate_failures(node, clients, train_slice)
        failures |= failed
        for update in trained:
            start = parts(starts[update.client].adapter, plan.trained_parts)
            expected = expected_update(plan.config, len(engine.model.gates.names), len(data.train[update.client]))
            try:
                check_update(update, start, engine.model.group_of, expected)
                if plan.collects_grams:
                    check_grams(update, start, engine.model.group_of)
                updates.append(update)
            except BadUpdate as error:
                failures[update.client] = str(error)
    return sorted(updates, key=lambda update: update.client), failures


def evaluate(content: RecordDict, context: Context) -> RecordDict:
    """Evaluate the global adapter on the validation data of the plan's clients."""
    return _allowed("evaluate", _evaluate, content, context)


def _evaluate(node: NodeConfig, content: RecordDict, context: Context) -> RecordDict:
    plan, engine, data, server_state = _open(node, wire.unpack_plan(content), content, context)
    settings, store = plan.config.evaluation, ClientStateStore(wire.unpack_delta(content).run)

    def evaluate_clients(clients: Sequence[int]) -> list[tuple[int, dict[str, float]]]:
        evaluations = []
        for client in clients:
            adapter = server_state.adapter | store.read(client, plan.last_rounds.get(client, 0)).personal
            indices = data.validation[client][: settings.client_eval_examples]
            (metrics,) = evaluate_adapters(engine, [adapter], data.examples, indices, settings.eval_batch_size)
            evaluations.append((client, metrics))
        return evaluations

    evaluations, failures = _isolate_failures(node, plan.clients, evaluate_clients)
    return wire.echo(content, wire.pack_evaluations(dict(evaluations), failures))


def _open(
    node: NodeConfig, sent: Plan, content: RecordDict, context: Context
) -> tuple[Plan, Engine, FederatedData, wire.Payload]:
    """Return the plan with the node's own paths, the engine and data that it needs, and the state in the message.

    `sent` is the plan as the server has sent it.
    """
    plan = replace(sent, config=node.adapt(sent.config))
    config, data = plan.config, node.open_data(plan.config)
    kind, group, heads = config.training.engine, config.copra.gate_group, heads_of(config)
    engine = open_engine(kind, config.model, group, len(data.label_names), seed=0, heads=heads)
    server_state = _receive_state(content, context.state, engine.model.read_adapter(), plan)
    engine.model.write_residual(server_state.residual)
    return plan, engine, data, server_state


def _receive_state(content: RecordDict, node_state: RecordDict, template: Adapter, plan: Plan) -> wire.Payload:
    """Return the server's state: the payload of a message, added to what the node has cached in `node_state`.

    `template` has the names and shapes of a whole adapter. Raises RuntimeError if the payload adds to another state
    than the cached one.
    """
    delta = wire.unpack_delta(content)
    moments = no_moments(plan.config.training, parts(template, plan.trained_parts))
    payload = wire.unpack_payload(content, delta, template, moments, plan.config.federation.moments_dtype)
    cached = wire.read_cached_state(node_state, delta.run)
    adapter, residual = pad(payload.adapter, plan.config.model.rank), payload.residual
    if delta.since >= 0:
        if cached is None or cached.number != delta.since:
            raise RuntimeError(
                f"the node no longer has the global adapter of round {delta.since} in its cache, which this message "
                "adds to; the next message will carry the whole state"
            )
        adapter, residual = cached.adapter | adapter, add(cached.residual, residual)
    if caches_state(plan.config):
        wire.write_cached_state(node_state, delta.run, wire.CachedState(delta.number, adapter, residual))
    earlier = {age: adapter | pad(old, plan.config.model.rank) for age, old in payload.earlier.items()}
    return replace(payload, adapter=adapter, residual=residual, earlier=earlier)


def _report_progress(num_clients: float) -> None:
    emit("trained", clients=num_clients)


def _isolate_failures(
    node: NodeConfig, clients: tuple[int, ...], work: Callable[[Sequence[int]], list[Result]]
) -> tuple[list[Result], dict[int, str]]:
    """Call `work` on all `clients`; return its results, and the public error messages of the failed clients.

    If the call fails for several clients, each is tried alone, so that only the failing ones are lost.
    """
    try:
        return work(clients), {}
    except Exception as error:
        if len(clients) == 1:
            return [], {clients[0]: node.public_message(error)}
        log(WARNING, "clients %s failed together and are tried one by one", listed(clients), exc_info=error)
    results: list[Result] = []
    failures: dict[int, str] = {}
    for client in clients:
        client_results, client_failures = _isolate_failures(node, (client,), work)
        results += client_results
        failures |= client_failures
    return results, failures


#: handler name -> handler, called with a message's content and the node's context; returns the reply's content
HANDLERS: dict[str, Callable[[RecordDict, Context], RecordDict]] = {
    "handshake": handshake,
    "train": train,
    "evaluate": evaluate,
    "keys": partial(_allowed, "keys", secure_handlers.keys),
    "shares": partial(_allowed, "shares", secure_handlers.shares),
    "survivors": partial(_allowed, "survivors", secure_handlers.survivors),
    "unmask": partial(_allowed, "unmask", secure_handlers.unmask),
}
