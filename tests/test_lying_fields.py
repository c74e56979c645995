"""Every field that the server sends in a round with secure aggregation, changed for one node of three.

The test walks the records of real messages, so a field that is added later is covered without a change here. For each
value there are three good ends:

    refused       the node, or one that gets its answer, names a reason and sends nothing
    no cancelling the masks of the changed node and of the others do not cancel: the server sees random numbers
    no effect     the node's vector, and what it signs and reveals, are bitwise those of the honest message

A changed vector in a sum whose masks cancel is the end that must not be: with it a server that chose the scale of one
node read the update of another.
"""

from __future__ import annotations

import copy
import math
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict

from clients.handlers import HANDLERS
from copra_fl import secure_wire, wire
from copra_fl.files import cache_dir
from copra_fl.secure_aggregation.masks import mask
from copra_fl.secure_aggregation.node import Session, self_mask_key
from tests.support.local_grid import LocalGrid, run_federation
from tests.support.secure import node_configs_with_peers
from tests.support.tiny import Settings

#: with moments that clients keep and layers that are trained in turn, messages depend on the round before
SECURE = {"secure-aggregation": True, "updates": "pooled", "merge-gap-clients": 0, "path-pairs": 0,
          "max-update-ratio": 0.0, "local-steps": 1, "num-clients": 3, "num-rounds": 2, "secure-threshold": 1.0,
          "optimizer-state": "client", "layers-per-round": 2, "client-eval-examples": 4}  # fmt: skip
STEPS = ("query.keys", "query.shares", "train", "query.survivors", "query.unmask")
#: the node whose messages are changed
NODE = 101


@dataclass
class Recording(LocalGrid):
    """Three nodes; keeps the messages of both rounds, and what the nodes keep before and after those of the second."""

    configs: list[dict[str, str | int]]
    disks: Path
    contents: dict[tuple[int, str, int], RecordDict] = field(default_factory=dict)
    answers: dict[tuple[str, int], RecordDict] = field(default_factory=dict)
    before: dict[tuple[str, int], Context] = field(default_factory=dict)
    after: dict[tuple[str, int], Context] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__(3, node_configs=self.configs)

    def answer(self, message: Message) -> Message:
        step, node = message.metadata.message_type, message.metadata.dst_node_id
        if step not in STEPS:
            return super().answer(message)
        server_round = 1 if (1, step, node) not in self.contents else 2
        if server_round == 2 and not self.disks.exists():
            shutil.copytree(cache_dir() / "clients", self.disks)
        self.contents[server_round, step, node] = copy.deepcopy(message.content)
        self.before[step, node] = copy.deepcopy(self.contexts[node])
        reply = super().answer(message)
        assert reply.has_content(), reply.error.reason
        self.answers[step, node] = copy.deepcopy(reply.content)
        self.after[step, node] = copy.deepcopy(self.contexts[node])
        return reply


@pytest.fixture(scope="module")
def recording(tiny: Settings, tmp_path_factory: pytest.TempPathFactory) -> Recording:
    folder = tmp_path_factory.mktemp("lying")
    recorded = Recording(node_configs_with_peers(folder, 3), folder / "disks")
    run_federation(dict(tiny) | SECURE, folder / "run", grid=recorded)
    return recorded


# ---------------------------------------------------------------- other values


def other_values(value: Any) -> Iterator[Any]:
    """Yield other values than `value`: zero, tiny, huge, negative, NaN, another type, and lists with them."""
    if isinstance(value, bool):
        yield from (not value, "text")
    elif isinstance(value, int):
        yield from (0, 1, value + 1, 2**40, -1 - value, math.nan, f"{value}", f"{value}x")
    elif isinstance(value, float):
        yield from (0.0, 1e-300, 2.0**-900, 1e300, -value, math.nan, math.inf, f"{value}", "text")
    elif isinstance(value, str):
        yield from ("", value + "x", "../" + value, 7)
    elif isinstance(value, bytes):
        yield from (b"", bytes(len(value)), value[:-1] + bytes([value[-1] ^ 1]) if value else b"x", "text")
    else:
        yield from ([], value[::-1], value + value[:1])
        for other in other_values(value[0] if value else 1):
            if type(other) is type(value[0] if value else 1):
                yield [other, *value[1:]]
            else:
                yield [other for _ in value or [1]]


