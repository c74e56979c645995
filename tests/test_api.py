"""The Python API: arguments, tables and models in memory, frames and figures; real runs, one of them interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

import copra_fl
from copra_fl import Comparison, Config, ConfigError, ResultsError, Run, compare, load_comparison, load_run, simulate
from copra_fl.api.inputs import as_settings, lora_settings, store_model, store_table
from copra_fl.api.runs import open_recipe
from copra_fl.data.leftovers import in_cache
from copra_fl.files import cache_dir
from copra_fl.models.build import lora_config
from copra_fl.simulation.comparison import write_plan
from copra_fl.sources.tables import file_table
from tests.support.documents import ROOT
from tests.support.real_runs import HANG_SECONDS, RealRun
from tests.support.run_folders import write_comparison, write_run
from tests.support.tiny import Settings

# --- arguments ----------------------------------------------------------------------------


def test_keyword_arguments_are_settings() -> None:
    given = as_settings(
        {
            "learning_rate": 0.1,
            "labels": ["a", "b, c"],
            "client_ranks": (4, 2),
            "trimmed_mean": {"trim_fraction": 0.1},
            "dataset": Path("notes.csv"),
            "rank": np.int64(4),
        }
    )
    assert given == {
        "learning-rate": 0.1,
        "labels": 'a,"b, c"',
        "client-ranks": "4,2",
        "trimmed-mean.trim-fraction": 0.1,
        "dataset": "notes.csv",
        "rank": 4,
    }
    assert type(given["rank"]) is int and Config.from_flat(given).data.label_list == ["a", "b, c"]


def test_recipes_of_all_kinds() -> None:
    config = Config.from_flat({"rank": 3})
    assert open_recipe(config, {"seed": 2}).config() == config.changed(seed=2)
    assert open_recipe({"learning_rate": 0.5}, {}).config().training.learning_rate == 0.5
    smoke = open_recipe("smoke", {}).config()
    assert smoke == open_recipe(ROOT / "experiments" / "smoke.toml", {}).config() and smoke.data.num_clients == 4
    assert open_recipe(None, {}).config().data.num_clients == 8, "the recipe base"
    content = {"rank": 4, "methods": {"lora": {"learning-rate": 0.5}}, "study": {"grids": {"one": {"seeds": [0, 1]}}}}
    tables = open_recipe(content, {})
    assert tables.config("lora").training.learning_rate == 0.5 and tables.config("copra").model.rank == 4
    assert tables.study == content["study"]


WRONG = [
    ({"learning_rat": 0.1}, "unknown argument of simulate 'learning_rat'. Did you mean 'learning_rate'"),
    ({"lr": 0.1}, "unknown argument of simulate 'lr'. Did you mean 'learning_rate'"),
    ({"epochs": 3}, "unknown argument of simulate 'epochs'. Did you mean 'local_epochs'"),
    ({"method": "copra"}, "unknown argument of simulate 'method'. `copra-fl config` lists all keys"),
    (
        {"alpha": 16, "partitioner": "iid"},
        r"alpha = 16.0 has no effect with partitioner = 'iid'; .* alpha is lora-alpha",
    ),
    ({"callback": 3}, "callback = 3 must be a function that takes record: 3 is not a callable object"),
    ({"callback": lambda: None}, "must be a function that takes record: too many positional arguments"),
    ({"ouput": "x"}, "unknown argument of simulate 'ouput'. Did you mean 'output'"),
    ({"rank": "8"}, "rank = '8' must be a whole number"),
    ({"recipe": "nosuch"}, "no recipe file 'nosuch'"),
    ({"track": ["tensorbord"]}, "unknown tracker 'tensorbord'"),
    ({"data": {"text": ["a"]}}, "data is of type dict; it must be a pandas DataFrame or a datasets.Dataset"),
    ({"data": pd.DataFrame({"text": []})}, "data has no rows"),
    ({"test_data": pd.DataFrame({"a": [1, "b"]})}, "test_data cannot be stored as Parquet"),
    ({"data": pd.DataFrame({"a": [1]}), "dataset": "x.csv"}, "dataset: given twice, as a setting and by an object"),
    ({"lora": LoraConfig(r=4), "rank": 8}, "rank: given twice"),
    ({"lora": {"r": 4}}, "lora is of type dict; it must be a peft.LoraConfig"),
    ({"processor": object()}, "processor belongs to a model in memory"),
    ({"model": nn.Linear(2, 2)}, "model is of type Linear; it must be a Transformers model"),
    ({"ramp": 0.5}, r"ramp = 0\.5 has no effect with local-training = 'lora'; set local-training = 'copra'"),
    (
        {"trimmed_mean": {"trim_fraction": 0.2}},
        r"trimmed-mean\.trim-fraction = 0\.2 has no effect with rule = 'fedavg'; choose the rule",
    ),
    ({"ray_address": "nowhere"}, "ray_address 'nowhere' is not HOST:PORT"),
    ({"resume": True, "overwrite": True}, "resume=True continues a run and overwrite=True deletes it: use one of them"),
    ({"resume": True}, "resume=True: there is no run in .*; leave resume=True out to start one"),
    ({"resume": True, "output": None}, "resume=True needs output: the folder of the run to continue"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=[str(next(iter(case))) for case, _ in WRONG])
def test_wrong_arguments_of_simulate_are_named(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        simulate(**({"output": tmp_path / "run"} | arguments))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"methods": ["lora", "lora"]}, "method 'lora' is named twice; name it once"),
        ({"methods": []}, "methods is empty; name at least one method"),
        ({"methods": {"a/b": {}}}, "method 'a/b': the name of a method of your own has letters"),
        ({"methods": {"mine": {"rul": "median"}}}, "unknown configuration key 'rul'"),
        ({"seeds": [0, 0]}, r"seeds = \[0, 0\] must be whole numbers"),
        ({"seeds": [0.5]}, "must be whole numbers"),
        ({"methods": ["lora"], "seeds": 3}, "seeds = 3 must be whole numbers"),
        ({"methods": [1]}, r"methods = \[1\] must be names or TOML files as texts"),
        ({"methods": {"lora": None}}, "method 'lora': its settings None must be a mapping; {} for none of its own"),
        ({"seeds": np.arange(2), "rank": 0}, "rank = 0 must be at least 1"),  # NumPy's numbers are seeds too
        ({"methods": {"lora": {}}, "ramp": 0.5}, r"ramp = 0\.5 has no effect with local-training = 'lora'"),
        ({"callback": lambda record: None}, "must be a function that takes method, seed and record: too many pos"),
        ({"seed": 3}, r"compare takes seeds, not a seed: seeds=\[3\]"),
    ],
)
def test_wrong_arguments_of_compare_are_named(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        compare(output=tmp_path / "runs", **arguments)


def test_a_resumed_comparison_keeps_the_runs_that_have_begun(tmp_path: Path) -> None:
    write_plan(tmp_path, ["lora", "head"], [0], {f"{name}-seed0": Config() for name in ("lora", "head")})
    (tmp_path / "lora-seed0" / "journal.jsonl").touch()
    with pytest.raises(ConfigError, match="would lose lora-seed0"):
        compare(["head"], [0], output=tmp_path, resume=True)


def test_methods_with_settings_of_their_own() -> None:
    """A known name has its own settings first; the call's settings come last."""
    recipe = open_recipe({"rank": 4}, {"seed": 7})
    assert recipe.knows("flora+copra") and not recipe.knows("mine")
    assert recipe.config("flora", 1, {"rank": 2}).aggregation.rule == "flora"
    assert recipe.config("flora", 1, {"rank": 2}).model.rank == 2
    assert recipe.config(None, 1, {"rule": "median"}) == Config.from_flat({"rank": 4, "rule": "median", "seed": 1})


