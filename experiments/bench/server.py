"""A ServerApp as Flower's users write it: Flower's FedAvg over all nodes, once for each phase of the benchmark.

`output` is a folder with ``comparison.toml`` (the phases), a ``config.toml`` for each, and ``start.safetensors``. The
app writes ``rounds.json`` (times and bytes of each round) and the adapter after each, ``PHASE-ROUND.safetensors``.
"""

import json
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from torch import Tensor

from copra_fl.bench.sampling import TimedRound
from copra_fl.config import Config, read_toml
from copra_fl.events import emit
from copra_fl.tensor_files import read_tensors, write_tensors
from copra_fl.wire import num_bytes

app = ServerApp()


class TimedFedAvg(FedAvg):
    """FedAvg that records time and bytes of its rounds, and stops if a client fails instead of averaging the others."""

    def __init__(self, num_clients: int) -> None:
        super().__init__(fraction_evaluate=0.0, min_train_nodes=num_clients, min_available_nodes=num_clients)
        self.rounds: list[TimedRound] = []
        self.adapters: list[dict[str, Tensor]] = []
        self._start, self._bytes_down = 0.0, 0

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        self._start = time.time()
        messages = list(super().configure_train(server_round, arrays, config, grid))
        self._bytes_down = sum(num_bytes(message.content) for message in messages)
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        replies = list(replies)
        for reply in replies:
            if reply.has_error():
                raise RuntimeError(f"a client failed: {reply.error.reason}")
        arrays, metrics = super().aggregate_train(server_round, replies)
        bytes_up = sum(num_bytes(reply.content) for reply in replies)
        self.rounds.append(TimedRound(self._start, time.time(), self._bytes_down, bytes_up))
        self.adapters.append(arrays.to_torch_state_dict())
        return arrays, metrics


@app.main()
def main(grid: Grid, context: Context) -> None:
    folder = Path(str(context.run_config["output"]))
    start, _ = read_tensors(folder / "start.safetensors")
    rounds = {}
    for phase in read_toml(folder / "comparison.toml")["methods"]:
        path = folder / f"{phase}-seed0" / "config.toml"
        config = Config.from_toml(path)
        strategy = TimedFedAvg(config.data.num_clients)
        strategy.start(
            grid,
            initial_arrays=ArrayRecord(start),
            num_rounds=config.federation.num_rounds,
            train_config=ConfigRecord({"config": str(path)}),
        )
        for number, adapter in enumerate(strategy.adapters, start=1):
            write_tensors(folder / f"{phase}-{number}.safetensors", adapter, {})
        rounds[phase] = [asdict(timed) for timed in strategy.rounds]
    (folder / "rounds.json").write_text(json.dumps(rounds), encoding="utf-8")
    emit("finished", accuracy=None)
