"""What Prometheus is told of a deployment, read back with its own parser and held against the journals."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from copra_fl.deployment.metrics import of_nodes, of_runs
from copra_fl.deployment.nodes import Node
from copra_fl.reporting.results import load_run
from tests.support.run_folders import write_run


def told(*metrics: object) -> dict[tuple[str, str], float]:
    """(name, run or node) -> value, as Prometheus reads what is served."""
    text = generate_latest(SimpleNamespace(collect=lambda: iter(metrics))).decode()  # type: ignore[arg-type]
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {(each.name, "".join(each.labels.values())): each.value for each in samples}


def test_a_run_s_figures_are_its_journal_s(tmp_path: Path) -> None:
    write_run(tmp_path / "going", "copra", seed=1, num_rounds=2, finished=False)
    write_run(tmp_path / "done", "lora", seed=0)
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.toml").write_text("num-rounds = 7\n")
    figures = told(*of_runs([load_run(path) for path in sorted(tmp_path.iterdir())]))
    rows = [json.loads(line) for line in (tmp_path / "going" / "journal.jsonl").read_text().splitlines()]
    assert (len(rows), len(rows[-1]["missing"])) == (2, 1)

    def of(run: str) -> dict[str, float]:
        return {name.removeprefix("copra_fl_"): value for (name, label), value in figures.items() if label == run}

    going = of("going")
    assert going.pop("last_round_timestamp_seconds") == pytest.approx((tmp_path / "going").stat().st_mtime, abs=60)
    assert going == pytest.approx(
        {
            "round": 2,
            "rounds_wanted": 2,
            "finished": 0,
            "round_seconds": rows[-1]["seconds"],
            "train_loss": rows[-1]["train_loss"],
            "validation_loss": rows[-1]["validation"]["loss"],
            "validation_accuracy": rows[-1]["validation"]["accuracy"],
            "clients_trained": 7,
            "clients_missing": 1,
            "absences_total": 1,
            "bytes_up_total": rows[0]["bytes_up"] + rows[1]["bytes_up"],
            "bytes_down_total": rows[0]["bytes_down"] + rows[1]["bytes_down"],
        }
    )
    assert of("done")["finished"] == 1
    assert of("begun") == {
        "round": 0, "rounds_wanted": 7, "finished": 0, "absences_total": 0, "bytes_up_total": 0, "bytes_down_total": 0
    }  # fmt: skip


def test_nodes_are_online_or_not() -> None:
    nodes = [Node("client-0", "17", "online", "now"), Node("client-1", "18", "registered", "")]
    up = ("copra_fl_superlink_up", "")
    assert told(*of_nodes(nodes)) == {
        up: 1, ("copra_fl_node_online", "client-0"): 1, ("copra_fl_node_online", "client-1"): 0
    }  # fmt: skip
    assert told(*of_nodes(None)) == {up: 0}
