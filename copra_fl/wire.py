"""Plans and updates to and from Flower's records. The one file of the library that knows Flower.

    to a node    plan: configuration, round, clients     adapter: the global adapter
    back         per client c: adapter-c, metrics-c      failures: client -> traceback

One message a node a round carries its whole cohort. Arrays are float32; nothing is pickled.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from copra_fl.adapter import Adapter, Update
from copra_fl.config import KEYS, Config
from copra_fl.training import Plan


@dataclass(frozen=True)
class Hello:
    """What a node says of itself before the first round.

    Attributes:
        partition: its partition-id; client c lives on the node whose partition-id is c mod `num_partitions`.
        digest: of the sources it runs (`provenance.library_digest`).
        num_examples: training examples of each client it hosts.
        num_validation: validation examples of each client it hosts.
        label_names: the classes its data has, in order.
    """

    partition: int
    num_partitions: int
    digest: str
    num_examples: dict[int, int]
    num_validation: dict[int, int]
    label_names: list[str]


def num_bytes(record: RecordDict) -> int:
    """Bytes of a message's arrays as they are serialised; the scalars beside them are a few hundred bytes."""
    return sum(arrays.count_bytes() for arrays in record.array_records.values())


def pack_config(config: Config) -> RecordDict:
    return RecordDict({"config": ConfigRecord({**config.to_flat()})})


def unpack_config(content: RecordDict) -> Config:
    return Config.from_flat(content.config_records["config"])


def pack_hello(hello: Hello) -> RecordDict:
    record = ConfigRecord(
        {
            "partition": hello.partition,
            "num-partitions": hello.num_partitions,
            "digest": hello.digest,
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
        num_partitions=record["num-partitions"],
        digest=record["digest"],
        num_examples=dict(zip(record["clients"], record["num-examples"], strict=True)),
        num_validation=dict(zip(record["clients"], record["num-validation"], strict=True)),
        label_names=record["label-names"],
    )


def pack_plan(plan: Plan, adapter: Adapter) -> RecordDict:
    record = ConfigRecord({**plan.config.to_flat(), "server-round": plan.server_round, "clients": list(plan.clients)})
    return RecordDict({"plan": record, "adapter": ArrayRecord(torch_state_dict=adapter)})


def unpack_plan(content: RecordDict) -> tuple[Plan, Adapter]:
    record: dict[str, Any] = dict(content.config_records["plan"])
    config = Config.from_flat({key: record[key] for key in KEYS})
    plan = Plan(record["server-round"], tuple(record["clients"]), config)
    return plan, dict(content.array_records["adapter"].to_torch_state_dict())


def pack_updates(updates: Iterable[Update], failures: Mapping[int, str]) -> RecordDict:
    content = RecordDict({"failures": _pack_failures(failures)})
    for update in updates:
        content[f"adapter-{update.client}"] = ArrayRecord(torch_state_dict=update.adapter)
        content[f"metrics-{update.client}"] = MetricRecord(
            {"num-examples": update.num_examples, "active-steps": list(update.active_steps), **update.metrics}
        )
    return content


def unpack_update(content: RecordDict, client: int) -> Update:
    """The update of `client`. Raises KeyError or ValueError where it is missing or malformed."""
    metrics: dict[str, Any] = dict(content.metric_records[f"metrics-{client}"])
    num_examples, active_steps = metrics.pop("num-examples"), metrics.pop("active-steps")
    adapter: dict[str, torch.Tensor] = dict(content.array_records[f"adapter-{client}"].to_torch_state_dict())
    return Update(client, adapter, int(num_examples), tuple(active_steps), metrics)


def pack_evaluations(evaluations: Mapping[int, Mapping[str, float]], failures: Mapping[int, str]) -> RecordDict:
    content = RecordDict({"failures": _pack_failures(failures)})
    for client, metrics in evaluations.items():
        content[f"metrics-{client}"] = MetricRecord(dict(metrics))
    return content


def unpack_evaluation(content: RecordDict, client: int) -> dict[str, float]:
    """The client's ``loss``, ``accuracy`` and ``examples``. Raises KeyError where they are missing."""
    return dict(content.metric_records[f"metrics-{client}"])  # type: ignore[arg-type]


def _pack_failures(failures: Mapping[int, str]) -> ConfigRecord:
    return ConfigRecord({str(client): text for client, text in failures.items()})


def unpack_failures(content: RecordDict) -> dict[int, str]:
    """Clients that failed on the node, with their tracebacks."""
    record = content.config_records.get("failures", ConfigRecord())
    return {int(client): str(text) for client, text in record.items()}
