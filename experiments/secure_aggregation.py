"""Measure what secure aggregation costs: bytes and CPU seconds of a node and of the server, and the error of the sum.

    python -m experiments.secure_aggregation

All nodes and the server take their turns in this process, without a network and without training. Bytes are those of
the packed messages. The server's seconds are measured twice: with all nodes, and with one in ten dropped out after they
have sent their shares, so that the server rebuilds their mask keys.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from copra_fl import secure_wire
from copra_fl.aggregation.secure_sums import sum_scale
from copra_fl.config import Config
from copra_fl.secure_aggregation import fixed_point, node, server
from copra_fl.secure_aggregation.keys import new_identity, public_identity
from copra_fl.secure_aggregation.neighbours import degree
from copra_fl.wire import all_bytes

SHARE = 2 / 3
#: arguments of the shortest run, with paths that tests/test_experiments.py makes
TINY = "--nodes 3 --values 10"


@contextmanager
def measured(seconds: list[float]) -> Iterator[None]:
    """Append the CPU seconds of the block."""
    started = time.process_time()
    yield
    seconds.append(time.process_time() - started)


def measure(number: int, values: int) -> dict[str, float]:
    """Return neighbours, bytes and seconds of a round of `number` nodes with vectors of `values` numbers."""
    identities = [new_identity() for _ in range(number)]
    trusted = {one: public_identity(identity) for one, identity in enumerate(identities)}
    vector, of_nodes, of_server = np.arange(values, dtype=np.uint64), list[float](), list[float]()
    with measured(of_nodes):
        offers = [node.offer_keys("run", 1, one, identities[one]) for one in range(number)]
    up = all_bytes(secure_wire.pack_keys(offers[0][1]))
    clients = {one: [one] for one in range(number)}
    roster = server.list_nodes("run", 1, SHARE, [keys for _, keys in offers], clients, Config().digest)
    down = all_bytes(secure_wire.pack_roster(roster))
    with measured(of_nodes):
        shared = [node.share_secrets(secrets, roster, trusted) for secrets, _ in offers]
    up += all_bytes(secure_wire.pack_shares(shared[0][1]))
    relay = server.Relay.of(roster, dict(enumerate(messages for _, messages in shared)))
    deliveries = [relay.for_receiver(one) for one in range(number)]
    down += all_bytes(secure_wire.pack_shares(deliveries[0]))
    with measured(of_nodes):
        masked = [
            node.mask_vector(node.receive_shares(session, delivery), vector, inputs=b"")
            for (session, _), delivery in zip(shared, deliveries, strict=True)
        ]
    for dropped in (0, number // 10):
        vectors = {one: of for one, (_, of) in enumerate(masked) if one >= dropped}
        with measured(of_nodes):
            signed = {one: node.confirm(masked[one][0], vectors, identities[one]) for one in vectors}
            signatures = {one: answer.signature for one, (_, answer) in list(signed.items())[: roster.min_nodes]}
            revealed = [node.reveal(session, vectors, signatures) for session, _ in signed.values()]
        with measured(of_server):
            assert not any(relay.wrong_shares(one, vectors) for one in revealed)
            total = relay.unmask(vectors, revealed, inputs=b"")
        assert (total == vector * np.uint64(len(vectors))).all()
    largest, measured_error = rounding_errors(number, values)
    return {
        "error, at most": largest,
        "error, measured": measured_error,
        "neighbours": degree(number, SHARE),
        "kB up": (up + all_bytes(secure_wire.pack_revealed(revealed[0])) + len(next(iter(signatures.values())))) / 1e3,
        "kB down": (down + all_bytes(secure_wire.pack_confirmed(vectors, signatures))) / 1e3,
        "vector kB": 8 * values / 1e3,
        "node s": sum(of_nodes[:4]) / number,
        "server s": of_server[0],
        "server s, 1 in 10 dropped": of_server[1],
    }


def rounding_errors(number: int, values: int) -> tuple[float, float]:
    """Return the largest possible and the largest measured error of an average over `number` nodes of 600 examples.

    It is compared with the same average in float64; the limit of a change is the default of secure aggregation.
    """
    rng, weight = np.random.default_rng(0), 600
    changes = rng.normal(0, 0.01, (number, values))
    scale = sum_scale(Config.from_flat({"secure-aggregation": True}).federation.max_update_norm, number)
    vectors = [fixed_point.encode(weight * change, scale, number) for change in changes]
    average = fixed_point.decode(np.sum(vectors, axis=0, dtype=np.uint64), scale) / (weight * number)
    error = np.abs(average - changes.mean(axis=0)).max()
    return fixed_point.largest_error(scale, number) / (weight * number), float(error)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--nodes", type=int, nargs="+", default=[2, 8, 32, 128])
    parser.add_argument("--values", type=int, default=73_728, help="MiniLM, rank 8, query and value")
    arguments = parser.parse_args()
    for number in arguments.nodes:
        row = measure(number, arguments.values)
        print(f"{number} nodes: {', '.join(f'{name} {value:.4g}' for name, value in row.items())}", flush=True)


if __name__ == "__main__":
    main()
