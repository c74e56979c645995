"""Scripts of Transformers' Trainer as clients: equal to our own training and to Trainers that run alone."""

from __future__ import annotations

import random
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from rich.console import Console
from torch.optim import SGD
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import copra_fl
from clients.policy import Policy, PolicyViolation
from clients.warm_cache import open_engine
from copra_fl.config import Config, ConfigError
from copra_fl.data.federated import load_data
from copra_fl.models.build import build_model, load_processor
from copra_fl.seeding import derive, global_stream
from copra_fl.simulation import preflight
from copra_fl.simulation.ray_cluster import WorkerRequest
from copra_fl.training.batches import plan_steps
from copra_fl.training.engine import TrainerEngine
from copra_fl.training.plan import Plan, Start
from copra_fl.training.script import run_script
from copra_fl.training.single import train_client
from copra_fl.training.trainer import check_trainer
from server.errors import FederationError
from tests.support.compatibility import check
from tests.support.documents import ROOT
from tests.support.federations import Stop, StoppingGrid, assert_equal, final_adapter, journal
from tests.support.local_grid import LocalGrid, run_federation
from tests.support.scripts import write_script
from tests.support.tiny import Settings
from tests.support.worlds import jitter, relative_error

CONSTANT = {"lr_scheduler_type": "constant"}


@pytest.fixture
def settings(tiny: Settings, tiny_llama: str, texts: str, tmp_path: Path) -> Settings:
    """Two clients who train by the script."""
    return tiny | {
        "task": "causal-lm",
        "model": tiny_llama,
        "target-modules": "q_proj,v_proj",
        "partitioner": "iid",
        "num-clients": 2,
        "local-training": "lora",
        "engine": "trainer",
        "script": write_script(tmp_path, tiny_llama, CONSTANT),
    }


@pytest.fixture(autouse=True)
def fresh_process() -> Iterator[None]:
    """Keep no Trainer of another test."""
    open_engine.cache_clear()
    yield
    open_engine.cache_clear()


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient-accumulation": 2},
        {"dora": True},
        {"local-training": "copra", "min-active": 1, "p0": 0.2, "rescale": True},
        {"rule": "ffa-lora", "layers-per-round": 2, "client-ranks": "", "weighting": "activity"},
    ],
    ids=["lora", "dora", "copra", "layers of ffa-lora"],
)
def test_a_trainer_equals_our_own_training(settings: Settings, tmp_path: Path, changes: Settings) -> None:
    """Oracle: `train_client` of engine = "peft", with the same order of the examples, from a jittered adapter."""
    config = Config.from_flat(settings | {"num-clients": 1, "local-steps": 6} | changes)
    data = load_data(config, load_processor(config.model))
    model = build_model(config.model, "layer", 0, seed=0)
    plan, start = Plan(2, (0,), config), Start(jitter(model.read_adapter(), 3))
    expected = train_client(model, data, plan, 0, start)

    order = np.concatenate([np.concatenate(step) for step in plan_steps(plan, data, 0, 3).batches])
    places = {index: place for place, index in enumerate(data.train[0])}
    accumulation = config.training.gradient_accumulation
    script = Path(write_script(tmp_path, config.model.model, CONSTANT | {
        "train_sampling_strategy": "sequential", "gradient_accumulation_steps": accumulation},
        dora=config.model.dora))  # fmt: skip
    selected = f"train_dataset=rows.select({[places[index] for index in order]})"
    script.write_text(script.read_text().replace("train_dataset=rows", selected))
    engine = TrainerEngine(build_model(config.model, "layer", 0, seed=0))
    (update,) = engine.train(data, plan, (0,), {0: start}, lambda clients: None)
    assert (update.client, update.num_examples, update.active_steps) == (0, len(data.train[0]), expected.active_steps)
    assert update.adapter.keys() == expected.adapter.keys()
    moved = [{name: u.adapter[name] - start.adapter[name] for name in u.adapter} for u in (update, expected)]
    assert relative_error(*moved) < 1e-4
    assert update.metrics["loss"] == pytest.approx(expected.metrics["loss"], rel=1e-4)
    assert update.metrics.keys() == expected.metrics.keys()


