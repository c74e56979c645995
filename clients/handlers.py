"""What a node does with a message: unpack its content, call the library, pack the reply's.

A client that fails does not take the others of its cohort with it: its traceback goes
into the reply and the server decides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from flwr.app import Context, RecordDict

import copra_fl.startup  # noqa: F401
from clients.client_state import ClientState, Memory
from clients.node_config import Refused, Site
from clients.warm_cache import open_engine
from copra_fl import wire
from copra_fl.adapters.compression import FEEDBACK, Arrays, Starts, encode, encode_with_feedback
from copra_fl.adapters.residual import add
from copra_fl.adapters.state import Adapter, Update, parts
from copra_fl.aggregation import ALL, find_rule
from copra_fl.aggregation.checking import BadUpdate, check_update
from copra_fl.aggregation.pooling import pool
from copra_fl.aggregation.ranks import as_sent, client_starts, pad
from copra_fl.config import Config, ConfigError
from copra_fl.data.federated import FederatedData
from copra_fl.events import emit
from copra_fl.models.build import check_weights
from copra_fl.provenance import library_digest
from copra_fl.training.engine import Engine
from copra_fl.training.evaluation import evaluate
from copra_fl.training.plan import Plan, Start, expected_update, leaves_state

Result = TypeVar("Result")


def hello(content: RecordDict, context: Context) -> RecordDict:
    """Who this node is and which clients it can host, or why it takes no part."""
    site, digest = Site.of(context), library_digest(Path(__file__).parent)
    config = site.adapt(wire.unpack_config(content))
    try:
        check_weights(config.model)
        with site.discretion():
            answer = _introduce(site, digest, config)
    except (Refused, ConfigError) as error:
        answer = wire.Hello(site.partition, digest, refusal=str(error))
    return wire.pack_hello(answer)


def _introduce(site: Site, digest: str, config: Config) -> wire.Hello:
    single = config.data.num_clients == 0 and config.data.partitioner != "natural"
    data = site.open_data(config.changed(num_clients=site.num_partitions) if single else config)
    at_home = single or config.data.partitioner == "own" or leaves_state(config)
    hosted = range(site.partition, len(data.train), site.num_partitions) if at_home else range(len(data.train))
    return wire.Hello(
        partition=site.partition,
        digest=digest,
        num_clients=len(data.train),
        num_examples={client: len(data.train[client]) for client in hosted},
        num_validation={client: len(data.validation[client]) for client in hosted},
        label_names=data.label_names,
    )


def train(content: RecordDict, context: Context) -> RecordDict:
    site = Site.of(context)
    with site.discretion():
        return _train(site, content, context)


def _train(site: Site, content: RecordDict, context: Context) -> RecordDict:
    plan, engine, data, state = _open(site, content, context)
    config, rule, group_of = plan.config, find_rule(plan.config.aggregation.rule), engine.model.group_of
    memory = Memory(wire.unpack_delivery(content).run)
    left = {client: memory.read(client, plan.server_round) for client in plan.clients}
    own = client_starts(config, state.adapter, plan.clients)
    starts = {c: pad(own[c], config.model.rank) for c in own} if config.aggregation.client_ranks else own
    if rule.personal:
        starts = {client: start | left[client].personal for client, start in starts.items()}
    corrections = {client: _minus(state.control, each.control) for client, each in left.items() if state.control}
    full_starts = {client: Start(start, corrections.get(client, {})) for client, start in starts.items()}
    updates, failures = _train_all(site, plan, engine, data, full_starts)
    sendable = {client: parts(start, rule.sends(plan.server_round)) for client, start in own.items()}
    buffers, lost = _pack(plan, updates, sendable, {c: each.lost for c, each in left.items()}, group_of)
    if state.control:
        moved = [replace(update, adapter=_minus(update.gradient, left[update.client].control)) for update in updates]
        buffers["controls"] = encode(moved, sendable, group_of, "float32")
    if leaves_state(config):
        for update in updates:
            before, stays = left[update.client], parts(update.adapter, ALL - rule.shares)
            after = ClientState(before.personal | stays, before.control | update.gradient, lost.get(update.client, {}))
            memory.write(update.client, plan.server_round, after)
    return wire.echo(content, wire.pack_updates(updates, buffers, failures))


def _train_all(
    site: Site, plan: Plan, engine: Engine, data: FederatedData, starts: Mapping[int, Start]
) -> tuple[list[Update], dict[int, str]]:
    """The good updates of the plan's clients, and why the others have none."""
    trainable = plan.trained_parts
    updates: list[Update] = []
    failures: dict[int, str] = {}
    for clients in engine.slices(data, plan):
        trained, failed = _each(site, clients, lambda some: engine.train(data, plan, some, starts, _report))
        failures |= failed
        for update in trained:
            start = parts(starts[update.client].adapter, trainable)
            expected = expected_update(plan.config, len(engine.model.gates.names), len(data.train[update.client]))
            try:
                check_update(update, start, engine.model.group_of, expected)
                updates.append(update)
            except BadUpdate as error:
                failures[update.client] = str(error)
    return updates, failures


