"""Repeat the papers' own experiments, outside a federation: do adapters of CopRA merge and prune better than LoRA's?

After CopRA (arXiv 2410.22911) and CoTo (arXiv 2506.05713), on MiniLM and health tweets. Transformers' Trainer trains
each adapter on the pooled data, with or without `CopraCallback`, from its own random start of adapter **and** head and
in its own order of the data. A head is one linear layer on the features of a frozen base: training cannot permute its
classes or its inputs, so heads can be averaged whatever their starts were. The measure "heads alone, averaged" is the
cost of that by itself. Wherever adapters are merged, their heads are averaged.

    python -m experiments.papers train
    python -m experiments.papers measure --date 20261125

Both commands can be stopped and started again; finished trainings and measurements are kept. The learning rate of a
method is its best on validation data, over tuning seeds that are not reported. Takes half an hour on 2 idle cores. On a
busy machine, several `train` with `--seeds ""` and one tuning seed each can run at the same time, each with
OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

from copra_fl import startup

startup.prepare()

import numpy as np
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

from copra_fl import CopraCallback, provenance
from copra_fl.adapters.interpolation import combine, interpolate, interpolate_products, merge_gap, walk
from copra_fl.adapters.state import Adapter
from copra_fl.config import Config, parse_override
from copra_fl.data.federated import FederatedData, load_data
from copra_fl.files import atomic_write, write_json
from copra_fl.models.adapted import AdaptedModel
from copra_fl.models.build import build_model, load_processor, resolve_config
from copra_fl.probes import pruned_adapters
from copra_fl.probes.exported import ExportedAdapter, Game, solve
from copra_fl.probes.members import select_members
from copra_fl.probes.merging import MERGE_METHODS, merge
from copra_fl.probes.open_run import OpenRun, PlainEngines, no_progress
from copra_fl.probes.shapley_values import gini, top_third
from copra_fl.tensor_files import read_tensors, write_tensors
from copra_fl.training.engine import Engine, open_engine
from experiments.papers_summary import Values, summarise, table

METHODS = ("lora", "copra")
RATES = (1e-3, 2e-3, 5e-3, 1e-2)
#: settings of every training: a federation of one round, whose only client holds the pooled data
SETTINGS: dict[str, Any] = {
    "partitioner": "iid", "num-clients": 1, "validation-fraction": 0.0, "num-rounds": 1, "local-steps": 400,
    "max-length": 32, "server-validation-examples": 1000, "test-examples": 1000, "eval-batch-size": 256,
}  # fmt: skip
#: arguments of the shortest run, with paths that tests/test_experiments.py makes
TINY = (
    "measure --output {folder} --results {folder} --date today --seeds 0,1 --tuning-seeds 10 --texts 20 "
    "--set model={model} --set dataset={dataset} --set rank=2 --set local-steps=1 --set max-length=16 "
    "--set server-validation-examples=60 --set test-examples=60 --set device=cpu --set dtype=float32"
)
#: number of points on a line between two adapters
NUM_POINTS = 5
#: how adapters are merged; for two adapters the first two methods give the midpoints of the paths
MERGED_BY = ("average of factors", "average of products", "average of products, best rank r", "TIES of products")
#: share of entries that TIES keeps
DENSITY = 0.5


@dataclass(frozen=True)
class Study:
    """All trainings of the experiment.

    Attributes:
        base: the settings of every training except method, rate and seed.
        output: folder of the adapters.
        data: its client 0 has the pooled training data.
        engine: evaluates adapters of the trained rank.
        plain_engines: evaluate plain adapters of any rank.
    """

    base: Config
    output: Path
    data: FederatedData
    engine: Engine
    plain_engines: PlainEngines

    @classmethod
    def open(cls, settings: Mapping[str, Any], output: Path, texts: int | None = None) -> Study:
        """Load data and model; only the first `texts` examples of the test set are measured on."""
        config = resolve_config(Config.from_flat(SETTINGS | dict(settings)))
        pooled = load_data(config, load_processor(config.model))
        num_labels = len(pooled.label_names)
        engine = open_engine("stacked", config.model, config.copra.gate_group, num_labels, seed=0)
        data = replace(pooled, test=pooled.test[:texts])
        return cls(config, output, data, engine, PlainEngines(config, num_labels))

    def run(self, method: str, rate: float, seed: int) -> OpenRun:
        """Return a training in the form that probes take. Trainer has one learning rate for adapter and head."""
        config = self.base.changed(local_training=method, learning_rate=rate, head_learning_rate=rate, seed=seed)
        folder = self.output / f"{method}-{rate:g}-seed{seed}"
        return OpenRun(folder, config, self.data, self.engine, self.plain_engines, [{"round": 1}])


class ForTrainer(nn.Module):
    """The model in the form that Trainer takes: it returns the loss, and its base stays in eval mode."""

    def __init__(self, model: AdaptedModel) -> None:
        super().__init__()
        self.model = model

    def train(self, mode: bool = True) -> ForTrainer:
        return self

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.model(input_ids=input_ids, attention_mask=attention_mask)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def train(run: OpenRun, callback: bool) -> Adapter:
    """Train an adapter with Trainer and `run`'s settings; its seed gives the start, the order of data and the masks."""
    config, seed = run.config, run.config.federation.seed
    model = build_model(config.model, config.copra.gate_group, len(run.data.label_names), seed)
    arguments = TrainingArguments(
        str(run.directory / "trainer"),
        max_steps=config.training.local_steps,
        per_device_train_batch_size=config.training.batch_size,
        learning_rate=config.training.learning_rate,
        max_grad_norm=config.training.max_grad_norm,
        lr_scheduler_type="constant",
        seed=seed,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        log_level="error",
        use_cpu=model.device.type == "cpu",
    )
    Trainer(
        ForTrainer(model),
        arguments,
        data_collator=lambda indices: run.data.examples.batch(np.array(indices)),
        train_dataset=run.data.train[0].tolist(),
        callbacks=[CopraCallback(p0=config.copra.p0, ramp=config.copra.ramp, seed=seed)] if callback else [],
    ).train()
    return model.read_adapter()