def alone(
    script: str, rows: pd.DataFrame, seed: int, start: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> dict[str, torch.Tensor]:
    """Run the script without a federation on `rows`, from the adapter `start`; return its adapter."""
    folder = Path(script).parent
    rows.to_csv(folder / "rows.csv", index=False)
    torch.save(start, folder / "start.pt")
    written = "copra_fl.federate(trainer)\nimport peft\npeft.set_peft_model_state_dict(model, torch.load('start.pt'))"
    (folder / "alone.py").write_text(Path(script).read_text().replace("copra_fl.federate(trainer)", written))
    with monkeypatch.context() as patch, torch.random.fork_rng():
        patch.setenv("ROWS", "rows.csv")
        patch.setenv("SEED", str(seed))
        patch.chdir(folder)
        model = runpy.run_path("alone.py", run_name="__main__")["model"]
    stored = get_peft_model_state_dict(model)
    return {name if name.endswith(".weight") else f"{name}.weight": tensor for name, tensor in stored.items()}


@pytest.mark.parametrize("dora", [False, True])
def test_a_round_of_a_federation_is_the_average_of_two_trainers_that_run_alone(
    settings: Settings, tiny_llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dora: bool
) -> None:
    """Oracle: the script, run alone on each client's rows, and the mean by examples in float64."""
    settings = settings | {"num-rounds": 1, "dora": dora, "script": write_script(tmp_path, tiny_llama, CONSTANT, dora)}
    config = Config.from_flat(settings)
    data = load_data(config, load_processor(config.model))
    assert data.read_rows is not None
    rows = data.read_rows()
    start = build_model(config.model, "layer", 0, seed=config.federation.seed).read_adapter()
    seeds = [derive(0, "trainer", 1, client) % 2**32 for client in range(2)]
    adapters = [
        alone(str(settings["script"]), rows.iloc[indices], seed, start, monkeypatch)
        for seed, indices in zip(seeds, data.train, strict=True)
    ]
    sizes = [len(indices) for indices in data.train]
    run = run_federation(settings, tmp_path / "run")
    final = final_adapter(run)
    for name in start:
        mean = sum(n * a[name].double() for n, a in zip(sizes, adapters, strict=True)) / sum(sizes)
        assert torch.allclose(final[name].double(), mean, atol=1e-6 if "magnitude" in name else 1e-7), name
    assert any("magnitude" in name and not torch.equal(final[name], start[name]) for name in final) == dora
    assert not (tmp_path / "output").exists() or not list((tmp_path / "output").iterdir())


def test_the_schedule_spans_all_rounds_and_a_resumed_run_equals_the_whole_one(
    settings: Settings, tiny_llama: str, tmp_path: Path
) -> None:
    """The default schedule falls linearly to 0 over 2 rounds of 3 steps."""
    settings = settings | {"num-clients": 1, "script": write_script(tmp_path, tiny_llama, {})}
    whole = run_federation(settings, tmp_path / "whole", num_nodes=1)
    rates = [float(line) for line in (tmp_path / "rates.txt").read_text().split()]
    assert rates == pytest.approx([0.002 * (1 - step / 6) for step in range(6)])

    with pytest.raises(Stop):
        run_federation(settings, tmp_path / "resumed", grid=StoppingGrid(1, 1))
    open_engine.cache_clear()  # another process
    resumed = run_federation(settings, tmp_path / "resumed", num_nodes=1)
    assert_equal(final_adapter(resumed), final_adapter(whole))


def test_a_run_leaves_the_global_generators_and_the_folder_as_they_are(settings: Settings, tmp_path: Path) -> None:
    state = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate(), Path.cwd(), list(sys.path)
    run_federation(settings | {"num-rounds": 1}, tmp_path / "run")
    assert torch.equal(torch.get_rng_state(), state[0]) and np.random.get_state()[1].tolist() == state[1]
    assert (random.getstate(), Path.cwd(), sys.path) == state[2:]


def test_global_streams_are_equal_for_equal_names() -> None:
    draws = []
    for name in ("a", "a", "b"):
        with global_stream(0, name):
            draws.append((random.random(), np.random.rand(), float(torch.rand(()))))
    assert draws[0] == draws[1] and draws[0] != draws[2]


@pytest.mark.parametrize(
    "changes", [{}, {"partitioner": "natural", "client-column": "owner", "held-out-clients": 2}], ids=len
)
def test_client_data_are_the_rows_of_the_table_that_the_client_trains_on(settings: Settings, changes: Settings) -> None:
    sizes = {"server-validation-examples": 20, "test-examples": 20}
    config = Config.from_flat(settings | sizes | changes)
    data = load_data(config, load_processor(config.model))
    assert data.read_rows is not None
    rows = data.read_rows().iloc[data.train[1]]
    processor = load_processor(config.model)
    for index, text in zip(data.train[1][:20], rows["text"], strict=False):
        ids = data.examples.batch(np.array([index]))["input_ids"][0]
        assert processor.decode(ids) == f"<s> {text} </s>"
    assert list(rows.columns) == ["text", "label", "owner"]
    assert copra_fl.client_data("alone") == "alone" and copra_fl.federate(object()) is None  # type: ignore[arg-type]


def lora(**changes: Any) -> LoraConfig:
    return LoraConfig(**{"task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}
                      | changes)  # fmt: skip


MODELS: dict[str, Any] = {
    "whole model": (lambda base: base, "has a LlamaForCausalLM, not a PEFT model"),
    "ia3": (lambda base: get_peft_model(base, IA3Config(task_type="CAUSAL_LM", target_modules=["q_proj"],
                                                        feedforward_modules=[])), "an adapter of type IA3"),
    "rank": (lambda base: get_peft_model(base, lora(r=4)), r"with rank = 2; .* for example --set rank=4"),
    "alpha": (lambda base: get_peft_model(base, lora(lora_alpha=4)), r"scales its adapters by 2, .* by 8 \(lora-alpha"),
    "rslora": (lambda base: get_peft_model(base, lora(use_rslora=True)), "lora-scaling = 'rslora' for use_rslora=True"),
    "targets": (lambda base: get_peft_model(base, lora(target_modules=["q_proj"])),
                "on 3 modules, the configuration on 6, by target-modules = 'q_proj,v_proj'"),
    "dora": (lambda base: get_peft_model(base, lora(use_dora=True)),
             "has use_dora=True, the configuration dora = false; use the same in both, for example --set dora=true"),
    "bias": (lambda base: get_peft_model(base, lora(lora_bias=True)),
             r"also trains .*lora_B.bias \.\.\., which no rule averages"),
    "head": (lambda base: get_peft_model(base, lora(modules_to_save=["lm_head"])), "also trains .*lm_head"),
    "name": (lambda base: get_peft_model(base, lora(), adapter_name="mine"), "trains the adapters mine"),
    "half": (lambda base: get_peft_model(base.half(), lora(), autocast_adapter_dtype=False),
             "adapters in torch.float16, but a federation averages them in float32"),
}  # fmt: skip


def make_trainer(model: Any, tmp_path: Path, **arguments: Any) -> Trainer:
    return Trainer(model, TrainingArguments(str(tmp_path), report_to="none", use_cpu=True), **arguments)


@pytest.mark.parametrize("case", MODELS)
def test_a_model_that_cannot_be_federated_is_refused_by_name(settings: Settings, tmp_path: Path, case: str) -> None:
    config, (change, reason) = Config.from_flat(settings), MODELS[case]
    model = change(AutoModelForCausalLM.from_pretrained(config.model.model, dtype="float32"))
    with pytest.raises(ConfigError, match=f"script = 'script.py'.*{reason}"):
        check_trainer(make_trainer(model, tmp_path), build_model(config.model, "layer", 0, seed=0), config)


def test_further_frozen_adapters_and_rslora_with_its_scaling_are_taken_and_another_base_is_not(
    settings: Settings, tmp_path: Path
) -> None:
    config = Config.from_flat(settings | {"lora-scaling": "rslora"})
    reference = build_model(config.model, "layer", 0, seed=0)
    model: Any = get_peft_model(
        AutoModelForCausalLM.from_pretrained(config.model.model, dtype="bfloat16"), lora(use_rslora=True)
    )
    model.add_adapter("reference", lora(r=1))
    trainer = make_trainer(model, tmp_path)
    check_trainer(trainer, reference, config)
    assert isinstance(trainer.model, PeftModel)
    with torch.no_grad():
        model.base_model.model.model.layers[1].self_attn.v_proj.base_layer.weight.mul_(1.1)
    with pytest.raises(ConfigError, match=r"has another base than model = .*layers.1.self_attn.v_proj differ"):
        check_trainer(trainer, reference, config)
    trainer.optimizer = SGD([torch.zeros(1)])
    with pytest.raises(ConfigError, match="has an optimizer or schedule of its own"):
        check_trainer(trainer, reference, config)
    with pytest.raises(ConfigError, match=r"needs a transformers.Trainer, not dict"):
        check_trainer({}, reference, config)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import copra_fl", r"ended without a call of copra_fl.federate\(trainer\)"),
        ("import sys; sys.exit(2)", "ended with exit code 2; a node runs it without arguments"),
        ("import copra_fl; copra_fl.federate(None)", r"does not call copra_fl.client_data\(\)"),
    ],
)
def test_a_script_that_federates_nothing_is_refused(tmp_path: Path, source: str, reason: str) -> None:
    (tmp_path / "script.py").write_text(source)
    with pytest.raises(ConfigError, match=f"script = 'script.py' .*{reason}"):
        run_script(str(tmp_path / "script.py"), pd.DataFrame(), shared=True)
    assert copra_fl.client_data() is None, "the process is no client any more"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rank": 3}, r"the Trainer of script = 'script.py' has .* of shape \(2, 32\), the configuration \(3, 32\)"),
        ({"script": "nothing.py"}, "script = 'nothing.py': there is no file /"),
        ({"script": "failing.py"}, r"fails for client 0: KeyError: 'absent' \(in failing.py, line \d+\)"),
    ],
)
def test_the_script_is_checked_before_anything_starts(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: Settings, reason: str
) -> None:
    monkeypatch.chdir(tmp_path)
    source = Path("script.py").read_text()
    Path("failing.py").write_text(source.replace("seed = int(", "rows[0]['absent']\nseed = int("))
    with pytest.raises(ConfigError, match=reason):
        preflight.check([Config.from_flat(settings | changes)], Console(quiet=True), WorkerRequest(1, 0, None))