def test_importing_the_package_imports_nothing_large() -> None:
    large = {"torch", "pandas", "numpy", "flwr", "ray", "plotly", "pydantic"}
    code = f"import sys, copra_fl; print({large} & sys.modules.keys()); copra_fl.simulate; import torch"
    code = code.replace("; import torch", f"; print({large - {'numpy'}} & sys.modules.keys())")
    printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert printed.splitlines() == ["set()", "set()"]
    assert set(copra_fl.__all__) == copra_fl._MODULES.keys()


# --- tables and models in memory ----------------------------------------------------------


def test_a_data_frame_is_stored_once_by_its_content(empty_cache: Path) -> None:
    frame = pd.DataFrame({"text": ["a", "b"], "label": [0, 1], 3: [None, 2.5]}, index=[5, 6])
    path = store_table("data", frame)
    assert store_table("data", frame.reset_index(drop=True)) == path != store_table("data", frame[:1])
    stored = file_table("dataset", Path(path)).read()
    assert stored.equals(frame.rename(columns=str).reset_index(drop=True))
    assert Path(path).parent == cache_dir() / "tables" and Path(path).stat().st_mode & 0o077 == 0
    Path(path).write_bytes(b"damaged")
    assert store_table("data", frame) == path and file_table("dataset", Path(path)).read().equals(stored)


