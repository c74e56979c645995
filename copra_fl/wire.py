"""Plans and updates as Flower records, and back. Only this module of the library and `secure_wire` import Flower.

    to a node    plan: configuration, round, clients     state-delta: which part of the server's state follows
                 adapter: the global adapter             residual, control, optimizer: only if the run has them
                 earlier: older global adapters, only for clients that need them
    back         echo: run and round of the message      failures: client -> error message
                 metrics-C: scalars of client C          adapters: of the inspected clients
                 pooled: one update for all the others   controls: changes of the clients' control variates
                 grams: Gram matrices, of the inspected clients and then of the pooled update
                 exp_avg, exp_avg_sq, momentum_buffer: moments of the clients' optimizers
                 masked: with secure aggregation in place of all buffers; its other messages are in `secure_wire`

Each node gets one message per round, for its whole cohort. Adapters are flat buffers without names (`compression`):
both sides derive the layout from what they know. Parts of the state that a node has cached are not sent again. Nothing
is pickled.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from copra_fl.adapters.compression import CODECS, Arrays, take
from copra_fl.adapters.state import Adapter, Layout, OptimizerState, Update, join_names, split_names
from copra_fl.aggregation.ranks import cut
from copra_fl.config import Config
from copra_fl.training.plan import Plan
from copra_fl.wording import foreign

#: largest numbers that a node may report: clients of a federation, examples of a client
MAX_CLIENTS, MAX_EXAMPLES = 10**6, 10**9


@dataclass(frozen=True)
class Handshake:
    """A node's description of itself, sent before its first round.

    Attributes:
        partition: its partition-id.
        digest: of the sources it runs (`provenance.library_digest`).
        num_clients: clients of the whole federation.
        num_examples: training examples of each client that it can host.
        num_validation: validation examples of each client that it can host.
        label_names: the classes in its data, in order.
        plugins: name -> digest of the run's plugins (`plugins.digests`).
        rejection_reason: why the node rejects the run; empty if it takes part. If it is set, all fields after `digest`
            are empty.
    """

    partition: int
    digest: str
    num_clients: int = 0
    num_examples: dict[int, int] = field(default_factory=dict)
    num_validation: dict[int, int] = field(default_factory=dict)
    label_names: list[str] = field(default_factory=list)
    plugins: dict[str, str] = field(default_factory=dict)
    rejection_reason: str = ""

    @property
    def counts(self) -> dict[int, tuple[int, int]]:
        """Training and validation examples of each client that the node can host."""
        return {client: (number, self.num_validation[client]) for client, number in self.num_examples.items()}


@dataclass(frozen=True)
class StateDelta:
    """Which part of the server's state a message carries.

    Attributes:
        run: id of the run; nodes store the state under it.
        number: number of the state: the rounds that led to it.
        since: number of the state that the node has cached and that the message adds to; -1: the message carries
            the whole state.
        tensors: the adapter's tensors that the message carries: indices in the alphabetical order of all names.
        rank: rank to which A and B are cut.
        changed: the tensors of older global adapters that the message carries, as `tensors`.
        ages: of these older adapters, in rounds before the newest.
    """

    run: str
    number: int
    since: int
    tensors: tuple[int, ...]
    rank: int
    changed: tuple[int, ...] = ()
    ages: tuple[int, ...] = ()


#: fields of a `StateDelta` that are lists in a record
LISTS = ("tensors", "changed", "ages")


@dataclass(frozen=True)
class Payload:
    """The part of the server's state that a message carries.

    Attributes:
        adapter: the tensors that the `StateDelta` names, cut to its rank.
        residual: the change of W0, in total or since the state that the node has cached.
        control: the global control variate; empty without control variates.
        optimizer: the shared state of the local optimizers for the parts that the round trains; else empty.
        earlier: age -> the tensors of an older global adapter that differ from the newest, cut to the same rank.
    """

    adapter: Adapter
    residual: Adapter
    control: Adapter
    optimizer: OptimizerState
    earlier: Mapping[int, Adapter] = field(default_factory=dict)


def num_bytes(content: RecordDict) -> int:
    """Return the bytes of a message's serialized arrays and metrics, without the 2 kB of a plan's configuration."""
    arrays = sum(record.count_bytes() for record in content.array_records.values())
    return arrays + sum(record.count_bytes() for record in content.metric_records.values())


def all_bytes(content: RecordDict) -> int:
    """Return the bytes of all records of a message."""
    return sum(record.count_bytes() for record in content.values())


def pack_config(config: Config, has_rounds: bool = True) -> RecordDict:
    """Pack the query for a handshake; `has_rounds` says if a round is still to be trained."""
    query = ConfigRecord({"has-rounds": has_rounds})
    return RecordDict({"config": ConfigRecord({**config.to_flat()}), "query": query})


def unpack_config(content: RecordDict) -> Config:
    return Config.from_flat(content.config_records["config"])


def unpack_has_rounds(content: RecordDict) -> bool:
    return bool(content.config_records["query"]["has-rounds"])


def pack_handshake(handshake: Handshake) -> RecordDict:
    record = ConfigRecord(
        {
            "partition": handshake.partition,
            "digest": handshake.digest,
            "num-clients": handshake.num_clients,
            "clients": list(handshake.num_examples.keys()),
            "num-examples": list(handshake.num_examples.values()),
            "num-validation": list(handshake.num_validation.values()),
            "label-names": handshake.label_names,
            "plugins": list(handshake.plugins.keys()),
            "plugin-digests": list(handshake.plugins.values()),
            "rejection-reason": handshake.rejection_reason,
        }
    )
    return RecordDict({"handshake": record})


def unpack_handshake(content: RecordDict) -> Handshake:
    """Return the handshake in a node's reply. Raises ValueError for values that no node of ours sends."""
    record: dict[str, Any] = dict(content.config_records["handshake"])
    clients = whole_numbers("clients", record["clients"])
    names = "num-examples", "num-validation"
    examples, validation = (whole_numbers(name, record[name], MAX_EXAMPLES) for name in names)
    return Handshake(
        partition=whole_numbers("partition", [record["partition"]])[0],
        digest=foreign(record["digest"], limit=64),
        num_clients=whole_numbers("num-clients", [record["num-clients"]])[0],
        num_examples=dict(zip(clients, examples, strict=True)),
        num_validation=dict(zip(clients, validation, strict=True)),
        label_names=list(map(str, record["label-names"])),
        plugins={
            str(name): foreign(digest, limit=64)
            for name, digest in zip(record["plugins"], record["plugin-digests"], strict=True)
        },
        rejection_reason=foreign(record["rejection-reason"]),
    )


