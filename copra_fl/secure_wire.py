"""Messages of secure aggregation as Flower records, and what a node keeps between its steps. See `wire` for the rest.

    keys      secure-round: run and round                              ->  secure-keys: the node's
    shares    secure-round, secure-keys, secure-clients: of all nodes  ->  secure-shares: one for each neighbour
    train     as without, and secure-shares: from each neighbour       ->  masked: the vector, and metrics-C
    survivors secure-survivors: numbers of the nodes                   ->  secure-confirmed: inputs, signature
    unmask    secure-survivors, secure-confirmed: of the nodes         ->  secure-seeds, secure-mask-keys: shares

The third step is the training: its message and reply are those of `wire`, with these records added. What keeps a server
from using a field to single out a node is listed in docs/explanations/privacy.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any, TypeVar

import numpy as np
import torch
from flwr.app import ConfigRecord, RecordDict

from copra_fl import wire
from copra_fl.adapters.compression import Arrays, take
from copra_fl.adapters.state import join_names
from copra_fl.secure_aggregation.keys import bind
from copra_fl.secure_aggregation.messages import Confirmation, Keys, Revealed, SealedShares
from copra_fl.secure_aggregation.node import Secrets, Session
from copra_fl.secure_aggregation.roster import Roster
from copra_fl.tensor_files import digest

Row = TypeVar("Row", Keys, SealedShares)
#: types of the fields of `Keys` and `SealedShares`
ROW_TYPES = {"int": int, "bytes": bytes}


def _pack_rows(rows: Sequence[Keys] | Sequence[SealedShares], kind: type) -> ConfigRecord:
    """Pack rows as one list per field."""
    return ConfigRecord({column.name: [getattr(row, column.name) for row in rows] for column in fields(kind)})


def _unpack_rows(record: ConfigRecord, kind: type[Row]) -> list[Row]:
    """Return the rows that `_pack_rows` packed. Raises ValueError for values of another type."""
    columns: list[list[Any]] = []
    for column in fields(kind):
        values: Any = record[column.name]
        if not all(type(value) is ROW_TYPES[str(column.type)] for value in values):
            raise ValueError(f"{column.name} should be a list of {column.type}")
        columns.append(values)
    return [kind(*row) for row in zip(*columns, strict=True)]


def pack_secure_round(run: str, server_round: int) -> RecordDict:
    return RecordDict({"secure-round": ConfigRecord({"run": run, "round": server_round})})


def unpack_secure_round(content: RecordDict) -> tuple[str, int]:
    """Return run and round of step 1."""
    record: dict[str, Any] = dict(content.config_records["secure-round"])
    return str(record["run"]), int(record["round"])


def pack_keys(keys: Keys) -> RecordDict:
    return RecordDict({"secure-keys": _pack_rows([keys], Keys)})


def unpack_keys(content: RecordDict) -> Keys:
    """Return the keys in a node's answer. Raises ValueError unless they are those of one node."""
    (keys,) = _unpack_rows(content.config_records["secure-keys"], Keys)
    return keys


def pack_roster(roster: Roster) -> RecordDict:
    record = ConfigRecord(
        {"run": roster.run, "round": roster.server_round, "share": roster.share, "config": roster.config}
    )
    clients = ConfigRecord({str(node): list(clients) for node, clients in roster.clients.items()})
    return RecordDict({"secure-round": record, "secure-keys": _pack_rows(roster.keys, Keys), "secure-clients": clients})


def unpack_roster(content: RecordDict) -> Roster:
    """Return the list of nodes in a message or in a node's state. Raises ValueError for values of another type."""
    record: dict[str, Any] = dict(content.config_records["secure-round"])
    keys = _unpack_rows(content.config_records["secure-keys"], Keys)
    of_nodes: dict[str, Any] = dict(content.config_records["secure-clients"])
    clients = {int(node): tuple(wire.whole_numbers("clients", list(of_node))) for node, of_node in of_nodes.items()}
    share, config = float(record["share"]), str(record["config"])
    return Roster(str(record["run"]), int(record["round"]), share, tuple(keys), clients, config)


def pack_shares(shares: Sequence[SealedShares]) -> RecordDict:
    return RecordDict({"secure-shares": _pack_rows(shares, SealedShares)})


def unpack_shares(content: RecordDict) -> list[SealedShares]:
    """Return the sealed shares in a message. Raises ValueError for values of another type."""
    return _unpack_rows(content.config_records["secure-shares"], SealedShares)


def add_shares(content: RecordDict, shares: Sequence[SealedShares]) -> None:
    """Add to a training message the shares for its node."""
    content["secure-shares"] = _pack_rows(shares, SealedShares)


def masked_arrays(vector: np.ndarray) -> Arrays:
    """Return a masked vector (size,) uint64 as the arrays of a buffer; the bits travel as int64."""
    return {"values": torch.from_numpy(vector.view(np.int64))}


def unpack_masked(content: RecordDict, size: int) -> np.ndarray:
    """Return the masked vector (size,) uint64. Raises ValueError for another size or type."""
    values = take(wire.unpack_arrays(content, "masked"), "values", torch.int64, size)
    return np.array(values.numpy()).view(np.uint64)


def pack_survivors(survivors: Iterable[int]) -> RecordDict:
    return RecordDict({"secure-survivors": ConfigRecord({"nodes": sorted(survivors)})})


