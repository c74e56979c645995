"""Measure the overhead of a round in a deployment, with and without a warm process on each node (`warm-process`).

    python -m experiments.deployment

A SuperLink and two SuperNodes run as processes on this machine, without TLS. They train the recipe `smoke` several
times, in turn on nodes without and with `warm-process`, which start anew for each run. The overhead of a round is its
seconds in the journal, from sending the train messages to the last reply, minus the training seconds of its slowest
client. The first round of a run, which always loads model and data, is reported separately. The query before it is not
measured.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median

from copra_fl.config import toml_value
from copra_fl.records import RoundRecord
from copra_fl.simulation.recipes import Recipe
from copra_fl.simulation.superlink import copy_app, free_port

SCRIPTS = Path(sys.executable).parent
NUM_NODES = 2
#: arguments of the shortest run, with paths that tests/test_experiments.py makes
TINY = "--runs 1 --rounds 2"
#: kind of node -> seconds of warm-process
WARM_PROCESS = {"cold": 0, "warm": 600}


def environment(home: Path) -> dict[str, str]:
    return os.environ | {
        "PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}",
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    }


@contextmanager
def running(folder: Path, name: str, *command: str) -> Iterator[None]:
    """Run a process of Flower with a separate FLWR_HOME during the block."""
    home = folder / name
    home.mkdir(exist_ok=True)
    with open(folder / f"{name}.log", "ab") as log:
        process = subprocess.Popen(
            [str(SCRIPTS / command[0]), *command[1:]], env=environment(home), cwd=home, stdin=subprocess.DEVNULL,
            stdout=log, stderr=log,
        )  # fmt: skip
        try:
            yield
        finally:
            process.terminate()
            process.wait()


def wait_for(url: str) -> None:
    for _ in range(600):
        with suppress(OSError), urllib.request.urlopen(url, timeout=1):
            return
        time.sleep(0.1)
    raise TimeoutError(f"{url} does not answer")


def run(folder: Path, app: Path, port: int, kind: str, name: str, rounds: int) -> Iterator[float]:
    """Yield the overhead of each round of a run on nodes of this kind, in seconds."""
    output, home = folder / name, folder / "operator"
    recipe = Recipe.read("smoke", [f"num-rounds={rounds}", "num-clients=0", f"min-nodes={NUM_NODES}"])
    settings = recipe.config().to_flat() | {"output": str(output)}
    overrides = folder / "run-config.toml"
    overrides.write_text("".join(f"{key} = {toml_value(value)}\n" for key, value in settings.items()), "utf-8")
    nodes = [
        running(
            folder, f"node-{number}", "flower-supernode", "--insecure", f"--superlink=127.0.0.1:{port}",
            f"--port={free_port()}", "--node-config",
            f"partition-id={number} num-partitions={NUM_NODES} warm-process={WARM_PROCESS[kind]}",
        )
        for number in range(NUM_NODES)
    ]  # fmt: skip
    command = [SCRIPTS / "flwr", "run", app, "deployment", "--stream", "--run-config", overrides]
    with nodes[0], nodes[1], open(folder / "flwr-run.log", "ab") as log:
        subprocess.run(command, env=environment(home), stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=True)
    for line in (output / "journal.jsonl").read_text("utf-8").splitlines():
        record = RoundRecord.from_json(line)
        yield record.seconds - max(client.seconds for client in record.clients)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3, help="runs of each kind of node")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each run")
    options = parser.parse_args()
    overheads: dict[str, list[list[float]]] = {kind: [] for kind in WARM_PROCESS}
    with tempfile.TemporaryDirectory(prefix="copra-fl-") as temporary:
        folder, port = Path(temporary), free_port()
        app, home = folder / "app", folder / "operator"
        app.mkdir(), home.mkdir()
        copy_app(app)
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "deployment"\n\n[superlink.deployment]\naddress = "127.0.0.1:{port}"\n'
            "insecure = true\n"
        )
        with running(folder, "superlink", "flower-superlink", "--insecure", "--host=127.0.0.1", f"--port={port}"):
            wait_for(f"http://127.0.0.1:{port}/health")
            for number in range(options.runs):
                for kind in WARM_PROCESS:
                    seconds = list(run(folder, app, port, kind, f"{kind}-{number}", options.rounds))
                    print(kind, *(f"{overhead:.1f}" for overhead in seconds), flush=True)
                    overheads[kind].append(seconds)
    print("\noverhead of a round in seconds: median (minimum to maximum)")
    for rounds in ("first", "later"):
        medians = {}
        for kind, runs in overheads.items():
            seconds = [overhead for run in runs for overhead in (run[:1] if rounds == "first" else run[1:])]
            medians[kind] = median(seconds)
            print(
                f"{rounds}, {kind}: {medians[kind]:.1f} ({min(seconds):.1f} to {max(seconds):.1f}), n = {len(seconds)}"
            )
        print(f"{rounds}, cold / warm: {medians['cold'] / medians['warm']:.1f}")


if __name__ == "__main__":
    main()