def other_arrays(record: ArrayRecord, name: str) -> Iterator[ArrayRecord]:
    """Yield the record with other values of its array `name`."""
    tensors = record.to_torch_state_dict()
    tensor = tensors[name]
    changed = [torch.zeros_like(tensor), tensor * 1e-30, tensor + 1e30, -tensor, tensor * math.nan, tensor[:-1]]
    one = tensor.clone()
    one.view(-1)[0] += 1e-3
    for other in [*changed, one, tensor.double(), tensor.to(torch.int64)]:
        yield ArrayRecord(torch_state_dict=tensors | {name: other})


def lies(content: RecordDict, earlier: RecordDict) -> Iterator[tuple[str, RecordDict]]:
    """Yield name and message for each field of `content` with another value; `earlier` is that of the round before."""
    for name, record in content.items():
        changed: list[tuple[str, Any]] = []
        if isinstance(record, ArrayRecord):
            changed = [(f"{name}.{key}", other) for key in record for other in other_arrays(record, key)]
        else:
            assert isinstance(record, ConfigRecord)
            for key, value in record.items():
                before = earlier[name].get(key, value) if name in earlier else value  # type: ignore[union-attr]
                for other in [*other_values(value), before]:
                    try:
                        changed.append((f"{name}.{key}", ConfigRecord({**record, key: other})))
                    except TypeError:  # no message can carry it
                        continue
        if name in earlier:
            changed.append((name, earlier[name]))
        for label, other in changed:
            yield label, RecordDict({**content, name: other})
        yield f"{name} (missing)", RecordDict({key: value for key, value in content.items() if key != name})


# ---------------------------------------------------------------- what comes of them


def attack(recording: Recording, step: str, content: RecordDict) -> str:
    """Return the end of `content` as the message of a step, on disks as they were before the second round."""
    shutil.rmtree(cache_dir() / "clients")
    shutil.copytree(recording.disks, cache_dir() / "clients")
    return ENDS[step](recording, content, copy.deepcopy(recording.before[step, NODE]))


def answer(step: str, content: RecordDict, context: Context) -> RecordDict:
    return HANDLERS[step.removeprefix("query.")](copy.deepcopy(content), context)


def session_of(context: Context) -> Session:
    session = secure_wire.read_session(context.state)
    assert session is not None
    return session


def unmasked(masked: np.ndarray, session: Session) -> np.ndarray:
    """Return a vector without its self mask: the pairwise masks are left."""
    return masked - mask(self_mask_key(session.roster, session.secrets.node, session.secrets.seed), len(masked))


def masked_vector(content: RecordDict) -> np.ndarray:
    return wire.unpack_arrays(content, "masked")["values"].numpy().view(np.uint64)


def end_of_training(recording: Recording, content: RecordDict, context: Context) -> str:
    reply, honest = masked_vector(answer("train", content, context)), recording.answers["train", NODE]
    session = session_of(context)
    if np.array_equal(reply, masked_vector(honest)):
        return "no effect"
    total = unmasked(reply, session)
    for other in {100, 101, 102} - {NODE}:
        sent = masked_vector(recording.answers["train", other])
        total = total + unmasked(sent, session_of(recording.after["train", other]))
    weight = int(total[:1].view(np.int64)[0])  # the sum of the examples, if the masks have cancelled
    return "no cancelling" if abs(weight) > 2**40 else f"WRONG SUM of weight {weight}"