def _minus(ours: Adapter, theirs: Adapter) -> Adapter:
    """ours - theirs, where what is missing is zero."""
    return {name: tensor - theirs.get(name, 0) for name, tensor in ours.items()}


def _pack(
    plan: Plan, updates: list[Update], starts: Starts, lost: dict[int, Adapter], group_of: dict[str, int]
) -> tuple[dict[str, Arrays], dict[int, Adapter]]:
    """The tensors of the cohort: each client's own of those to keep, one pooled update of all others.

    `starts` hold what a client may send. With error feedback also what rounding has `lost` by now.
    """
    config, rule, uplink = plan.config, find_rule(plan.config.aggregation.rule), plan.config.federation.uplink_dtype
    sent = [as_sent(config, replace(each, adapter=parts(each.adapter, rule.shares))) for each in updates]
    kept = [update for update in sent if update.client in plan.keep]
    others = [update for update in sent if update.client not in plan.keep]
    buffers = {}
    if others:
        start = starts[others[0].client]
        pooled = pool(start, others, config.aggregation.weighting, group_of)
        buffers["pooled"] = encode([pooled], {pooled.client: start}, group_of, "float32")
    if kept and uplink in FEEDBACK:
        buffers["adapters"], lost = encode_with_feedback(kept, starts, group_of, uplink, lost)
    elif kept:
        buffers["adapters"] = encode(kept, starts, group_of, uplink)
    return buffers, lost


def evaluate_clients(content: RecordDict, context: Context) -> RecordDict:
    site = Site.of(context)
    with site.discretion():
        return _evaluate(site, content, context)


def _evaluate(site: Site, content: RecordDict, context: Context) -> RecordDict:
    plan, engine, data, state = _open(site, content, context)
    settings, memory = plan.config.evaluation, Memory(wire.unpack_delivery(content).run)

    def evaluate_all(clients: tuple[int, ...]) -> list[tuple[int, dict[str, float]]]:
        evaluations = []
        for client in clients:
            own = state.adapter | memory.read(client, plan.server_round + 1).personal
            held = data.validation[client][: settings.client_eval_examples]
            (metrics,) = evaluate(engine, [own], data.examples, held, settings.eval_batch_size)
            evaluations.append((client, metrics))
        return evaluations

    evaluations, failures = _each(site, plan.clients, evaluate_all)
    return wire.echo(content, wire.pack_evaluations(dict(evaluations), failures))


def _open(site: Site, content: RecordDict, context: Context) -> tuple[Plan, Engine, FederatedData, wire.Content]:
    """The plan of a message of this `content`, the engine and data that it needs, and the server's state."""
    plan = wire.unpack_plan(content)
    plan = replace(plan, config=site.adapt(plan.config))
    config, data, rule = plan.config, site.open_data(plan.config), find_rule(plan.config.aggregation.rule)
    num_labels = len(data.label_names)
    engine = open_engine(
        config.training.engine, config.model, config.copra.gate_group, num_labels, seed=0, core=rule.core
    )
    state = _receive(content, context.state, engine.model.read_adapter(), plan)
    engine.model.write_residual(state.residual)
    return plan, engine, data, state


def _receive(content: RecordDict, node: RecordDict, like: Adapter, plan: Plan) -> wire.Content:
    """The server's state: what comes with a message, beside what the `node` holds already; `like` a whole adapter.

    Raises RuntimeError where only changes come, and to another state than the node holds.
    """
    delivery = wire.unpack_delivery(content)
    came, held = wire.unpack_content(content, delivery, like), wire.read_held(node, delivery.run)
    adapter, residual = pad(came.adapter, plan.config.model.rank), came.residual
    if delivery.since >= 0:
        if held is None or held.number != delivery.since:
            raise RuntimeError(
                f"the node does not hold the global adapter of round {delivery.since} any more, so what has changed "
                "since is no use; the next message brings all of it"
            )
        adapter, residual = held.adapter | adapter, add(held.residual, residual)
    if find_rule(plan.config.aggregation.rule).is_held:
        wire.write_held(node, delivery.run, wire.Held(delivery.number, adapter, residual))
    return wire.Content(adapter, residual, came.control)


def _report(num_clients: float) -> None:
    emit("trained", clients=num_clients)


def _each(
    site: Site, clients: tuple[int, ...], work: Callable[[tuple[int, ...]], list[Result]]
) -> tuple[list[Result], dict[int, str]]:
    """`work` on all `clients`: results, and what may be told of those that failed.

    Where all together fail each is tried alone, so that one does not take the others with it.
    """
    try:
        return work(clients), {}
    except Exception as error:
        if len(clients) == 1:
            return [], {clients[0]: site.told(error)}
    results: list[Result] = []
    failures: dict[int, str] = {}
    for client in clients:
        done, failed = _each(site, (client,), work)
        results += done
        failures |= failed
    return results, failures