@pytest.mark.parametrize("entry", [{}, 1 + 2j, 10**30], ids=str)
def test_a_column_that_parquet_cannot_store_is_named(entry: object, empty_cache: Path) -> None:
    with pytest.raises(ConfigError, match="data cannot be stored as Parquet: "):
        store_table("data", pd.DataFrame({"text": ["a"], "meta": pd.Series([entry], dtype=object)}))


def test_class_labels_of_a_dataset_become_their_names(empty_cache: Path) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    rows = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    assert file_table("dataset", Path(store_table("data", rows))).read()["label"].tolist() == ["yes", "no"]
    with pytest.raises(ConfigError, match=r"data is a DatasetDict with the splits train; .* data=d\['train'\]"):
        store_table("data", datasets.DatasetDict({"train": rows}))


def test_a_model_in_memory_is_stored_with_its_tokenizer(tiny_model: str, empty_cache: Path) -> None:
    model = AutoModel.from_pretrained(tiny_model)
    path = store_model(model)
    assert store_model(AutoModel.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(tiny_model)) == path
    weights = load_file(Path(path) / "model.safetensors")
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    texts = AutoTokenizer.from_pretrained(path)(["sea1 sky2"])["input_ids"]
    assert texts == AutoTokenizer.from_pretrained(tiny_model)(["sea1 sky2"])["input_ids"]
    with torch.no_grad():
        model.embeddings.word_embeddings.weight[3, 0] += 1
    assert store_model(model) != path, "its weights are others"


class OwnBert(BertModel):
    """A class that other processes cannot open from a folder."""


def test_models_that_cannot_be_taken_are_named(tiny_model: str, tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(tiny_model)
    with pytest.raises(ConfigError, match=r"OwnBert; other processes can open only Transformers' own classes"):
        store_model(OwnBert(model.config))
    with pytest.raises(ConfigError, match="was not loaded from a name or path; pass its tokenizer as processor="):
        store_model(BertModel(BertConfig(**model.config.to_diff_dict())))
    model.name_or_path = str(tmp_path)
    with pytest.raises(ConfigError, match="its tokenizer or image processor cannot be loaded from '.*; pass it as"):
        store_model(model)
    with pytest.raises(ConfigError, match="model is a PeftModel; pass the model below it"):
        store_model(get_peft_model(model, LoraConfig(target_modules=["query"])))


def test_old_tables_and_models_are_leftovers(tiny_model: str, empty_cache: Path) -> None:
    table = Path(store_table("data", pd.DataFrame({"a": [1]})))
    model = Path(store_model(AutoModel.from_pretrained(tiny_model)))
    assert list(in_cache(empty_cache, days=30)) == []
    for path in (table, model):
        os.utime(path, (0, time.time() - 31 * 86_400))
    assert [leftover.path for leftover in in_cache(empty_cache, days=30)] == sorted([model, table])


def test_a_lora_config_becomes_settings(tiny_model: str) -> None:
    """Oracle: PEFT gets back the configuration that it was given."""
    lora = LoraConfig(r=4, lora_alpha=6, lora_dropout=0.1, target_modules=["value", "key"], task_type="SEQ_CLS")
    config = Config.from_flat(lora_settings(lora))
    again = lora_config(config.model, AutoModel.from_pretrained(tiny_model))
    for name in ("r", "lora_alpha", "lora_dropout", "target_modules"):
        assert getattr(again, name) == getattr(lora, name), name
    assert Config.from_flat(lora_settings(LoraConfig(use_rslora=True))).model.lora_scaling == "rslora"
    assert Config.from_flat(lora_settings(LoraConfig(use_dora=True))).model.dora
    assert lora_settings(LoraConfig(target_modules="all-linear"))["target-modules"] == "all-linear"
    assert "target-modules" not in lora_settings(LoraConfig())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"lora_bias": True, "bias": "all"},
            "lora sets bias and lora_bias, which no setting",
        ),
        ({"target_modules": r".*\.query"}, "is a regular expression; list the names of the modules"),
    ],
)
def test_lora_configs_that_cannot_be_taken_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        lora_settings(LoraConfig(**options))


