"""Plans and updates to and from Flower's records. The one file of the library that knows Flower.

    to a node    plan: configuration, round, clients     delivery: what of the server's state is here
                 adapter: the global adapter             residual, control: where the rule has them
    back         echo: the run and the round that are answered
                 metrics-c: of each client c             failures: client -> traceback
                 adapters: of the clients to keep        pooled: of all others
                 controls: how the clients' control variates have changed

One message a node a round carries its whole cohort. Adapters are flat buffers without names
(`compression`): both sides know what lies where. What a node holds already is not sent again. Nothing is pickled.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from copra_fl.adapters.compression import Arrays, take
from copra_fl.adapters.state import Adapter, Layout, Update, parts
from copra_fl.aggregation.ranks import cut
from copra_fl.config import Config
from copra_fl.training.plan import Plan


@dataclass(frozen=True)
class Hello:
    """What a node says of itself before the first round.

    Attributes:
        partition: its partition-id.
        digest: of the sources it runs (`provenance.library_digest`).
        num_clients: clients of the whole federation.
        num_examples: training examples of each client that it can host.
        num_validation: validation examples of each client that it can host.
        label_names: the classes its data has, in order.
        refusal: why it takes no part; empty where it does. With one, all that follows `digest` is empty.
    """

    partition: int
    digest: str
    num_clients: int = 0
    num_examples: dict[int, int] = field(default_factory=dict)
    num_validation: dict[int, int] = field(default_factory=dict)
    label_names: list[str] = field(default_factory=list)
    refusal: str = ""

    @property
    def counts(self) -> dict[int, tuple[int, int]]:
        """Training and validation examples of each client that it can host."""
        return {client: (number, self.num_validation[client]) for client, number in self.num_examples.items()}


@dataclass(frozen=True)
class Delivery:
    """Which part of the server's state a message carries.

    Attributes:
        run: id of the run; what nodes keep goes by it.
        number: of the state: the rounds behind it.
        since: number of the state that the node holds, and that only the changes come to; -1: everything comes.
        parts: of the adapter that come (`adapter.part_of`).
        rank: that A and B are cut to.
    """

    run: str
    number: int
    since: int
    parts: tuple[str, ...]
    rank: int


@dataclass(frozen=True)
class Content:
    """What a message carries of the server's state.

    Attributes:
        adapter: the delivery's parts, cut to its rank.
        residual: what W0 has changed by, all of it or since the state that the node holds.
        control: the global control variate; empty without control variates.
    """

    adapter: Adapter
    residual: Adapter
    control: Adapter


def num_bytes(content: RecordDict) -> int:
    """Bytes of a message's arrays as they are serialised, and of its metrics; a plan's settings, 2 kB, are left out."""
    arrays = sum(record.count_bytes() for record in content.array_records.values())
    return arrays + sum(record.count_bytes() for record in content.metric_records.values())


def pack_config(config: Config) -> RecordDict:
    return RecordDict({"config": ConfigRecord({**config.to_flat()})})


def unpack_config(content: RecordDict) -> Config:
    return Config.from_flat(content.config_records["config"])


def pack_hello(hello: Hello) -> RecordDict:
    record = ConfigRecord(
        {
            "partition": hello.partition,
            "digest": hello.digest,
            "num-clients": hello.num_clients,
            "clients": list(hello.num_examples.keys()),
            "num-examples": list(hello.num_examples.values()),
            "num-validation": list(hello.num_validation.values()),
            "label-names": hello.label_names,
            "refusal": hello.refusal,
        }
    )
    return RecordDict({"hello": record})


def unpack_hello(content: RecordDict) -> Hello:
    record: dict[str, Any] = dict(content.config_records["hello"])
    return Hello(
        partition=record["partition"],
        digest=record["digest"],
        num_clients=record["num-clients"],
        num_examples=dict(zip(record["clients"], record["num-examples"], strict=True)),
        num_validation=dict(zip(record["clients"], record["num-validation"], strict=True)),
        label_names=record["label-names"],
        refusal=record["refusal"],
    )


def pack_plan(plan: Plan, delivery: Delivery, carried: Content) -> RecordDict:
    record = ConfigRecord(
        {
            **plan.config.to_flat(),
            "server-round": plan.server_round,
            "clients": list(plan.clients),
            "keep": list(plan.keep),
        }
    )
    content = RecordDict(
        {
            "plan": record,
            "delivery": ConfigRecord(asdict(delivery) | {"parts": list(delivery.parts)}),
            "adapter": _pack_flat(carried.adapter),
        }
    )
    if carried.residual:
        content["residual"] = _pack_arrays(carried.residual)
    if carried.control:
        content["control"] = _pack_flat(carried.control)
    return content


def unpack_plan(content: RecordDict) -> Plan:
    record: dict[str, Any] = dict(content.config_records["plan"])
    server_round, clients, keep = (record.pop(name) for name in ("server-round", "clients", "keep"))
    return Plan(server_round, tuple(clients), Config.from_flat(record), tuple(keep))


def unpack_delivery(content: RecordDict) -> Delivery:
    record: dict[str, Any] = dict(content.config_records["delivery"])
    return Delivery(**record | {"parts": tuple(record["parts"])})


def unpack_content(content: RecordDict, delivery: Delivery, adapter: Adapter) -> Content:
    """What a message carries; `adapter` is one with the names and shapes of a whole one.

    Raises ValueError where the server's model has another size.
    """
    expected = cut(parts(adapter, delivery.parts), delivery.rank)
    return Content(
        _unpack_flat(content, "adapter", expected),
        unpack_arrays(content, "residual") if "residual" in content else {},
        _unpack_flat(content, "control", adapter) if "control" in content else {},
    )


def _pack_flat(adapter: Adapter) -> ArrayRecord:
    return _pack_arrays({"values": Layout.by_name(adapter).flatten(adapter)} if adapter else {})


def _unpack_flat(content: RecordDict, name: str, like: Adapter) -> Adapter:
    """The tensors of the flat buffer `name`, which has those of `like`."""
    if not like:
        return {}
    layout = Layout.by_name(like)
    return layout.unflatten(take(unpack_arrays(content, name), "values", torch.float32, layout.size))


@dataclass(frozen=True)
class Held:
    """What a node holds of the server's state number `number`."""

    number: int
    adapter: Adapter
    residual: Adapter


