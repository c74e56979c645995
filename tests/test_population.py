"""Federations of very many clients: no step costs more than its share of the clients, and pages stay small."""

from __future__ import annotations

import cProfile
import json
import pstats
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr_datasets.partitioner import IidPartitioner, NaturalIdPartitioner

from clients.client_state import ClientState, ClientStateStore
from copra_fl import wire
from copra_fl.adapters.state import Update
from copra_fl.aggregation.ranks import as_global
from copra_fl.bench import population, population_figures
from copra_fl.config import Config, DataConfig
from copra_fl.data.partition import partition
from copra_fl.provenance import library_digest
from copra_fl.records import Evaluation, RoundRecord
from copra_fl.reporting.figures.clients import MAX_SHOWN, evenly_spaced
from copra_fl.reporting.tables import client_accuracy_note
from copra_fl.reporting.work import points
from copra_fl.seeding import generator
from copra_fl.wording import listed
from server.audit import AuditLog
from server.eval_selection import MAX_PAIRED, evaluating_clients, path_pairs
from server.handshake import CLIENTS, admit
from server.placement import place
from server.replies import decode_evaluations
from server.sampling import sample
from tests.support.local_grid import run_federation
from tests.support.real_runs import RealRun, num_rounds, settings
from tests.support.tiny import Settings


def evaluation_replies(clients: int) -> Callable[[], object]:
    metrics = {client: {"loss": 1.0, "accuracy": 0.5, "examples": 1} for client in range(clients)}
    content = wire.pack_evaluations(metrics, {})
    return lambda: decode_evaluations(Config(), dict.fromkeys(metrics, 1), list(metrics), content)


def training_reports(clients: int) -> Callable[[], object]:
    content = wire.pack_updates([Update(client, {}, 1, (1,), {}) for client in range(clients)], {}, {})
    return lambda: [wire.unpack_scalars(content, client) for client in range(clients)]


def handshakes(clients: int) -> Callable[[], object]:
    """Each client is a node of its own."""
    digest = library_digest(CLIENTS)
    nodes = {
        number: wire.pack_handshake(wire.Handshake(number, digest, clients, {number: 1}, {number: 0}))
        for number in range(clients)
    }
    audit = AuditLog(Path(), "run")
    return lambda: admit({n: wire.unpack_handshake(packed) for n, packed in nodes.items()}, Config(), audit)


def placement_on_one_node_per_client(clients: int) -> Callable[[], object]:
    return lambda: place(dict.fromkeys(range(clients), 1), {client: {client} for client in range(clients)})


def samples(clients: int) -> Callable[[], object]:
    return lambda: sample(Config().changed(fraction_clients=0.01), range(clients), 1)


def ranks_of_updates(clients: int) -> Callable[[], object]:
    flat = {"client-ranks": "1,2,8", "rank-assignment": "repeated", "num-clients": clients}
    config = Config.from_flat({"rule": "zero-pad", "rank": 8} | flat)
    return lambda: [as_global(config, Update(client, {}, 1, (1,), {})) for client in range(clients)]


def cost_by_round(rounds: int) -> Callable[[], object]:
    evaluation = Evaluation(loss=1.0, accuracy=0.5, examples=1)
    record = RoundRecord(round=1, seconds=1, bytes_down=1, bytes_up=1, train_loss=1, layers=(), clients=(), missing=(),
                         validation=evaluation)  # fmt: skip
    return lambda: points([record] * rounds)


PARTS = (evaluation_replies, training_reports, handshakes, placement_on_one_node_per_client, samples, ranks_of_updates,
         cost_by_round)  # fmt: skip


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.__name__)
def test_twice_the_clients_take_twice_the_work(part: Callable[[int], Callable[[], object]]) -> None:
    """Function calls are counted, which do not depend on the machine; if work grows with the square they are 4 times
    as many.
    """

    def calls(number: int) -> int:
        work, profile = part(number), cProfile.Profile()
        work()  # fills caches
        profile.runcall(work)
        return int(pstats.Stats(profile).total_calls)

    assert calls(400) < 2.2 * calls(200)