# --- frames and figures -------------------------------------------------------------------


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    return load_comparison(str(write_comparison(tmp_path_factory.mktemp("frames") / "comparison", [0, 1])))


def test_history_has_the_journal(comparison: Comparison) -> None:
    run = comparison.methods["copra"][1]
    lines = [json.loads(line) for line in (run.directory / "journal.jsonl").read_text().splitlines()]
    history = run.history
    assert history.index.tolist() == [1, 2, 3] and history.index.name == "round"
    for column, values in {
        "validation_accuracy": [line["validation"]["accuracy"] for line in lines],
        "train_loss": [line["train_loss"] for line in lines],
        "bytes_up": [line["bytes_up"] for line in lines],
        "clients_missing": [0, 1, 0],
    }.items():
        assert history[column].tolist() == values
    both = comparison.history
    assert len(both) == 12 and both.columns[:3].tolist() == ["method", "seed", "round"]
    assert both.groupby(["method", "seed"]).size().tolist() == [3] * 4


def test_clients_have_their_training_and_final_results(comparison: Comparison) -> None:
    """Client 5 is missing in round 2 of seed 1."""
    run = comparison.methods["lora"][1]
    lines = [json.loads(line) for line in (run.directory / "journal.jsonl").read_text().splitlines()]
    final = json.loads((run.directory / "summary.json").read_text())["clients"]
    clients = run.clients
    assert clients.index.tolist() == list(range(8)) and clients["rounds"].tolist() == [3, 3, 3, 3, 3, 2, 3, 3]
    assert clients["accuracy"].tolist() == [client["accuracy"] for client in final]
    assert clients["train_loss"].tolist() == [client["loss"] for client in lines[-1]["clients"]]
    assert clients["steps"].tolist() == [150 * rounds for rounds in clients["rounds"]]
    assert len(comparison.clients) == 32 and {"method", "seed", "client", "accuracy"} <= set(comparison.clients)


def test_results_have_each_finished_run(comparison: Comparison) -> None:
    results = comparison.results
    assert results[["method", "seed"]].to_numpy().tolist() == [["lora", 0], ["lora", 1], ["copra", 0], ["copra", 1]]
    path = comparison.directory / "copra-seed1" / "summary.json"
    assert results["test_accuracy"].iloc[3] == json.loads(path.read_text())["test"]["accuracy"]


def test_figures_are_those_of_the_report_with_a_title(comparison: Comparison) -> None:
    figures = comparison.figures
    assert {"Accuracy by round", "Accuracy per client", "Bytes sent"} <= figures.keys()
    for title, figure in figures.items():
        assert isinstance(figure, go.Figure) and figure.layout.title.text == title
    by_round = figures["Accuracy by round"]
    assert {trace.name for trace in by_round.data if trace.name} == {"lora", "copra"}
    assert comparison.methods["lora"][0].figures.keys() >= {"Accuracy by round"}


def test_runs_and_comparisons_show_themselves_shortly(comparison: Comparison) -> None:
    run = comparison.methods["lora"][0]
    assert repr(run) == f"<Run lora, seed 0, 3 of 3 rounds, in {run.directory}>"
    assert repr(comparison) == f"<Comparison of lora and copra, seeds 0 and 1, in {comparison.directory}>"
    shown = comparison._repr_html_()
    assert "<table" in shown and "copra" in shown and "script" not in shown
    final = json.loads((run.directory / "summary.json").read_text())["test"]["accuracy"]
    assert f"{100 * final:.1f}" in run._repr_html_()