def whole_numbers(name: str, values: list[Any], limit: int = MAX_CLIENTS) -> list[int]:
    """Return `values`. Raises ValueError unless they are whole numbers from 0 to `limit`."""
    for value in values:
        if type(value) is not int or not 0 <= value <= limit:  # a bool is an int, too
            raise ValueError(f"{name} = {foreign(repr(value), 100)} is not a whole number from 0 to {limit}")
    return values


def pack_plan(plan: Plan, delta: StateDelta, payload: Payload) -> RecordDict:
    record = ConfigRecord(
        {
            **plan.config.to_flat(),
            "server-round": plan.server_round,
            "clients": list(plan.clients),
            "inspected": list(plan.inspected),
            "clients-with-state": list(plan.last_rounds.keys()),
            "last-rounds": list(plan.last_rounds.values()),
        }
    )
    content = RecordDict(
        {
            "plan": record,
            "state-delta": ConfigRecord(asdict(delta) | {name: list(getattr(delta, name)) for name in LISTS}),
            "adapter": _pack_flat(payload.adapter),
        }
    )
    if payload.residual:
        content["residual"] = _pack_arrays(payload.residual)
    if payload.control:
        content["control"] = _pack_flat(payload.control)
    if payload.optimizer:
        content["optimizer"] = _pack_moments(payload.optimizer, plan.config.federation.moments_dtype)
    if earlier := _by_age(payload.earlier):
        content["earlier"] = _pack_flat(earlier)
    return content


