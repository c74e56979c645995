"""Time a federation by phase: the server's own steps, with all nodes in this process, so that nothing else is counted.

    python -m experiments.bench.phases CONFIG.toml FOLDER NUM_NODES     in the folder of the apps

Writes ``phases.json``: CPU seconds and seconds of each phase (one number for each time that it ran), and the peak
memory of the process up to the end of each phase. Only one thread computes, and nothing waits but for the disk, so CPU
seconds are the seconds of an idle machine. A message is pickled and unpickled on its way, as Ray does.
"""

import json
import pickle
import resource
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import torch
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from clients.app import app as client_app
from copra_fl.config import Config
from copra_fl.data.federated import load_data
from copra_fl.models.build import load_processor
from copra_fl.reporting.report import write as write_report
from server.audit import AuditLog
from server.federation import open_evaluator, run_context, settle, write_provenance
from server.handshake import register_nodes
from server.journal import Journal
from server.messaging import exchange
from server.rounds import RoundEvaluation, RoundTraining
from server.run_records import round_record, summarize
from server.strategy import CohortStrategy

#: arguments of the shortest run, with paths that tests/test_experiments.py makes
TINY = "{config} {folder} 2"


class Phases:
    """Times of each phase, and the peak memory in bytes of this process up to the end of its last time."""

    def __init__(self) -> None:
        self.cpu_seconds: dict[str, list[float]] = {}
        self.seconds: dict[str, list[float]] = {}
        self.peak_memory: dict[str, int] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        started, cpu_started = time.perf_counter(), time.process_time()
        yield
        self.seconds.setdefault(phase, []).append(time.perf_counter() - started)
        self.cpu_seconds.setdefault(phase, []).append(time.process_time() - cpu_started)
        unit = 1 if sys.platform == "darwin" else 1024
        self.peak_memory[phase] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class ProcessGrid(Grid):
    """Nodes in this process that run `app`; each message is answered when it is sent.

    There is a node for each of `node_configs`, its configuration in addition to partition-id and num-partitions: node
    100 + i has partition-id i.
    """

    def __init__(self, node_configs: Sequence[Mapping[str, str | int]], app: ClientApp = client_app) -> None:
        TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1  # messages need it
        self.app = app
        self.replies: dict[str, Message] = {}
        number = len(node_configs)
        self.contexts = {
            100 + i: Context(1, 100 + i, {"partition-id": i, "num-partitions": number} | config, RecordDict(), {})
            for i, config in enumerate(node_configs)
        }

    def get_node_ids(self) -> Iterable[int]:
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(uuid4())
            self.replies[message.metadata.message_id] = self.answer(message)
            yield message.metadata.message_id

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self.replies.pop(number) for number in list(message_ids) if number in self.replies]

    def answer(self, message: Message) -> Message:
        return self.app(message, self.contexts[message.metadata.dst_node_id])

    def set_run(self, run: object) -> None: ...
    def run(self) -> None: ...
    def create_message(self, *args: object, **kwargs: object) -> None: ...
    def get_nodes(self) -> None: ...
    def send_and_receive(self, messages: object, *, timeout: float | None = None) -> None: ...


class PicklingGrid(ProcessGrid):
    """Pickles what a message carries on both ways, as Ray does."""

    def answer(self, message: Message) -> Message:
        message.content = through_pickle(message.content)
        reply = super().answer(message)
        reply.content = through_pickle(reply.content)
        return reply


def through_pickle(content: RecordDict) -> RecordDict:
    return pickle.loads(pickle.dumps(content))


def run(config: Config, directory: Path, num_nodes: int) -> Phases:
    """Run the federation of `config` in `directory`, as `server.federation.run` does, phase by phase."""
    phase, grid = Phases(), PicklingGrid([{}] * num_nodes)
    for name in ("encode and split the data", "open the data again"):
        with phase(name):
            load_data(config, load_processor(config.model))
    journal = Journal(directory)
    audit, settled = AuditLog(directory, journal.run), settle(config)
    with phase("handshake"):
        nodes = register_nodes(grid, settled, audit)
    evaluator = open_evaluator(settled)
    state = journal.resume() or evaluator.start_state()
    write_provenance(journal, evaluator)
    with phase("register the clients"):
        strategy = CohortStrategy(run_context(journal, evaluator), nodes, state)
    for server_round in range(1, config.federation.num_rounds + 1):
        started = time.perf_counter()
        with phase("sampling and placement"):
            request, messages = strategy.configure_train(server_round)
        with phase("training"):
            replies = exchange(grid, messages, config.federation.round_timeout_s)
        with phase("aggregation"):
            result = strategy.aggregate_train(request, replies)
        training = RoundTraining(request, result, time.perf_counter() - started, 0, 0)
        with phase("checkpoint and journal"):
            record = round_record(settled, training, evaluator.model.gates.names, RoundEvaluation())
            journal.record(record, strategy.state)
    with phase("evaluation by the clients"):
        request, messages = strategy.configure_evaluate(config.federation.num_rounds)
        replies = exchange(grid, messages, config.federation.round_timeout_s)
        evaluations = strategy.aggregate_evaluate(request, replies)
    with phase("summary"):
        journal.write_summary(summarize(journal.read(), None, evaluator, evaluations, None, None, (None, None)))
    with phase("report"):
        write_report(directory)
    return phase


if __name__ == "__main__":
    path, folder, number = sys.argv[1:]
    torch.set_num_threads(1)  # as a worker with one core
    directory = Path(folder)
    (directory / "config.toml").write_bytes(Path(path).read_bytes())
    phases = run(Config.from_toml(directory / "config.toml"), directory, int(number))
    sizes = {name: (directory / name).stat().st_size for name in ("journal.jsonl", "summary.json", "report.html")}
    facts = {**vars(phases), "file_bytes": sizes}
    (directory / "phases.json").write_text(json.dumps(facts), encoding="utf-8")