def unpack_survivors(content: RecordDict) -> list[int]:
    """Return the numbers of the nodes whose vectors are in the sum."""
    nodes: Any = content.config_records["secure-survivors"]["nodes"]
    return wire.whole_numbers("nodes", list(nodes))


def inputs_of(number: int, state: wire.Payload) -> bytes:
    """Return a digest of what all nodes of a round train from alike: the server's state, and its number.

    By the number, clients choose the older adapter that they start from.
    """
    tensors = {"adapter": state.adapter, "residual": state.residual, "control": state.control, **state.optimizer}
    earlier = {str(age): adapter for age, adapter in state.earlier.items()}
    return bind("inputs", number, digest(join_names(tensors | earlier)))


def pack_confirmation(confirmation: Confirmation) -> RecordDict:
    return RecordDict({"secure-confirmed": ConfigRecord({**vars(confirmation)})})


def unpack_confirmation(content: RecordDict) -> Confirmation:
    """Return the confirmation in a node's answer. Raises ValueError for values of another type."""
    record: dict[str, Any] = dict(content.config_records["secure-confirmed"])
    confirmation = Confirmation(record["inputs"], record["signature"])
    if not all(type(value) is bytes for value in vars(confirmation).values()):
        raise ValueError("inputs and signature should be bytes")
    return confirmation


def pack_confirmed(survivors: Iterable[int], signatures: Mapping[int, bytes]) -> RecordDict:
    content = pack_survivors(survivors)
    content["secure-confirmed"] = _pack_owned(signatures)
    return content


def unpack_confirmed(content: RecordDict) -> tuple[list[int], dict[int, bytes]]:
    """Return the numbers of the nodes whose vectors are in the sum, and node -> signature of that list."""
    return unpack_survivors(content), _unpack_owned(content.config_records["secure-confirmed"])


def pack_revealed(revealed: Revealed) -> RecordDict:
    parts = {"secure-seeds": revealed.seeds, "secure-mask-keys": revealed.keys}
    return RecordDict({name: _pack_owned(shares) for name, shares in parts.items()})


def unpack_revealed(content: RecordDict, node: int) -> Revealed:
    """Return the shares that node number `node` reveals. Raises ValueError for values of another type."""
    seeds, keys = (_unpack_owned(content.config_records[name]) for name in ("secure-seeds", "secure-mask-keys"))
    return Revealed(node, seeds, keys)


def _pack_owned(shares: Mapping[int, bytes]) -> ConfigRecord:
    """Pack owner -> share; without any an empty record, because Flower cannot count the bytes of an empty list."""
    return ConfigRecord({"owners": list(shares), "shares": list(shares.values())} if shares else {})


def _unpack_owned(record: ConfigRecord) -> dict[int, bytes]:
    columns: dict[str, Any] = dict(record)
    owners, shares = wire.whole_numbers("owners", list(columns.get("owners", []))), list(columns.get("shares", []))
    if not all(type(share) is bytes for share in shares):
        raise ValueError("shares should be a list of bytes")
    return dict(zip(owners, shares, strict=True))


#: records of a node's Flower state in a round with secure aggregation
SECRETS, SESSION, HELD_SHARES = "secure-secrets", "secure-session", "secure-held"


def write_secrets(node_state: RecordDict, secrets: Secrets) -> None:
    """Keep a node's secrets after step 1 in its Flower state; what an earlier round has left goes."""
    forget_session(node_state)
    node_state[SECRETS] = ConfigRecord({**vars(secrets)})


def read_secrets(node_state: RecordDict) -> Secrets | None:
    """Return the secrets in a node's Flower state; None without any."""
    record: dict[str, Any] = dict(node_state.config_records.get(SECRETS, ConfigRecord()))
    return Secrets(**record) if record else None


def write_session(node_state: RecordDict, session: Session) -> None:
    """Keep a node's state after step 2, 3 or 4 in its Flower state."""
    node_state[SECRETS] = ConfigRecord({**vars(session.secrets)})
    for name, record in pack_roster(session.roster).config_records.items():
        node_state[f"{SESSION}-{name}"] = record
    seeds, keys = ([pair[place] for pair in session.shares.values()] for place in (0, 1))
    node_state[HELD_SHARES] = ConfigRecord(
        {
            "owners": list(session.shares),
            "seeds": seeds,
            "keys": keys,
            "masked": session.masked,
            "inputs": session.inputs,
            "vector": session.vector,
            "confirmed": session.confirmed,
        }
    )


def read_session(node_state: RecordDict) -> Session | None:
    """Return the state after step 2, 3 or 4 in a node's Flower state; None without any."""
    secrets, records = read_secrets(node_state), node_state.config_records
    if secrets is None or HELD_SHARES not in records:
        return None
    names = ("secure-round", "secure-keys", "secure-clients")
    roster = unpack_roster(RecordDict({name: records[f"{SESSION}-{name}"] for name in names}))
    held: dict[str, Any] = dict(records[HELD_SHARES])
    shares = dict(zip(held["owners"], zip(held["seeds"], held["keys"], strict=True), strict=True))
    done = bool(held["masked"]), held["inputs"], held["vector"], bool(held["confirmed"])
    return Session(secrets, roster, shares, *done)


def forget_session(node_state: RecordDict) -> None:
    """Delete all secrets of a round from a node's Flower state."""
    for name in [name for name in node_state if name.startswith((SECRETS, SESSION, HELD_SHARES))]:
        del node_state[name]