def ensure_trained(run: OpenRun) -> dict[str, Any]:
    """Train the adapter of `run` unless it exists; return its settings, validation metrics and seconds.

    Raises ValueError for an existing adapter with other settings.
    """
    path = run.directory / "checkpoints" / "round-00001.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        started = time.perf_counter()
        adapter = train(run, callback=run.config.copra.local_training == "copra")
        seconds = time.perf_counter() - started
        (validation,) = run.score([adapter], "server-validation", residual={})
        facts = {"config": run.config.to_flat(), "validation": validation, "seconds": seconds}
        write_tensors(path, adapter, {"facts": json.dumps(facts)})
        print(f"{run.name}: validation accuracy {validation['accuracy']:.3f}, {seconds:.0f} s", flush=True)
    facts = json.loads(read_tensors(path)[1]["facts"])
    if changed := Config.from_flat(facts["config"]).differences(run.config):
        raise ValueError(f"{path} was trained with other settings: {'; '.join(changed)}; use another --output")
    return facts


def measure_adapter(run: OpenRun) -> dict[str, float]:
    """Return accuracy of an adapter, whole and pruned, and the exact Shapley values of its layers."""
    layers = pruned_adapters.layers(run.adapter)
    game = Game(ExportedAdapter(run), list(layers.values()), "test", no_progress)
    solved = solve(game, standard_error=0.0, max_pairs=1, seed=0)
    accuracy, loss = solved["accuracy"], solved["loss"]
    measures = {"alone": accuracy.grand, "alone, loss": -loss.grand, "head alone": accuracy.empty}
    for pruned in pruned_adapters.layer_sets(run.adapter):
        kept = [bool(pruned.adapter[f"{modules[0]}.lora_B.weight"].any()) for modules in layers.values()]
        measures[f"kept: {pruned.name}"] = float(game.value("accuracy")(np.array([kept]))[0])
    size = np.abs(accuracy.values)
    upper = size[-math.ceil(len(size) / 3) :]
    measures["Shapley: share of the uppermost third"] = float(upper.sum() / size.sum()) if size.any() else 1 / 3
    measures |= {"Shapley: share of the largest third": top_third(size), "Shapley: Gini": gini(size)}
    return measures | {f"Shapley: layer {layer}": float(value) for layer, value in enumerate(accuracy.values)}