def end_of_keys(recording: Recording, content: RecordDict, context: Context) -> str:
    """The others get the keys that the node signs: they refuse them, or they are for the right run and round."""
    keys = secure_wire.unpack_keys(answer("query.keys", content, context))
    roster = copy.deepcopy(recording.contents[2, "query.shares", 100])
    for name, values in roster["secure-keys"].items():
        roster["secure-keys"][name] = [*values[:1], getattr(keys, name), *values[2:]]  # type: ignore[index]
    for node, state in ((100, recording.before["query.shares", 100]), (NODE, context)):
        answer("query.shares", roster, copy.deepcopy(state) if node != NODE else state)
    return "no effect" if session_of(context).roster.server_round == 2 else "WRONG ROUND"


def end_of_shares(recording: Recording, content: RecordDict, context: Context) -> str:
    """A node that accepts another list has other masks than those that got the right one."""
    answer("query.shares", content, context)
    other = session_of(recording.after["query.shares", 100]).roster
    return "no effect" if session_of(context).roster.context == other.context else "no cancelling"


def end_of_survivors(recording: Recording, content: RecordDict, context: Context) -> str:
    """A node that signs has signed the right list: then the others accept its signature."""
    signed = secure_wire.unpack_confirmation(answer("query.survivors", content, context))
    question = copy.deepcopy(recording.contents[2, "query.unmask", 100])
    signatures = question["secure-confirmed"]["shares"]  # type: ignore[index, call-overload]
    question["secure-confirmed"]["shares"] = [signatures[0], signed.signature, signatures[2]]  # type: ignore
    answer("query.unmask", question, copy.deepcopy(recording.before["query.unmask", 100]))
    return "no effect"


def end_of_unmask(recording: Recording, content: RecordDict, context: Context) -> str:
    revealed = secure_wire.unpack_revealed(answer("query.unmask", content, context), 1)
    honest = secure_wire.unpack_revealed(recording.answers["query.unmask", NODE], 1)
    return "no effect" if revealed == honest else "WRONG SHARES"


ENDS = {
    "query.keys": end_of_keys,
    "query.shares": end_of_shares,
    "train": end_of_training,
    "query.survivors": end_of_survivors,
    "query.unmask": end_of_unmask,
}


@pytest.mark.parametrize("step", STEPS)
def test_no_field_of_a_message_makes_a_wrong_vector_part_of_the_sum(recording: Recording, step: str) -> None:
    """Print each field with its ends: ``pytest -s tests/test_lying_fields.py``."""
    honest, ends = recording.contents[2, step, NODE], dict[str, Counter[str]]()
    for label, content in lies(honest, recording.contents[1, step, NODE]):
        try:
            end = attack(recording, step, content)
        except Exception as error:  # the node's answer is an error then, and its vector in no sum
            assert str(error), f"{label}: {type(error).__name__} without a reason"
            end = "refused"
        ends.setdefault(label, Counter())[end] += 1
    assert ends
    for label, counts in ends.items():
        print(f"{step.removeprefix('query.'):10} {label:50} {dict(counts)}")
    wrong = {label: counts for label, counts in ends.items() if any("WRONG" in end for end in counts)}
    assert not wrong


def test_the_honest_messages_have_no_effect_and_their_sum_has_the_weight_of_all_examples(recording: Recording) -> None:
    """The walk can see a sum whose masks cancel: that of the honest vectors."""
    for step in STEPS:
        assert attack(recording, step, recording.contents[2, step, NODE]) == "no effect"
    vectors = [unmasked(masked_vector(recording.answers["train", node]), session_of(recording.after["train", node]))
               for node in recording.contexts]  # fmt: skip
    examples = [record["num-examples"] for node in recording.contexts
                for name, record in recording.answers["train", node].metric_records.items()]  # fmt: skip
    assert int(sum(vectors)[0]) == sum(examples) > 0  # type: ignore[index, arg-type, call-overload]
