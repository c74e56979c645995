"""`copra-fl simulate` and `compare` on real Flower and Ray: finished, killed, resumed, with a decoy package."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import psutil
import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModel

from copra_fl.config import Config
from copra_fl.simulation.progress import STARTING, watch
from copra_fl.simulation.superlink import RunFailed, Workers, ray_variables, superlink
from tests.support.federations import assert_equal, final_adapter
from tests.support.local_grid import run_federation
from tests.support.real_runs import RealRun, num_rounds, settings
from tests.support.tiny import Settings

ROUNDS = 8


@pytest.fixture(scope="module")
def long(tiny: Settings) -> Settings:
    """Settings of a run that a test can interrupt between its rounds of half a second or more."""
    return tiny | {"num-rounds": ROUNDS, "local-steps": 40, "batch-size": 8, "optimizer-state": "client"}


@pytest.fixture(scope="module")
def undisturbed(long: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the same federation on two nodes in this process, without Ray, a SuperLink, or any fault."""
    return run_federation(dict(long), tmp_path_factory.mktemp("undisturbed") / "run")


def test_killed_and_resumed_ends_in_the_same_adapter_which_peft_opens(
    undisturbed: Path, long: Settings, tmp_path: Path
) -> None:
    """SIGKILL of the command ends its SuperLink, server app and workers too; --resume alone finishes the run.

    The data file is a path relative to the user's folder, though Flower runs in another one.
    """
    os.link(str(long["dataset"]), tmp_path / "mine.csv")
    directory = tmp_path / "run"
    run = RealRun(
        ["simulate", *settings(long | {"dataset": "mine.csv"}), "--output", "run", "--workers", "2"], tmp_path
    )
    run.wait_until(lambda: num_rounds(directory) >= 1, "round 1")
    run.process.send_signal(signal.SIGKILL)
    run.process.wait()
    run.wait_until(lambda: not run.processes(), "the whole family gone")
    assert 1 <= num_rounds(directory) < ROUNDS and not (directory / "summary.json").exists()
    out, _ = RealRun(
        ["simulate", "--output", str(directory), "--resume", "--workers", "2", "--json"], tmp_path
    ).finish()

    expected, last = final_adapter(undisturbed), final_adapter(directory)
    assert_equal(last, expected)
    test = json.loads(out)["test"]
    assert test == json.loads((undisturbed / "summary.json").read_text())["test"] and test["accuracy"] > 0.5
    encoder = PeftModel.from_pretrained(AutoModel.from_pretrained(str(long["model"])), str(directory / "adapter"))
    for name, parameter in encoder.named_parameters():
        if ".lora_" in name:
            assert torch.equal(parameter, last[name.replace(".default.", ".")])
    assert torch.equal(load_file(directory / "adapter" / "head.safetensors")["weight"], last["head.weight"])
    present = {path.name for path in directory.iterdir()}
    assert present >= {"config.toml", "provenance.json", "journal.jsonl", "checkpoints", "adapter", "report.html"}
    assert "DEPRECATED FEATURE" not in (directory / "flower.log").read_text()
    assert not [path for path in directory.rglob("*") if path.suffix in (".pkl", ".pt", ".bin", ".pth", ".partial")]