def test_the_state_of_a_client_is_found_without_a_look_at_the_others() -> None:
    store = ClientStateStore("many-clients")
    store.write(0, 1, ClientState(control={"head.bias": torch.ones(1)}), 0)

    def calls() -> int:
        profile = cProfile.Profile()
        profile.runcall(store.read, 0, 1)
        return int(pstats.Stats(profile).total_calls)

    alone = calls()
    for client in range(1, 30):
        store.write(client, 1, ClientState(control={"head.bias": torch.ones(1)}), 0)
    assert calls() == alone


@pytest.mark.parametrize("clients", [1, 7, 40])
def test_examples_are_dealt_out_as_by_the_partitioner_of_flower(clients: int) -> None:
    """`iid` splits the shuffled pool into consecutive parts; 90 examples, of which the pool has 83."""
    import datasets

    pool = np.sort(generator(0, "test").permutation(90)[:83])
    tensors, facts = partition(DataConfig(partitioner="iid", num_clients=clients), 5, {"pool": torch.tensor(pool)}, [])
    order = generator(5, "partition", "order").permutation(83)
    partitioner = IidPartitioner(clients)
    partitioner.dataset = datasets.Dataset.from_dict({"position": order})
    for client in range(clients):
        expected = sorted(partitioner.load_partition(client)["position"])
        assert np.flatnonzero(tensors["owner"].numpy() == client).tolist() == expected
    assert facts["client_names"] == [str(client) for client in range(clients)]


def test_natural_clients_have_the_examples_of_the_partitioner_of_flower() -> None:
    """The four clients with the most examples of five; client d has the fewest."""
    import datasets

    clients = np.array([0, 3, 1, 1, 2, 4, 0, 2, 4, 1, 4, 4, 2, 0])
    tokens = {"pool": torch.arange(14), "clients": torch.tensor(clients)}
    tensors, facts = partition(DataConfig(partitioner="natural", num_clients=4), 0, tokens, list("abcde"))
    assert facts["client_names"] == ["a", "b", "c", "e"]
    partitioner = NaturalIdPartitioner("client")
    partitioner.dataset = datasets.Dataset.from_dict({"client": clients, "position": range(14)})
    by_name = {partitioner.load_partition(n)["client"][0]: partitioner.load_partition(n)["position"] for n in range(5)}
    for number, name in enumerate(facts["client_names"]):
        assert np.flatnonzero(tensors["owner"] == number).tolist() == by_name["abcde".index(name)]
    assert np.flatnonzero(tensors["owner"] == -1).tolist() == by_name["abcde".index("d")]


def evaluated(flat: Settings, directory: Path) -> list[dict[str, Any]]:
    """Run a federation and return the final evaluations by its clients."""
    return json.loads((run_federation(flat, directory) / "summary.json").read_text())["clients"]


def test_a_sample_of_clients_evaluates_and_is_the_same_at_each_evaluation(tiny: Settings, tmp_path: Path) -> None:
    """The sampled clients get the results that they have when all evaluate."""
    flat = tiny | {"validation-fraction": 0.2}
    all_clients = {client["client"]: client for client in evaluated(flat, tmp_path / "all")}
    sampled = evaluated(flat | {"client-eval-clients": 2}, tmp_path / "two")
    assert len(all_clients) == 6 and len(sampled) == 2
    assert [all_clients[client["client"]] for client in sampled] == sampled
    config = Config.from_flat(flat | {"client-eval-clients": 2})
    assert [client["client"] for client in sampled] == evaluating_clients(config, range(6))
    many = [evaluating_clients(config.changed(seed=seed), range(6)) for seed in range(40)]
    assert {client for clients in many for client in clients} == set(range(6)), "another seed draws other clients"
    assert evaluating_clients(Config(), [4, 1]) == [1, 4], "by default all of them"
    assert "is that of 2 clients, drawn anew for each seed" in client_accuracy_note(dict(config.to_flat()))
    all_six = dict(config.changed(client_eval_clients=6).to_flat())
    assert client_accuracy_note(all_six) == client_accuracy_note({}) == ""