def test_a_run_without_rounds_or_adapter_says_so(tmp_path: Path) -> None:
    write_run(tmp_path / "run", "lora", 0)
    run = load_run(tmp_path / "run")
    with pytest.raises(ResultsError, match="has no final adapter"):
        run.adapter  # noqa: B018
    (tmp_path / "run" / "adapter").mkdir()
    assert run.adapter == tmp_path / "run" / "adapter"
    (tmp_path / "run" / "journal.jsonl").unlink()
    (tmp_path / "run" / "summary.json").unlink()
    begun = load_run(tmp_path / "run")
    with pytest.raises(ResultsError, match="has no finished round"):
        begun.figures  # noqa: B018
    assert begun._repr_html_().startswith("&lt;Run lora, seed 0, 0 of 3 rounds")
    assert begun.history.empty and begun.clients.empty


# --- real runs ----------------------------------------------------------------------------


@pytest.mark.slow
def test_simulate_and_compare_in_this_process(tiny: Settings, tiny_model: str, tmp_path: Path) -> None:
    """On a DataFrame, with a model in memory and a LoraConfig; the records reach the callback in order."""
    settings = {name: value for name, value in tiny.items() if name not in ("dataset", "model", "rank")}
    keywords = {name.replace("-", "_"): value for name, value in settings.items()}
    frame = pd.read_csv(str(tiny["dataset"])).rename(columns={"text": "note"})
    keywords |= {
        "data": frame,
        "text_column": "note",
        "model": AutoModel.from_pretrained(tiny_model),
        "lora": LoraConfig(r=2, lora_alpha=16, target_modules=["query", "value"]),
        "workers": 1,
        "progress": False,
    }
    rounds: list[int] = []
    run = simulate(output=tmp_path / "run", callback=lambda record: rounds.append(record.round), **keywords)
    assert isinstance(run, Run) and rounds == [1, 2] == run.history.index.tolist()
    assert run.config.model.rank == 2 and copra_fl.load(run.adapter).labels == ["sand", "sea", "sky"]

    seen: list[tuple[str, int, int]] = []
    both = compare(
        {"lora": {}, "mine": {"rule": "median", "local_training": "lora"}},
        seeds=[0],
        output=tmp_path / "both",
        callback=lambda method, seed, record: seen.append((method, seed, record.round)),
        **keywords,
    )
    assert seen == [(method, 0, number) for method in ("lora", "mine") for number in (1, 2)]
    assert both.results["method"].tolist() == ["lora", "mine"]

    def stop(record: object) -> None:
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        simulate(output=tmp_path / "stopped", callback=stop, **keywords)
    rounds.clear()
    resumed = simulate(output=tmp_path / "stopped", resume=True, callback=lambda r: rounds.append(r.round), workers=1)
    assert resumed.summary is not None and resumed.history["train_loss"].tolist() == run.history["train_loss"].tolist()


SCRIPT = """
import json, sys, copra_fl
def show(record):
    print(record.round, flush=True)
copra_fl.simulate(json.loads(sys.argv[1]), output="run", workers=1, callback=show)
"""


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_or_killed_process_leaves_no_process(
    tiny: Settings, stop: signal.Signals, tmp_path: Path
) -> None:
    """As a notebook's kernel is interrupted, or restarted."""
    recipe = json.dumps(tiny | {"num-rounds": 500, "local-steps": 100})
    run = RealRun(["-c", SCRIPT, recipe], tmp_path, script=sys.executable)
    assert run.process.stdout and run.process.stdout.readline() == "1\n"  # the callback of round 1
    assert len(run.processes()) > 3
    run.process.send_signal(stop)
    _, err = run.process.communicate(timeout=HANG_SECONDS)
    assert ("KeyboardInterrupt" in err) == (stop == signal.SIGINT)
    run.wait_until(lambda: not run.processes(), "no process left")