def measure_group(runs: Sequence[OpenRun]) -> dict[str, float]:
    """Return accuracy of merged adapters of equal weight; for two also that of the lines between them and of heads."""
    group = select_members(runs, no_progress)
    members, plain = range(len(runs)), group.plain_adapters
    score, score_plain = partial(group.score, members, split="test"), partial(group.score_plain, members, split="test")
    methods, measures = list(MERGED_BY), dict[str, float]()
    if len(runs) == 2:
        paths = {
            "factor": walk(score, group.adapters[0], group.adapters[1], NUM_POINTS, interpolate),
            "product": walk(score_plain, plain[0], plain[1], NUM_POINTS, interpolate_products),
        }
        for kind, path in paths.items():
            measures[f"{kind} path: accuracy at the midpoint"] = path.accuracy[NUM_POINTS // 2]
            measures[f"{kind} path: midpoint gap"] = path.midpoint_gap
            measures[f"{kind} path: barrier (Entezari)"] = path.barrier_entezari
            measures[f"{kind} path: barrier (Frankle)"] = path.barrier_frankle
        (heads,) = score([pruned_adapters.keep(combine(group.adapters, group.weights), ())])
        measures["heads alone, averaged"] = heads["accuracy"]
        methods = methods[2:]
    merged = [merge(plain, MERGE_METHODS[method], group.weights, 1.0, DENSITY, seed=0) for method in methods]
    unmerged_metrics = score_plain(plain)
    for method, metrics in zip(methods, score_plain(merged), strict=True):
        measures[f"merge of {len(runs)}: {method}"] = metrics["accuracy"]
        gap = merge_gap(metrics, unmerged_metrics, group.weights)["accuracy"]
        measures[f"merge of {len(runs)}: {method}, gap"] = gap
    return measures


def measure(study: Study, rates: Mapping[str, float], seeds: Sequence[int]) -> dict[str, Values]:
    """Return all measures of each adapter, pair and triple, by method. They are kept in files for another call."""
    measured: dict[str, Values] = {method: {} for method in METHODS}
    for size in (1, 2, 3):
        for chosen in combinations(seeds, size):
            for method in METHODS:
                runs = [study.run(method, rates[method], seed) for seed in chosen]
                name = f"{method}-{rates[method]:g}-seeds{'-'.join(map(str, chosen))}-{len(study.data.test)}.json"
                for measure_name, value in _measured_once(study.output / "measured" / name, runs).items():
                    measured[method].setdefault(measure_name, {})[chosen] = value
    return measured


def _measured_once(path: Path, runs: Sequence[OpenRun]) -> dict[str, float]:
    """Return the measures of `runs` together, from the file `path` if it exists."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, json.dumps(measure_group(runs) if len(runs) > 1 else measure_adapter(runs[0])))
        print(path.stem, flush=True)
    measures: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))
    return measures


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command: `train` trains the missing adapters; `measure` also measures them, and writes JSON and table."""

    def numbers(text: str) -> list[int]:
        return [int(number) for number in text.split(",") if number]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("train", "measure"))
    parser.add_argument("--output", type=Path, default=Path("runs/papers"), help="folder of the adapters")
    parser.add_argument("--results", type=Path, default=Path("experiments/results"), help="folder of the results")
    parser.add_argument("--date", default="", help="part of the name of the results: papers-DATE")
    parser.add_argument("--seeds", type=numbers, default=[0, 1, 2, 3, 4], help="seeds that are reported")
    parser.add_argument("--tuning-seeds", type=numbers, default=[10, 11], help="seeds for the choice of learning rates")
    parser.add_argument("--texts", type=int, help="number of test examples (default: all)")
    parser.add_argument("--set", action="append", default=[], help="a configuration setting, KEY=VALUE")
    options = parser.parse_args(arguments)
    seeds, tuning_seeds = options.seeds, options.tuning_seeds
    study = Study.open(dict(map(parse_override, options.set)), options.output, options.texts)
    tuning = {
        method: {
            rate: [ensure_trained(study.run(method, rate, seed))["validation"]["accuracy"] for seed in tuning_seeds]
            for rate in RATES
        }
        for method in METHODS
    }
    rates = {method: max(accuracies, key=lambda rate: fmean(accuracies[rate])) for method, accuracies in tuning.items()}
    trained = {method: [ensure_trained(study.run(method, rates[method], seed)) for seed in seeds] for method in METHODS}
    if options.step == "train":
        return
    measured = measure(study, rates, seeds)
    facts = {
        "command": shlex.join(["python", "-m", "experiments.papers", *sys.argv[1:]]),
        "date": options.date,
        "versions": provenance.versions(),
        "machine": provenance.machine(),
        "source": provenance.source_digest(Path(provenance.__file__).parent),
        "data": study.data.digest,
        "settings": study.base.to_flat(),
        "examples": {"validation": len(study.data.server_validation), "test": len(study.data.test)},
        "path_points": NUM_POINTS,
        "ties_density": DENSITY,
        "seeds": seeds,
        "tuning_seeds": tuning_seeds,
        "rates": rates,
        "tuning": {
            method: {f"{rate:g}": values for rate, values in accuracies.items()}
            for method, accuracies in tuning.items()
        },
        "trained": trained,
        "measures": summarise(measured, seeds),
        "values": {
            method: {
                name: {" ".join(map(str, group)): value for group, value in by_group.items()}
                for name, by_group in measures.items()
            }
            for method, measures in measured.items()
        },
    }
    options.results.mkdir(parents=True, exist_ok=True)
    write_json(options.results / f"papers-{options.date}.json", facts)
    atomic_write(options.results / f"papers-{options.date}.md", table(facts))
    print(table(facts))


if __name__ == "__main__":
    main()