def test_a_script_shows_no_progress_bars_and_no_future_warnings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They would stand on the terminal of the command that checks the script."""
    source = (
        "import warnings, copra_fl\nfrom datasets import Dataset\n"
        "Dataset.from_dict({'a': list(range(5000))}).map(lambda row: row, num_proc=None)\n"
        "warnings.warn('soon gone', FutureWarning)\nprint('mine')\ncopra_fl.federate('trainer')"
    )
    (tmp_path / "script.py").write_text(source)
    run_script(str(tmp_path / "script.py"), pd.DataFrame(), shared=False)
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("mine\n", "")


def test_a_site_loads_its_own_data_in_the_script(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text("import copra_fl; copra_fl.federate('trainer')")
    assert run_script(str(tmp_path / "script.py"), pd.DataFrame(), shared=False) == "trainer"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"script": ""}, "engine = 'trainer' needs script"),
        ({"engine": "peft"}, "has no effect with engine = 'peft'; use engine = 'trainer'"),
        ({"task": "text-classification"}, "task = 'text-classification', which trains a head"),
        ({"rule": "fed-sb"}, "does not combine with rule = 'fed-sb'"),
        ({"local-epochs": 1}, "local-epochs = 1: the Trainer decides the size of a step"),
        ({"optimizer-state": "client"}, "optimizer-state = 'client': each round begins with a new optimizer"),
        ({"local-training": "line"}, "local-training = 'line' and off = 'global'"),
        ({"local-training": "copra"}, "p0 = 0 and min-active = 0: .* has no gradient; use min-active = 1"),
        ({"proximal-mu": 0.1}, "proximal-mu and gucci-beta"),
        ({"client-depths": "1,2"}, "client-depths = '1,2'"),
        ({"dataset": "a.csv,b.csv"}, r"dataset = 'a.csv,b.csv' \(several data sets\)"),
    ],
)
def test_settings_that_a_trainer_does_not_follow_are_refused(
    settings: Settings, changes: Settings, reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        check(Config.from_flat(settings | changes))


@pytest.mark.parametrize("changes", [{"min-active": 1}, {"p0": 1.0}])
def test_copra_with_an_adapter_on_in_every_step_is_taken(settings: Settings, changes: Settings) -> None:
    check(Config.from_flat(settings | {"local-training": "copra"} | changes))


#: compares the model with its base in each loss, as DPO does without a reference adapter
WITH_REFERENCE = """
def loss(model, inputs, *args, **kwargs):
    with torch.no_grad(), model.disable_adapter():
        model(**inputs)
    return Trainer.compute_loss(trainer, model, inputs, *args, **kwargs)


