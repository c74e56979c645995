"""The papers' experiments: adapters trained by Trainer, their measures against plain PEFT, the jackknife by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from copra_fl.adapters.state import Adapter
from copra_fl.models.build import build_model
from copra_fl.probes.open_run import OpenRun
from copra_fl.training.evaluation import evaluate
from experiments import papers
from experiments.papers_summary import pseudo_values, summarise
from tests.support.tiny import NUM_LAYERS, Settings

RATE = 0.02
KEPT = ("model", "dataset", "rank", "max-length", "server-validation-examples", "test-examples", "device", "dtype")


@pytest.fixture(scope="module")
def settings(tiny: Settings) -> Settings:
    return {key: tiny[key] for key in KEPT} | {"local-steps": 12, "batch-size": 8, "lora-alpha": 8.0}


@pytest.fixture(scope="module")
def study(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> papers.Study:
    return papers.Study.open(settings, tmp_path_factory.mktemp("papers"))


@pytest.fixture(scope="module")
def runs(study: papers.Study) -> list[OpenRun]:
    """Train two adapters from different starts."""
    runs = [study.run("lora", RATE, seed) for seed in (0, 1)]
    for run in runs:
        papers.ensure_trained(run)
    return runs


def by_peft(study: papers.Study, adapter: Adapter) -> float:
    """Return the test accuracy by plain PEFT, not stacked."""
    model = build_model(study.base.model, "layer", len(study.data.label_names), seed=7)
    (metrics,) = evaluate(model, [adapter], study.data.examples, study.data.test, 60)
    return metrics["accuracy"]


def equal(a: Adapter, b: Adapter) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def test_with_p_1_the_callback_changes_nothing_and_with_p_0_it_does(study: papers.Study, runs: list[OpenRun]) -> None:
    always = replace(study, base=study.base.changed(p0=1.0))
    assert equal(papers.train(always.run("copra", RATE, 0), callback=True), runs[0].adapter)
    assert not equal(papers.train(study.run("copra", RATE, 0), callback=True), runs[0].adapter)


def test_each_seed_has_its_own_start_of_adapter_and_head_and_training_moves_both(
    study: papers.Study, runs: list[OpenRun]
) -> None:
    starts = [build_model(study.base.model, "layer", 3, seed).read_adapter() for seed in (0, 1)]
    for name in ("head.weight", next(name for name in starts[0] if "lora_A" in name)):
        assert not torch.equal(starts[0][name], starts[1][name])
    for start, run in zip(starts, runs, strict=True):
        assert not any(torch.equal(start[name], run.adapter[name]) for name in start)


def test_the_base_is_in_eval_mode_in_training(study: papers.Study) -> None:
    model = papers.ForTrainer(build_model(study.base.model, "layer", 3, 0)).train()
    assert not any(module.training for module in model.modules() if isinstance(module, torch.nn.Dropout))


def test_measures_of_one_adapter(study: papers.Study, runs: list[OpenRun]) -> None:
    run = runs[0]
    measures = papers.measure_adapter(run)
    assert measures["alone"] == by_peft(study, run.adapter)
    values = [measures[f"Shapley: layer {layer}"] for layer in range(NUM_LAYERS)]
    assert sum(values) == pytest.approx(measures["alone"] - measures["head alone"])
    for name, kept in {"kept: every other layer": (0, 2), "kept: high third": (2,), "head alone": ()}.items():
        off = [f".layer.{layer}." for layer in range(NUM_LAYERS) if layer not in kept]
        cut = {
            tensor: torch.zeros_like(value) if "lora_B" in tensor and any(layer in tensor for layer in off) else value
            for tensor, value in run.adapter.items()
        }
        assert measures[name] == by_peft(study, cut)
    upper = abs(values[-1]) / np.abs(values).sum()  # one of three layers
    assert measures["Shapley: share of the uppermost third"] == pytest.approx(upper)
    assert measures["Shapley: share of the largest third"] == pytest.approx(max(np.abs(values)) / np.abs(values).sum())


def test_measures_of_two_adapters(study: papers.Study, runs: list[OpenRun]) -> None:
    measures = papers.measure_group(runs)
    a, b = (run.adapter for run in runs)
    middle = {name: (a[name] + b[name]) / 2 for name in a}
    assert measures["factor path: accuracy at the midpoint"] == by_peft(study, middle)
    ends = (by_peft(study, a) + by_peft(study, b)) / 2
    assert measures["factor path: midpoint gap"] == pytest.approx(by_peft(study, middle) - ends)
    heads = {name: torch.zeros_like(value) if "lora_B" in name else value for name, value in middle.items()}
    assert measures["heads alone, averaged"] == by_peft(study, heads)
    best = measures["merge of 2: average of products, best rank r"]
    assert measures["merge of 2: average of products, best rank r, gap"] == pytest.approx(best - ends)


@pytest.mark.parametrize("number", [2, 3])
def test_an_adapter_merged_with_itself_is_itself(study: papers.Study, runs: list[OpenRun], number: int) -> None:
    measures, alone = papers.measure_group([runs[0]] * number), by_peft(study, runs[0].adapter)
    accuracies = [value for name, value in measures.items() if "midpoint" in name and "gap" not in name]
    accuracies += [value for name, value in measures.items() if "merge of" in name and "average of" in name
                   and "gap" not in name]  # fmt: skip
    assert accuracies == [alone] * 3
    assert all(value == pytest.approx(0, abs=1e-6) for name, value in measures.items() if "barrier" in name)


def test_jackknife_by_hand() -> None:
    """n = 3 seeds, m = 3. Without seed 0 only the pair of 6 remains: 3*3 - 2*6 = -3; without 1: 5, without 2: 7."""
    pairs = {(0, 1): 1.0, (0, 2): 2.0, (1, 2): 6.0}
    assert pseudo_values(pairs, (0, 1, 2)) == [-3.0, 5.0, 7.0]
    assert pseudo_values({(0, 1, 2): 4.0}, (0, 1, 2)) == [4.0], "one group has all seeds"
    measured = {"lora": {"pairs": pairs}, "copra": {"pairs": {pair: value + 0.5 for pair, value in pairs.items()}}}
    estimates = summarise(measured, (0, 1, 2))["pairs"]
    assert estimates["lora"]["mean"] == 3 and estimates["lora"]["interval"] is not None
    assert estimates["difference"]["mean"] == 0.5 and estimates["difference"]["interval"] == (0.5, 0.5)


def test_train_then_measure_without_training_twice(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(papers, "RATES", (1e-3, RATE))
    options = ["--output", str(tmp_path / "runs"), "--results", str(tmp_path / "results"), "--seeds", "0,1"]
    options += ["--tuning-seeds", "10", "--date", "today", "--texts", "50"]
    options += [f"--set={key}={value}" for key, value in settings.items()]
    papers.main(["train", *options])
    trained = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*.safetensors")}
    assert len(trained) == 2 * (2 + 2)
    papers.main(["measure", *options])
    assert trained == {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*.safetensors")}

    facts = json.loads((tmp_path / "results" / "papers-today.json").read_text(encoding="utf-8"))
    assert facts["examples"]["test"] == 50
    for method, tuning in facts["tuning"].items():
        assert tuning[f"{facts['rates'][method]:g}"] == max(tuning.values())
    alone = facts["measures"]["alone"]
    differences = np.subtract(alone["copra"]["values"], alone["lora"]["values"])
    assert alone["difference"]["mean"] == pytest.approx(differences.mean())
    table = (tmp_path / "results" / "papers-today.md").read_text(encoding="utf-8")
    assert f"| alone | {100 * alone['lora']['mean']:.1f} |" in table and "59.6 → 69.7" not in table  # no triple

    with pytest.raises(ValueError, match="trained with other settings: local-steps: 12 -> 13; use another --output"):
        papers.main(["train", *options, "--set", "local-steps=13"])
