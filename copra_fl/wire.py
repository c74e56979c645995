"""Plans and updates to and from Flower's records. The one file of the library that knows Flower.

    to a node    plan: configuration, round, clients     adapter: the global adapter
    back         metrics-c: of each client c             failures: client -> traceback
                 adapters: of the clients to keep        pooled: of all others

One message a node a round carries its whole cohort. Adapters are flat buffers without names
(`compression`): both sides know what lies where. Nothing is pickled.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from copra_fl.adapter import Adapter, Layout, Update
from copra_fl.compression import Arrays, take
from copra_fl.config import KEYS, Config
from copra_fl.tables import digest_of
from copra_fl.training import Plan


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
    """

    partition: int
    digest: str
    num_clients: int
    num_examples: dict[int, int]
    num_validation: dict[int, int]
    label_names: list[str]


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
    )


def pack_plan(plan: Plan, adapter: Adapter) -> RecordDict:
    record = ConfigRecord(
        {
            **plan.config.to_flat(),
            "server-round": plan.server_round,
            "clients": list(plan.clients),
            "keep": list(plan.keep),
        }
    )
    return RecordDict({"plan": record, "adapter": _pack_arrays({"values": Layout.by_name(adapter).flatten(adapter)})})


def unpack_plan(content: RecordDict) -> Plan:
    record: dict[str, Any] = dict(content.config_records["plan"])
    config = Config.from_flat({key: record[key] for key in KEYS})
    return Plan(record["server-round"], tuple(record["clients"]), config, tuple(record["keep"]))


def unpack_adapter(content: RecordDict, layout: Layout) -> Adapter:
    """The global adapter of a plan. Raises ValueError where the server's does not have the size of `layout`."""
    return layout.unflatten(take(unpack_arrays(content, "adapter"), "values", torch.float32, layout.size))


def pack_updates(updates: Iterable[Update], buffers: Mapping[str, Arrays], failures: Mapping[int, str]) -> RecordDict:
    """The scalars of `updates`, and their tensors in `buffers` (``adapters``, ``pooled``)."""
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


def read_lost(state: RecordDict, plan: Plan, layout: Layout) -> dict[int, Adapter]:
    """What rounding has lost so far of each client of `plan`, from a node's state between rounds.

    Zeros in the first round of a run and where the state is of another run, which is then dropped.
    """
    run = ConfigRecord({"config": digest_of(plan.config.to_toml())})
    if plan.server_round == 1 or state.get("run") != run:
        state.clear()
        state["run"] = run
    zeros = torch.zeros(layout.size)
    return {
        client: layout.unflatten(unpack_arrays(state, name)["values"] if name in state else zeros)
        for client in plan.clients
        for name in [f"lost-{client}"]
    }


def write_lost(state: RecordDict, lost: Mapping[int, Adapter], layout: Layout) -> None:
    """Keep what was lost of these clients for the next round, one record a client."""
    for client, adapter in lost.items():
        state[f"lost-{client}"] = _pack_arrays({"values": layout.flatten(adapter)})


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