def unpack_plan(content: RecordDict) -> Plan:
    record: dict[str, Any] = dict(content.config_records["plan"])
    server_round, clients, inspected, with_state, last_rounds = (
        record.pop(name) for name in ("server-round", "clients", "inspected", "clients-with-state", "last-rounds")
    )
    config, last_rounds = Config.from_flat(record), dict(zip(with_state, last_rounds, strict=True))
    return Plan(server_round, tuple(clients), config, tuple(inspected), last_rounds)


def unpack_delta(content: RecordDict) -> StateDelta:
    record: dict[str, Any] = dict(content.config_records["state-delta"])
    return StateDelta(**record | {name: tuple(record[name]) for name in LISTS})


def unpack_payload(
    content: RecordDict, delta: StateDelta, template: Adapter, moments: OptimizerState, moments_dtype: str = "float32"
) -> Payload:
    """Return the state in a message. `template` has the names and shapes of a whole adapter, `moments` those of the
    shared state of the optimizers, whose moments travel in `moments_dtype`.

    Raises ValueError if the server's model has another size.
    """
    sent, changed = (
        cut({name: template[name] for index, name in enumerate(sorted(template)) if index in indices}, delta.rank)
        for indices in (delta.tensors, delta.changed)
    )
    earlier = split_names(_unpack_flat(content, "earlier", _by_age(dict.fromkeys(delta.ages, changed))))
    return Payload(
        _unpack_flat(content, "adapter", sent),
        unpack_arrays(content, "residual") if "residual" in content else {},
        _unpack_flat(content, "control", template) if "control" in content else {},
        _unpack_moments(content, moments, moments_dtype) if "optimizer" in content else {},
        {age: earlier.get(str(age), {}) for age in delta.ages},
    )


def _by_age(earlier: Mapping[int, Adapter]) -> Adapter:
    """Return the tensors of older adapters in one mapping; a name starts with the adapter's age."""
    return join_names({str(age): adapter for age, adapter in earlier.items()})


def _pack_moments(state: OptimizerState, dtype: str) -> ArrayRecord:
    """Pack the moments in `dtype`, and the step counts exactly."""
    moments = join_names({kind: tensors for kind, tensors in state.items() if kind != "step"})
    values = Layout.by_name(moments).flatten(moments)
    steps = state.get("step", {})
    return _pack_arrays(CODECS[dtype].encode(values, values, ()) | {"step": Layout.by_name(steps).flatten(steps)})


def _unpack_moments(content: RecordDict, template: OptimizerState, dtype: str) -> OptimizerState:
    """Return the state that `_pack_moments` packed, with the names and shapes of `template`."""
    arrays = unpack_arrays(content, "optimizer")
    layout = Layout.by_name(join_names({kind: tensors for kind, tensors in template.items() if kind != "step"}))
    state = split_names(layout.unflatten(CODECS[dtype].decode(arrays, torch.empty(layout.size), ())))
    steps = Layout.by_name(template.get("step", {}))
    counts = steps.unflatten(take(arrays, "step", torch.float32, steps.size))
    return state | ({"step": counts} if counts else {})


def _pack_flat(adapter: Adapter) -> ArrayRecord:
    return _pack_arrays({"values": Layout.by_name(adapter).flatten(adapter)} if adapter else {})


def _unpack_flat(content: RecordDict, name: str, template: Adapter) -> Adapter:
    """Return the tensors of the flat buffer `name`, with the names and shapes of `template`."""
    if not template:
        return {}
    layout = Layout.by_name(template)
    return layout.unflatten(take(unpack_arrays(content, name), "values", torch.float32, layout.size))


@dataclass(frozen=True)
class CachedState:
    """The part of the server's state number `number` that a node keeps between messages."""

    number: int
    adapter: Adapter
    residual: Adapter


def read_cached_state(node_state: RecordDict, run: str) -> CachedState | None:
    """Return the server state in the node's Flower state; None if it is empty or belongs to another run."""
    record = node_state.config_records.get("cached-state", ConfigRecord())
    if record.get("run") != run:
        return None
    number: Any = record["number"]
    adapter, residual = (unpack_arrays(node_state, f"cached-{name}") for name in ("adapter", "residual"))
    return CachedState(number, adapter, residual)


