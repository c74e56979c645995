"""Repair after pruning, the rival of elastic adapters: it continues a run, and trains nothing but what is kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from copra_fl.adapters.state import parts
from copra_fl.probes import pruned_adapters
from copra_fl.probes.open_run import open_run
from experiments import elastic
from tests.support.federations import finished_comparison, finished_run
from tests.support.tiny import NUM_LAYERS, Settings
from tests.support.worlds import relative_error

PLAIN: Settings = {"local-training": "lora", "num-clients": 3, "client-examples": 32, "batch-size": 8, "local-steps": 4}


def test_a_repair_of_all_layers_is_another_round_of_the_federation(tiny: Settings, tmp_path: Path) -> None:
    """Oracle: the same federation with one more round, over Flower."""
    two, three = (
        open_run(finished_run(tiny | PLAIN | {"num-rounds": number}, tmp_path / f"{number}")) for number in (2, 3)
    )
    modules = pruned_adapters.adapted_modules(two.adapter)
    adapter, accuracy = elastic.repair(two, modules, rounds=1)
    assert relative_error(adapter, three.adapter) < 1e-5
    assert accuracy == three.score([three.adapter], "test")[0]["accuracy"]


def test_a_repair_trains_only_the_layers_that_are_kept(tiny: Settings, tmp_path: Path) -> None:
    run = open_run(finished_run(tiny | PLAIN, tmp_path / "run"))
    kept = list(pruned_adapters.layers(run.adapter).values())[1]
    adapter, _ = elastic.repair(run, kept, rounds=1)
    assert {name.partition(".lora_")[0] for name in parts(adapter, "AB")} == set(kept)
    assert not any(adapter[name].equal(run.adapter[name]) for name in adapter)


def test_the_command_writes_scores_and_keeps_those_of_each_run(
    tiny: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "tweets" / "12x10" / "test"
    comparison = finished_comparison(tiny | PLAIN, ["lora", "copra"], [0], folder)
    arguments = [str(comparison), "--methods", "lora,copra", "--seeds", "0", "--subsets", "2", "--date", "20260101"]
    elastic.main([*arguments, "--results", str(tmp_path)])
    facts = json.loads((tmp_path / "elastic-tweets-20260101.json").read_text())
    run = open_run(comparison / "copra-seed0")
    [lora], [copra] = facts["measured"]["lora"], facts["measured"]["copra"]
    assert lora["repaired"]["1.0"] == lora["as trained"]["1.0"] and "repaired" not in copra
    assert (comparison / "lora-seed0" / "elastic-2-repaired.json").exists()
    assert copra["as trained"]["1.0"] == run.score([run.adapter], "test")[0]["accuracy"]
    assert capsys.readouterr().out.count("\n| copra |") == 1
    assert len(pruned_adapters.layers(run.adapter)) == NUM_LAYERS
