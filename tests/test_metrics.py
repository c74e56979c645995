"""Prometheus metrics of a deployment, read with Prometheus' parser and compared with the journals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from copra_fl.deployment.metrics import of_nodes, of_runs, readable_runs
from copra_fl.deployment.nodes import Node
from copra_fl.records import PrivacySpent
from copra_fl.reporting.results import load_run
from tests.support.run_folders import write_run


def scrape(*metrics: object) -> dict[tuple[str, str], float]:
    """Return (name, run or node) -> value, as Prometheus reads them."""
    text = generate_latest(SimpleNamespace(collect=lambda: iter(metrics))).decode()  # type: ignore[arg-type]
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {(sample.name, "".join(sample.labels.values())): sample.value for sample in samples}


def test_metrics_of_a_run_are_those_of_its_journal(tmp_path: Path) -> None:
    write_run(tmp_path / "going", "copra", seed=1, num_rounds=2, finished=False)
    write_run(tmp_path / "done", "lora", seed=0)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "config.toml").write_text("num-rounds = 7\n")
    scraped = scrape(*of_runs([load_run(path) for path in sorted(tmp_path.iterdir())]))
    rounds = [json.loads(line) for line in (tmp_path / "going" / "journal.jsonl").read_text().splitlines()]
    assert (len(rounds), len(rounds[-1]["missing"])) == (2, 1)

    def of(run: str) -> dict[str, float]:
        return {name.removeprefix("copra_fl_"): value for (name, label), value in scraped.items() if label == run}

    going = of("going")
    assert going.pop("last_round_timestamp_seconds") == (tmp_path / "going" / "journal.jsonl").stat().st_mtime
    assert going == pytest.approx(
        {
            "round": 2,
            "num_rounds": 2,
            "finished": 0,
            "round_seconds": rounds[-1]["seconds"],
            "train_loss": rounds[-1]["train_loss"],
            "validation_loss": rounds[-1]["validation"]["loss"],
            "validation_accuracy": rounds[-1]["validation"]["accuracy"],
            "clients_trained": 7,
            "clients_missing": 1,
            "missing_updates_total": 1,
            "bytes_up_total": rounds[0]["bytes_up"] + rounds[1]["bytes_up"],
            "bytes_down_total": rounds[0]["bytes_down"] + rounds[1]["bytes_down"],
        }
    )
    assert of("done")["finished"] == 1
    assert of("new") == {
        "round": 0, "num_rounds": 7, "finished": 0, "missing_updates_total": 0, "bytes_up_total": 0,
        "bytes_down_total": 0,
    }  # fmt: skip


def test_evaluation_and_privacy_are_the_last_known(tmp_path: Path) -> None:
    """A round without evaluation leaves the accuracy of the round before; epsilon is the last round's."""
    write_run(tmp_path / "run", "lora", seed=0, num_rounds=2, finished=False)
    run = load_run(tmp_path / "run")
    privacy = PrivacySpent(epsilon=1.5, server_epsilon=2.5, delta=1e-5, sampling_rate=0.5, noise_multiplier=1, clip=0.1)
    assert run.journal[0].validation is not None
    last = run.journal[1].model_copy(update={"validation": None, "privacy": privacy})
    scraped = scrape(*of_runs([replace(run, journal=[run.journal[0], last])]))
    assert scraped["copra_fl_validation_accuracy", "run"] == pytest.approx(run.journal[0].validation.accuracy)
    assert scraped["copra_fl_privacy_epsilon", "run"] == 1.5
    assert scraped["copra_fl_privacy_server_epsilon", "run"] == 2.5


def test_a_bad_run_hides_no_other(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Half a line of a full disk costs that line; a line without fields, or bytes that are no text, cost the run."""
    for name in ("bytes", "fields", "torn", "whole"):
        write_run(tmp_path / name, "lora", seed=0, num_rounds=2, finished=False)
    (tmp_path / "bytes" / "config.toml").write_bytes(b"\xff")
    (tmp_path / "fields" / "journal.jsonl").write_text('{"round": 1}\n')
    with (tmp_path / "torn" / "journal.jsonl").open("a") as journal:
        journal.write('{"round": 3, "sec')
    scraped = scrape(*of_runs(list(readable_runs(tmp_path))))
    rounds = {run: value for (name, run), value in scraped.items() if name == "copra_fl_round"}
    assert rounds == {"torn": 2, "whole": 2}
    assert "run bytes cannot be read" in caplog.text and "run fields cannot be read" in caplog.text


def test_nodes_are_online_or_not() -> None:
    nodes = [Node("client-0", "17", "online", "now"), Node("client-1", "18", "registered", "")]
    up = ("copra_fl_superlink_up", "")
    assert scrape(*of_nodes(nodes)) == {
        up: 1, ("copra_fl_node_online", "client-0"): 1, ("copra_fl_node_online", "client-1"): 0
    }  # fmt: skip
    assert scrape(*of_nodes(None)) == {up: 0}