def write_cached_state(node_state: RecordDict, run: str, cached: CachedState) -> None:
    """Replace the server state in the node's Flower state."""
    node_state["cached-state"] = ConfigRecord({"run": run, "number": cached.number})
    node_state["cached-adapter"] = _pack_arrays(cached.adapter)
    node_state["cached-residual"] = _pack_arrays(cached.residual)


def echo(message: RecordDict, reply: RecordDict) -> RecordDict:
    """Return `reply` with the run and the round of the `message` that it answers."""
    server_round = message.config_records["plan"]["server-round"]
    reply["echo"] = ConfigRecord({"run": unpack_delta(message).run, "round": server_round})
    return reply


def check_reply(reply: RecordDict, run: str, server_round: int, max_bytes: int) -> None:
    """Raise ValueError for a reply to another run or round, or of more than `max_bytes`; opens no array."""
    if (size := all_bytes(reply)) > max_bytes:
        raise ValueError(f"it has {size} bytes; a reply to this message has at most {max_bytes}")
    answered: dict[str, Any] = dict(reply.config_records.get("echo", ConfigRecord()))
    if answered != {"run": run, "round": server_round}:
        raise ValueError(
            f"it answers round {answered.get('round')} of run {answered.get('run')}, not round {server_round} of {run}"
        )


def pack_updates(updates: Iterable[Update], buffers: Mapping[str, Arrays], failures: Mapping[int, str]) -> RecordDict:
    """Pack the scalars of `updates`, and their tensors in `buffers` (see the module's table)."""
    content = RecordDict({"failures": _pack_failures(failures)})
    for update in updates:
        content[f"metrics-{update.client}"] = MetricRecord(
            {"num-examples": update.num_examples, "active-steps": list(update.active_steps), **update.metrics}
        )
    for name, arrays in buffers.items():
        content[name] = _pack_arrays(arrays)
    return content


def unpack_scalars(content: RecordDict, client: int) -> Update:
    """Return the update of `client` without its tensors. Raises ValueError if it is missing."""
    metrics: dict[str, Any] = _metrics(content, client)
    num_examples, active_steps = metrics.pop("num-examples"), metrics.pop("active-steps")
    return Update(client, {}, int(num_examples), tuple(active_steps), metrics)


def _pack_arrays(arrays: Arrays) -> ArrayRecord:
    return ArrayRecord(torch_state_dict=arrays)


def unpack_arrays(content: RecordDict, name: str) -> Arrays:
    """Return the buffer `name`. Raises ValueError if it is missing."""
    if name not in content.array_records:
        raise ValueError(f"the buffer {name!r} is missing")
    return dict(content.array_records[name].to_torch_state_dict())


def _metrics(content: RecordDict, client: int) -> dict[str, Any]:
    record = content.get(f"metrics-{client}")  # `metric_records` copies all records
    if not isinstance(record, MetricRecord):
        raise ValueError(f"the metrics of client {client} are missing")
    return dict(record)


def pack_evaluations(evaluations: Mapping[int, Mapping[str, float]], failures: Mapping[int, str]) -> RecordDict:
    content = RecordDict({"failures": _pack_failures(failures)})
    for client, metrics in evaluations.items():
        content[f"metrics-{client}"] = MetricRecord(dict(metrics))
    return content


def unpack_evaluation(content: RecordDict, client: int) -> dict[str, float]:
    """Return the client's ``loss``, ``accuracy`` and ``examples``. Raises ValueError if they are missing."""
    return _metrics(content, client)


def _pack_failures(failures: Mapping[int, str]) -> ConfigRecord:
    return ConfigRecord({str(client): text for client, text in failures.items()})


def unpack_failures(content: RecordDict) -> dict[int, str]:
    """Return the clients that failed on the node, each with its error message, cut and cleaned."""
    record = content.config_records.get("failures", ConfigRecord())
    return {int(client): foreign(text) for client, text in record.items()}
