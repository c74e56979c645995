"""`copra-fl deploy run` and `status`: what is submitted, under which name, and what is read from runs."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.common.config import parse_config_args

from copra_fl.cli.deploy_run import read_runs
from copra_fl.config import Config, ConfigError, csv_line
from copra_fl.deployment.layout import DeploymentLayout
from copra_fl.deployment.runs import choose_name, submit
from tests.support.command_line import run_command
from tests.support.run_folders import write_run


def test_settings_that_do_not_combine_are_rejected_before_a_run_is_submitted(tmp_path: Path) -> None:
    run_command("deploy", "init", tmp_path / "d")
    refused = run_command("deploy", "run", "smoke", tmp_path / "d", "--set", "dp-clip=1", code=2)
    assert "dp-clip = 1 needs weighting = 'equal', not 'examples'" in refused.message
    assert not list((tmp_path / "d" / "runs").iterdir())


def test_a_run_with_a_task_of_ones_own_is_checked_before_it_is_submitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command refuses a task without a head for local-training = 'head', and a task that does not exist."""
    (tmp_path / "surveys_task.py").write_text(
        "from copra_fl.tasks.causal_lm import CausalLM\n\n\nclass Surveys(CausalLM):\n    name = 'surveys'\n\n\n"
        "TASK = Surveys()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    run_command("deploy", "init", tmp_path / "d")
    sets = ("--set", "local-training=head", "--set", "partitioner=iid")
    for task, reason in (
        ("surveys_task:TASK", "does not combine with local-training = 'head': the task has no head to train"),
        ("hospital.missing", "there is no module hospital.missing that can be imported"),
    ):
        refused = run_command("deploy", "run", "smoke", tmp_path / "d", "--set", f"task={task}", *sets, code=2)
        assert reason in refused.message
    assert not list((tmp_path / "d" / "runs").iterdir())


def test_ctrl_c_detaches_from_a_run_and_says_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    run_command("deploy", "init", tmp_path / "d")
    monkeypatch.setattr("copra_fl.cli.deploy_run.find_compose", lambda layout: None)
    monkeypatch.setattr("copra_fl.cli.deploy_run.submit", interrupt)
    sets = ("--set", "dataset=texts.csv", "--set", "model=/model")
    lines = run_command("deploy", "run", "smoke", tmp_path / "d", *sets, code=130).err.splitlines()
    detached = f"detached; the run continues. Its progress: copra-fl deploy status {tmp_path / 'd'}"
    assert lines[1:] == [detached]


def test_a_run_has_a_plain_name_and_is_never_started_twice(tmp_path: Path) -> None:
    run_command("deploy", "init", tmp_path / "d")
    layout = DeploymentLayout.open(tmp_path / "d")
    for name in ("../elsewhere", "a/b", ".."):
        with pytest.raises(ConfigError, match="is a path"):
            choose_name(layout, name, resume=False)
    with pytest.raises(ConfigError, match="has no run to resume"):
        choose_name(layout, None, resume=True)
    for age, name in ((20, "older"), (10, "newer")):
        (layout.runs / name / "checkpoints").mkdir(parents=True)
        (layout.runs / name / "config.toml").write_text("num-rounds = 3\n")
        os.utime(layout.runs / name / "config.toml", (1e9 - age, 1e9 - age))
    assert choose_name(layout, None, resume=True) == "newer"
    assert choose_name(layout, "older", resume=True) == "older"
    with pytest.raises(ConfigError, match="--resume continues it"):
        choose_name(layout, "older", resume=False)
    assert choose_name(layout, None, resume=False) not in ("older", "newer")


def test_every_setting_reaches_the_run(tmp_path: Path) -> None:
    """As Flower itself reads its command line."""
    given = {
        "dataset": csv_line(["/data/a, b.csv", 'the "old" one.csv']),
        "labels": csv_line(["a, b", "c"]),
        "prompt-template": """Say "yes" or 'no' to ü={prompt}\n\t\\""",
        "script": 'ends in a backslash and a quote\\"',
        "copra-fl.quotes": """'single' and "double" \\ """,
        "copra-fl.number": 0.5,
        "rank": 8,
        "learning-rate": 1e-5,
        "rescale": True,
    }
    config = Config.from_flat(given)
    submitted: list[str] = []

    def start(*command: str) -> subprocess.Popen[str]:
        submitted.extend(command)
        return subprocess.Popen(["echo", "started run 7"], stdout=subprocess.PIPE, text=True)

    answer = json.dumps({"runs": [{"status": "finished:completed"}]})
    compose_command: Any = SimpleNamespace(start_in_superlink=start, run_in_superlink=lambda *command: answer)
    assert submit(compose_command, config, "the-run", False, lambda: None) == "finished:completed"
    read = parse_config_args(submitted[-1:])
    assert (read.pop("output"), read.pop("resume")) == ("/runs/the-run", False)
    assert Config.from_run_config(read) == config


def test_status_reads_the_progress_of_runs_from_their_journals(tmp_path: Path) -> None:
    """A run without a round, one without evaluation that is writing its next line, and runs that cannot be read.

    These are of another version, with half a configuration, with a line that lacks fields, with a pipe and links.
    """
    run_command("deploy", "init", tmp_path / "d")
    layout = DeploymentLayout.open(tmp_path / "d")
    (layout.runs / "new").mkdir()
    (layout.runs / "new" / "config.toml").write_text("num-rounds = 3\n")
    write_run(layout.runs / "running", "fedsa-lora", seed=1, num_rounds=2, finished=False)
    with (layout.runs / "running" / "journal.jsonl").open("a") as journal:
        journal.write('{"round": 3, "sec')
    write_run(layout.runs / "finished", "lora", seed=0)
    write_run(layout.runs / "old", "lora", seed=0)
    (layout.runs / "old" / "provenance.json").write_text('{"seeds": {"root": 0}}')
    unreadable = ["half", "bytes", "fields", "pipe", "link"]
    for name in unreadable:
        write_run(layout.runs / name, "lora", seed=0)
    (layout.runs / "half" / "config.toml").write_text("num-rounds = ")
    (layout.runs / "bytes" / "config.toml").write_bytes(b"\xff\xfe")
    (layout.runs / "fields" / "journal.jsonl").write_text('{"round": 1}\n')
    secret = tmp_path / "secret.json"
    for name, replace_file in (("pipe", os.mkfifo), ("link", lambda path: path.symlink_to(secret))):
        secret.write_bytes((layout.runs / name / "summary.json").read_bytes())
        (layout.runs / name / "summary.json").unlink()
        replace_file(layout.runs / name / "summary.json")
    write_run(tmp_path / "elsewhere", "lora", seed=0)
    (layout.runs / "linked").symlink_to(tmp_path / "elsewhere")
    for age, name in enumerate((*unreadable, "old", "finished", "running", "new")):
        os.utime(layout.runs / name / "config.toml", (1e9 + age, 1e9 + age))
    *damaged, old, finished, running, new = read_runs(layout)
    assert [(row["run"], row["round"]) for row in damaged] == [(name, "unreadable") for name in unreadable]
    assert (old["run"], old["round"]) == ("old", "unreadable")
    assert (finished["round"], finished["accuracy"], finished["finished"]) == ("3/3", 0.3872, True)
    assert running == {
        "run": "running", "round": "2/2", "clients": 7, "missing": "5", "accuracy": "", "finished": False
    }  # fmt: skip
    assert (new["round"], new["clients"], new["finished"]) == ("0/3", 0, False)