def read_held(state: RecordDict, run: str) -> Held | None:
    """What the node's Flower state holds; None where that is nothing, or another run's."""
    record = state.config_records.get("held", ConfigRecord())
    if record.get("run") != run:
        return None
    number: Any = record["number"]
    return Held(number, unpack_arrays(state, "held-adapter"), unpack_arrays(state, "held-residual"))


def write_held(state: RecordDict, run: str, held: Held) -> None:
    """Keep it in place of what was held before."""
    state["held"] = ConfigRecord({"run": run, "number": held.number})
    state["held-adapter"] = _pack_arrays(held.adapter)
    state["held-residual"] = _pack_arrays(held.residual)


def echo(message: RecordDict, reply: RecordDict) -> RecordDict:
    """`reply` with the run and the round of the `message` that it answers."""
    server_round = message.config_records["plan"]["server-round"]
    reply["echo"] = ConfigRecord({"run": unpack_delivery(message).run, "round": server_round})
    return reply


def check_reply(reply: RecordDict, run: str, server_round: int, most: int) -> None:
    """Raise ValueError for a reply of another run or round, or of more than `most` bytes; opens no array."""
    size = sum(record.count_bytes() for record in reply.values())
    if size > most:
        raise ValueError(f"it has {size} bytes, where such a reply has {most} at most")
    answered: dict[str, Any] = dict(reply.config_records.get("echo", ConfigRecord()))
    if answered != {"run": run, "round": server_round}:
        raise ValueError(
            f"it answers round {answered.get('round')} of run {answered.get('run')}, not round {server_round} of {run}"
        )


def pack_updates(updates: Iterable[Update], buffers: Mapping[str, Arrays], failures: Mapping[int, str]) -> RecordDict:
    """The scalars of `updates`, and their tensors in `buffers` (``adapters``, ``pooled``, ``controls``)."""
    content = RecordDict({"failures": _pack_failures(failures)})
    for update in updates:
        content[f"metrics-{update.client}"] = MetricRecord(
            {"num-examples": update.num_examples, "active-steps": list(update.active_steps), **update.metrics}
        )
    for name, arrays in buffers.items():
        content[name] = _pack_arrays(arrays)
    return content


def unpack_scalars(content: RecordDict, client: int) -> Update:
    """The update of `client` without its tensors. Raises ValueError where it is missing."""
    metrics: dict[str, Any] = _metrics(content, client)
    num_examples, active_steps = metrics.pop("num-examples"), metrics.pop("active-steps")
    return Update(client, {}, int(num_examples), tuple(active_steps), metrics)


def _pack_arrays(arrays: Arrays) -> ArrayRecord:
    return ArrayRecord(torch_state_dict=arrays)


def unpack_arrays(content: RecordDict, name: str) -> Arrays:
    """The buffer `name`. Raises ValueError where it is missing."""
    if name not in content.array_records:
        raise ValueError(f"the buffer {name!r} is missing")
    return dict(content.array_records[name].to_torch_state_dict())


def _metrics(content: RecordDict, client: int) -> dict[str, Any]:
    name = f"metrics-{client}"
    if name not in content.metric_records:
        raise ValueError(f"the metrics of client {client} are missing")
    return dict(content.metric_records[name])


def pack_evaluations(evaluations: Mapping[int, Mapping[str, float]], failures: Mapping[int, str]) -> RecordDict:
    content = RecordDict({"failures": _pack_failures(failures)})
    for client, metrics in evaluations.items():
        content[f"metrics-{client}"] = MetricRecord(dict(metrics))
    return content


def unpack_evaluation(content: RecordDict, client: int) -> dict[str, float]:
    """The client's ``loss``, ``accuracy`` and ``examples``. Raises ValueError where they are missing."""
    return _metrics(content, client)


def _pack_failures(failures: Mapping[int, str]) -> ConfigRecord:
    return ConfigRecord({str(client): text for client, text in failures.items()})


def unpack_failures(content: RecordDict) -> dict[int, str]:
    """Clients that failed on the node, with their tracebacks."""
    record = content.config_records.get("failures", ConfigRecord())
    return {int(client): str(text) for client, text in record.items()}