trainer.compute_loss = loss
copra_fl.federate(trainer)
"""


def test_a_loss_that_undoes_the_gates_of_copra_is_refused(settings: Settings) -> None:
    config = Config.from_flat(settings | {"local-training": "copra", "min-active": 1, "num-clients": 1})
    script = Path(config.training.script)
    script.write_text(script.read_text().replace("copra_fl.federate(trainer)\n", WITH_REFERENCE))
    data = load_data(config, load_processor(config.model))
    engine = TrainerEngine(build_model(config.model, "layer", 0, seed=0))
    start, plan = Start(engine.model.read_adapter()), Plan(1, (0,), config)
    with pytest.raises(ConfigError, match="switches adapters on and off itself, .*; use local-training = 'lora'"):
        engine.train(data, plan, (0,), {0: start}, lambda clients: None)


def test_a_policy_that_limits_examples_excludes_trainers(settings: Settings) -> None:
    with pytest.raises(PolicyViolation, match="engine = 'trainer' does not say on how many examples"):
        Policy(max_examples_per_round=10**6).check_examples(Config.from_flat(settings), {0: 10})


def test_nodes_compare_the_script_and_one_with_its_own_data_runs_no_other(
    settings: Settings, texts: str, tmp_path: Path
) -> None:
    other = tmp_path / "other" / "script.py"
    other.parent.mkdir()
    other.write_text("raise SystemExit")
    grid = LocalGrid(2, node_configs=[{}, {"script-path": str(other)}])
    with pytest.raises(FederationError, match=r"node 101 .* has another version of the plugin script"):
        run_federation(settings, tmp_path / "run", grid=grid)
    own = settings | {"partitioner": "own", "num-clients": 0}
    grid = LocalGrid(2, node_configs=[{"data-path": texts}, {"data-path": texts}])
    with pytest.raises(FederationError, match="needs a script on each node, but its node config has no script-path"):
        run_federation(own, tmp_path / "own", grid=grid)


#: the script of docs/how-to/federated-trainer.md
PAGE = (ROOT / "docs" / "how-to" / "federated-trainer.md").read_text(encoding="utf-8")
EXAMPLE = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)[0]


def test_the_example_has_less_than_40_lines_and_one_of_them_federates_it() -> None:
    assert EXAMPLE.count("\n") < 40 and EXAMPLE.count("copra_fl.federate(trainer)") == 1


@pytest.mark.slow
@pytest.mark.parametrize("local_training", ["lora", "copra"])
def test_the_example_with_trl_trains_in_a_federation(
    settings: Settings, tiny_llama: str, texts: str, tmp_path: Path, local_training: str
) -> None:
    """Twelve steps lower the loss on the server's validation data; the model and the table of the page are replaced."""
    pytest.importorskip("trl", exc_type=ImportError)
    rows = pd.read_csv(texts)
    rows["prompt"] = rows["text"].shift(fill_value="sea0")
    rows.to_parquet(tmp_path / "train.parquet")
    script = EXAMPLE.replace('str(fetch("smollm2"))', repr(tiny_llama)).replace('fetch("shakespeare")', "Path()")
    (tmp_path / "sft.py").write_text(script.replace("import copra_fl\n", "import copra_fl\nfrom pathlib import Path\n"))
    changes = {"script": str(tmp_path / "sft.py"), "dataset": str(tmp_path / "train.parquet"), "rank": 8,
               "prompt-column": "prompt", "max-length": 96, "local-steps": 6, "local-training": local_training,
               "min-active": 1}  # fmt: skip
    run = run_federation(settings | changes, tmp_path / "run")
    losses = [record["validation"]["loss"] for record in journal(run)]
    assert losses[1] < losses[0]
    assert not list((tmp_path / "sft").glob("*")), "nothing is saved on a node"