@pytest.mark.slow
def test_a_killed_worker_ends_the_run_with_one_message_and_all_checkpoints(long: Settings, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    run = RealRun(["simulate", *settings(long), "--output", str(directory), "--workers", "1"], tmp_path)
    run.wait_until(lambda: num_rounds(directory) >= 1, "round 1")
    worker = run.processes("ray::ClientAppActor")[0]
    assert worker.nice() == psutil.Process().nice(), "it has the priority of the command"
    worker.kill()
    _, err = run.finish(code=1)
    assert "failed in round" in err and "Traceback" not in err
    assert len(list((directory / "checkpoints").glob("*.safetensors"))) == num_rounds(directory) >= 1


def test_a_given_niceness_of_workers_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """RAY_worker_niceness in the command's environment counts; a cluster has its own."""
    monkeypatch.setenv("RAY_worker_niceness", "15")
    assert ray_variables(tmp_path, None, [Config()])["RAY_worker_niceness"] == "15"
    assert "RAY_worker_niceness" not in ray_variables(tmp_path, "10.0.0.5:6379", [Config()])


@pytest.mark.parametrize(("quantization", "imports_early"), [("none", True), ("4bit", False)])
def test_workers_that_need_bitsandbytes_import_it_after_ray_has_given_them_a_gpu(
    tmp_path: Path, quantization: str, imports_early: bool
) -> None:
    """Ray runs the hook before it sets CUDA_VISIBLE_DEVICES, and CUDA has read that once bitsandbytes is imported."""
    configs = [Config(), Config.from_flat({"quantization": quantization})]
    variables = ray_variables(tmp_path, None, configs)
    runtime_env = json.loads(variables["RAY_JOB_CONFIG_JSON_ENV_VAR"])["runtime_env"]
    assert ("worker_process_setup_hook" in runtime_env) == imports_early


@pytest.mark.slow
def test_a_decoy_clients_folder_is_rejected(long: Settings, tmp_path: Path) -> None:
    """Ray's workers import from the SuperLink's working directory first, so they run a clients/ folder there; the
    handshake compares its digest with the server's."""
    original = Path(__file__).parent.parent / "clients"
    config = Config.from_flat(long)
    with superlink(tmp_path / "flower.log") as link:
        decoy = link.home / "empty" / "clients"
        decoy.mkdir()
        for path in original.glob("*.py"):
            (decoy / path.name).write_text(path.read_text() + "\n# differs from the server's file\n")
        run_config = config.to_flat() | {"output": str(tmp_path / "run"), "resume": False}
        process = link.start_run(run_config, Workers.share(1, num_clients=6))
        with pytest.raises(RunFailed, match="runs other sources of copra_fl and clients"):
            watch(link, process, 1, Console(stderr=True))


@pytest.mark.slow
def test_a_run_goes_on_when_flwr_run_has_lost_its_connection(tiny: Settings, tmp_path: Path) -> None:
    """As on a machine whose cores other programs need; killed before the server app has begun."""
    config = Config.from_flat(tiny)
    with superlink(tmp_path / "flower.log") as link:
        run_config = config.to_run_config() | {"output": str(tmp_path / "run"), "resume": False}
        process = link.start_run(run_config, Workers.share(1, num_clients=6))
        RealRun.wait_until(lambda: link.status() in STARTING, "the run is submitted")
        process.kill()
        process.wait()
        assert not (tmp_path / "run").exists()
        watch(link, process, 1, Console(stderr=True))
    assert (tmp_path / "run" / "summary.json").exists()


@pytest.mark.slow
def test_200_clients_on_2_workers(long: Settings, tmp_path: Path) -> None:
    many = {"num-clients": 200, "fraction-clients": 0.2, "local-steps": 1, "num-rounds": 1, "partitioner": "iid"}
    out, _ = RealRun(
        ["simulate", *settings(long | many), "--output", "run", "--workers", "2", "--json"], tmp_path
    ).finish()
    rows = [json.loads(line) for line in (tmp_path / "run" / "journal.jsonl").read_text().splitlines()]
    assert [len(row["clients"]) for row in rows] == [40]
    assert json.loads(out)["rounds"] == 1


@pytest.mark.slow
@pytest.mark.parametrize(("stop", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130), (signal.SIGTERM, 130)])
def test_a_stop_leaves_no_process_and_the_resumed_comparison_is_bitwise_equal(
    undisturbed: Path, long: Settings, stop: signal.Signals, code: int, tmp_path: Path
) -> None:
    """2 methods, stopped in round 2 of the second run, which is the undisturbed one; --resume alone finishes it.

    SIGKILL of the command ends its SuperLink, server app and workers too.
    """
    shared = {key: value for key, value in long.items() if key != "local-training"}
    arguments = ["compare", *settings(shared), "--methods", "head,copra", "--seeds", "0", "--output", "both"]
    run = RealRun([*arguments, "--workers", "2"], tmp_path)
    first, second = (tmp_path / "both" / f"{method}-seed0" for method in ("head", "copra"))
    run.wait_until(lambda: num_rounds(second) >= 1 or run.process.poll() is not None, "round 1 of the second run")
    run.process.send_signal(stop)
    _, err = run.finish(code)
    assert ("--resume" in err) == (code == 130)
    assert 1 <= num_rounds(second) < ROUNDS and not (second / "summary.json").exists()
    before = (first / "summary.json").stat().st_mtime
    out, _ = RealRun(["compare", "--output", "both", "--resume", "--json", "--workers", "2"], tmp_path).finish()
    assert_equal(final_adapter(second), final_adapter(undisturbed))
    tests = [json.loads((folder / "summary.json").read_text())["test"] for folder in (second, undisturbed)]
    assert tests[0] == tests[1]
    summary = json.loads(out)
    assert (first / "summary.json").stat().st_mtime == before, "the finished run is not repeated"
    values = {name: len(method["test_accuracy"]["values"]) for name, method in summary["methods"].items()}
    assert values == {"head": 1, "copra": 1}
    assert (tmp_path / "both" / "report.html").exists()