def test_pairs_of_many_clients_are_pairs_of_some_of_them() -> None:
    config = Config().changed(dataset="data", path_pairs=3)
    clients = list(range(0, 20 * MAX_PAIRED, 2))
    pairs = path_pairs(config, clients)
    assert len(set(pairs)) == 3 and all(a < b and {a, b} <= set(clients) for a, b in pairs)
    assert pairs == path_pairs(config, clients)


def test_long_lists_are_cut() -> None:
    assert listed(range(3)) == "0, 1, 2" and listed([]) == ""
    assert listed(range(25)).endswith("18, 19 and 5 more")
    shown = evenly_spaced(range(100_000))
    assert len(shown) == MAX_SHOWN and (shown[0], shown[-1]) == (0, 99_999)
    assert np.quantile(shown, [0.25, 0.5, 0.75]) == pytest.approx([25_000, 50_000, 75_000], abs=100)
    assert evenly_spaced([3, 4]) == [3, 4]


def facts_of(handshake: float, aggregation: float) -> dict[str, Any]:
    """Return the results of one population: the first round is slower, which does not count."""
    per_round = {phase: [9.0, 0.2, 0.3, 0.25] for phase in population.PER_ROUND} | {"aggregation": [9.0, aggregation]}
    sizes = {"journal.jsonl": 4000, "summary.json": 5000, "report.html": 6000}
    seconds = {"handshake": [handshake], **per_round}
    return {
        "seconds": seconds,
        "cpu_seconds": seconds,
        "peak_memory": {"handshake": 10**9},
        "file_bytes": sizes,
    }


def test_growth_by_hand() -> None:
    """From 1,000 to 10,000 clients the handshake takes 5 times as long, the aggregation 15 times."""
    facts = {
        "machine": {"processor": "a processor", "cores": 2},
        "date": "2026-11-28",
        "clients": {"1000": facts_of(0.2, 0.1), "10000": facts_of(1.0, 1.5)},
    }
    populations = facts["clients"]
    assert population.seconds(populations["1000"], "training") == 0.25
    assert population.growth(populations, "handshake") == pytest.approx(5)
    assert population.growth(populations, "aggregation") == pytest.approx(15)
    table, files = population.tables(facts)
    assert "Faster than the number of clients: aggregation." in table.caption
    assert ["peak memory, MB", "1000", "1000"] in files.rows and ["line of the journal, kB", "1.0", "1.0"] in files.rows
    (figure,) = population_figures.figures(facts)
    assert {"handshake (run)", "aggregation (round)"} <= {trace.name for trace in figure.chart.data}
    facts["clients"] = {"1000": facts_of(0.2, 0.1), "10000": facts_of(1.0, 1.0)}
    assert "No phase grows faster" in population.tables(facts)[0].caption


#: command lines of the processes of a run: the server, Flower's SuperLink, the workers
PROCESSES = ("flwr-simulation", "private_superlink", "ClientAppActor")


@pytest.mark.slow
def test_no_process_grows_over_200_rounds(tiny: Settings, tmp_path: Path) -> None:
    """Unique memory of each process after 50 and after 190 rounds, in which a worker gains 2 MB."""
    flat = tiny | {"num-rounds": 200, "local-steps": 1, "eval-every": 10, "path-pairs": 0, "keep-checkpoints": 2}
    run = RealRun(["simulate", *settings(flat), "--workers", "2", "--output", "run"], tmp_path)
    measured: dict[int, dict[int, tuple[str, int]]] = {}
    for goal in (50, 100, 150, 190):
        run.wait_until(lambda goal=goal: num_rounds(tmp_path / "run") >= goal, f"{goal} rounds")
        measured[goal] = {
            process.pid: (name, process.memory_full_info().uss) for name in PROCESSES for process in run.processes(name)
        }
    run.finish()
    assert len(measured[190]) >= len(PROCESSES)
    for pid, (name, memory) in measured[190].items():
        curve = [measured[goal][pid][1] / 1e6 for goal in measured]
        print(f"{name}: " + ", ".join(f"{megabytes:.1f}" for megabytes in curve) + " MB")
        assert memory - measured[50][pid][1] < 5e6, name
