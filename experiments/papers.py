"""The papers' own tests, outside a federation: do adapters trained with CopRA merge and prune better than LoRA's?

After CopRA (arXiv 2410.22911) and CoTo (arXiv 2506.05713), on MiniLM and health tweets. Transformers' Trainer trains
each adapter on the pooled data, with or without `CopraCallback`, from its own random start of adapter **and** head
and in its own order of the data. A head is one linear layer on features of a frozen base: no training can permute its
classes or its inputs, so that two of them can be averaged wherever they started. What that costs by itself is the
measure "heads alone, averaged". Wherever adapters are merged, their heads are averaged.

    python -m experiments.papers train
    python -m experiments.papers measure --date 20261125

Both can be stopped and started again: what is there is not done twice. A method's learning rate is its best on
validation data, by tuning seeds that are not reported. About half an hour on 2 idle cores. On a busy machine
several `train` with `--seeds ""` and one tuning seed each can run side by side, each with OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
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
from copra_fl.adapters.state import Adapter, load_checkpoint, save_checkpoint
from copra_fl.config import Config, parse_override
from copra_fl.data.federated import FederatedData, load_data
from copra_fl.files import atomic_write, write_json
from copra_fl.models.adapted import AdaptedModel
from copra_fl.models.build import build_model, load_processor, resolve_compute
from copra_fl.probes import pruned_adapters
from copra_fl.probes.exported import Game, Whole, solve
from copra_fl.probes.members import members
from copra_fl.probes.merging import MERGES, merge
from copra_fl.probes.open_run import OpenRun, silent
from copra_fl.probes.shapley_values import gini, top_third
from copra_fl.training.engine import Engine, open_engine
from experiments.papers_summary import Values, summarise, table

METHODS = ("lora", "copra")
RATES = (1e-3, 2e-3, 5e-3, 1e-2)
#: of every training: the only client of a federation of one round, which holds the pool
SETTINGS: dict[str, Any] = {
    "partitioner": "iid", "num-clients": 1, "validation-fraction": 0.0, "num-rounds": 1, "local-steps": 400,
    "max-length": 32, "server-validation-examples": 1000, "test-examples": 1000, "eval-batch-size": 256,
}  # fmt: skip
#: points of a line between two adapters
POINTS = 5
#: merges of three; of two the first two are midpoints of lines
WAYS = ("average of factors", "average of products", "average of products, best rank r", "TIES of products")
#: what TIES keeps
DENSITY = 0.5


@dataclass(frozen=True)
class Study:
    """
    Attributes:
        base: the settings of every training but for method, rate and seed.
        output: where adapters are kept.
        data: train[0] is the pool.
        engine: what evaluates.
    """

    base: Config
    output: Path
    data: FederatedData
    engine: Engine
    _engines: dict[int, Engine] = field(default_factory=dict)

    @classmethod
    def open(cls, settings: Mapping[str, Any], output: Path, texts: int | None = None) -> Study:
        """`texts`: how many of the test set are measured on."""
        config = Config.from_flat(SETTINGS | dict(settings))
        compute = resolve_compute(config.model, config.data.max_length)
        config = config.changed(dtype=compute.dtype, attention=compute.attention)
        pooled = load_data(config, load_processor(config.model))
        engine = open_engine("stacked", config.model, config.copra.gate_group, len(pooled.label_names), seed=0)
        return cls(config, output, replace(pooled, test=pooled.test[:texts]), engine)

    def run(self, method: str, rate: float, seed: int) -> OpenRun:
        """A training as probes take it. Trainer has one rate, for adapter and head."""
        config = self.base.changed(local_training=method, learning_rate=rate, head_learning_rate=rate, seed=seed)
        folder = self.output / f"{method}-{rate:g}-seed{seed}"
        return OpenRun(folder, config, self.data, self.engine, [{"round": 1}], self._engines)


class ForTrainer(nn.Module):
    """Our model as Trainer wants a model: the loss comes out, and the base stays in eval mode."""

    def __init__(self, model: AdaptedModel) -> None:
        super().__init__()
        self.model = model

    def train(self, mode: bool = True) -> ForTrainer:
        return self

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.model(input_ids=input_ids, attention_mask=attention_mask)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def train(run: OpenRun, callback: bool) -> Adapter:
    """The adapter after Trainer's training with `run`'s settings; start, order of the data and masks are its seed's."""
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


def ensure(run: OpenRun) -> dict[str, Any]:
    """Validation metrics and seconds of a training, which is done if its adapter is not there.

    Raises ValueError where there is one of other settings.
    """
    path = run.directory / "checkpoints" / "round-00001.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        started = time.perf_counter()
        adapter = train(run, callback=run.config.copra.local_training == "copra")
        seconds = time.perf_counter() - started
        (validation,) = run.score([adapter], "server-validation", residual={})
        facts = {"config": run.config.to_flat(), "validation": validation, "seconds": seconds}
        save_checkpoint(path, adapter, {"facts": json.dumps(facts)})
        print(f"{run.name}: validation accuracy {validation['accuracy']:.3f}, {seconds:.0f} s", flush=True)
    facts = json.loads(load_checkpoint(path)[1]["facts"])
    if changed := Config.from_flat(facts["config"]).differences(run.config):
        raise ValueError(f"{path} is of other settings: {'; '.join(changed)}")
    return facts


def of_one(run: OpenRun) -> dict[str, float]:
    """An adapter alone and pruned, and the Shapley values of its layers: coalitions of layers, all of them."""
    layers = pruned_adapters.layers(run.adapter)
    game = Game(Whole(run), list(layers.values()), "test", silent)
    worth = solve(game, standard_error=0.0, max_pairs=1, seed=0)
    accuracy, loss = worth["accuracy"], worth["loss"]
    found = {"alone": accuracy.everything, "alone, loss": -loss.everything, "head alone": accuracy.nothing}
    for pruned in pruned_adapters.layer_sets(run.adapter):
        inside = [bool(pruned.adapter[f"{each[0]}.lora_B.weight"].any()) for each in layers.values()]
        found[f"kept: {pruned.name}"] = float(game.value("accuracy")(np.array([inside]))[0])
    size = np.abs(accuracy.values)
    upper = size[-math.ceil(len(size) / 3) :]
    found["Shapley: share of the uppermost third"] = float(upper.sum() / size.sum()) if size.any() else 1 / 3
    found |= {"Shapley: share of the largest third": top_third(size), "Shapley: Gini": gini(size)}
    return found | {f"Shapley: layer {layer}": float(value) for layer, value in enumerate(accuracy.values)}


def of_several(runs: Sequence[OpenRun]) -> dict[str, float]:
    """Adapters merged one to one, or 1:1:1; of two also the lines between them, and their heads alone."""
    group = members(runs, silent)
    everyone, (plain, plain_scorer) = range(len(runs)), group.plain("test")
    score, score_plain = group.scorer("test")(everyone), plain_scorer(everyone)
    ways, found = list(WAYS), dict[str, float]()
    if len(runs) == 2:
        paths = {
            "factor": walk(score, group.adapters[0], group.adapters[1], POINTS, interpolate),
            "product": walk(score_plain, plain[0], plain[1], POINTS, interpolate_products),
        }
        for kind, path in paths.items():
            found[f"{kind} path: accuracy at the midpoint"] = path.accuracy[POINTS // 2]
            found[f"{kind} path: midpoint gap"] = path.midpoint_gap
            found[f"{kind} path: barrier (Entezari)"] = path.barrier_entezari
            found[f"{kind} path: barrier (Frankle)"] = path.barrier_frankle
        (heads,) = score([pruned_adapters.keep(combine(group.adapters, group.weights), ())])
        found["heads alone, averaged"] = heads["accuracy"]
        ways = ways[2:]
    merged = [merge(plain, MERGES[way], group.weights, 1.0, DENSITY, seed=0) for way in ways]
    alone = score_plain(plain)
    for way, metrics in zip(ways, score_plain(merged), strict=True):
        found[f"merge of {len(runs)}: {way}"] = metrics["accuracy"]
        found[f"merge of {len(runs)}: {way}, gap"] = merge_gap(metrics, alone, group.weights)["accuracy"]
    return found


def measure(study: Study, rates: Mapping[str, float], seeds: Sequence[int]) -> dict[str, Values]:
    """Method -> all measures, of each adapter, pair and triple; kept in files, so that it can be stopped."""
    measured: dict[str, Values] = {method: {} for method in METHODS}
    for size in (1, 2, 3):
        for chosen in combinations(seeds, size):
            for method in METHODS:
                runs = [study.run(method, rates[method], seed) for seed in chosen]
                name = f"{method}-{rates[method]:g}-seeds{'-'.join(map(str, chosen))}-{len(study.data.test)}.json"
                found = _once(study.output / "measured" / name, runs)
                for what, value in found.items():
                    measured[method].setdefault(what, {})[chosen] = value
    return measured


def _once(path: Path, runs: Sequence[OpenRun]) -> dict[str, float]:
    """What is measured of `runs` together, from the file if it is there."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, json.dumps(of_several(runs) if len(runs) > 1 else of_one(runs[0])))
        print(path.stem, flush=True)
    found: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))
    return found


def main(given: Sequence[str] | None = None) -> None:
    """`train`: what is not there yet. `measure`: the same, then all measures, facts and table."""

    def numbers(text: str) -> list[int]:
        return [int(number) for number in text.split(",") if number]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("train", "measure"))
    parser.add_argument("--output", type=Path, default=Path("runs/papers"), help="where adapters are kept")
    parser.add_argument("--results", type=Path, default=Path("experiments/results"), help="where the result goes")
    parser.add_argument("--date", default="", help="in the result's name")
    parser.add_argument("--seeds", type=numbers, default=[0, 1, 2, 3, 4], help="that are reported")
    parser.add_argument("--tuning-seeds", type=numbers, default=[10, 11], help="that rates are chosen by")
    parser.add_argument("--texts", type=int, help="of the test set, how many are measured on")
    parser.add_argument("--set", action="append", default=[], help="KEY=VALUE of copra_fl/config.py")
    options = parser.parse_args(given)
    seeds, tuning_seeds = options.seeds, options.tuning_seeds
    study = Study.open(dict(map(parse_override, options.set)), options.output, options.texts)
    tuning = {
        method: {rate: [ensure(study.run(method, rate, seed)) for seed in tuning_seeds] for rate in RATES}
        for method in METHODS
    }
    found = {
        method: {rate: [facts["validation"]["accuracy"] for facts in each] for rate, each in by.items()}
        for method, by in tuning.items()
    }
    rates = {method: max(by, key=lambda rate: fmean(by[rate])) for method, by in found.items()}
    trained = {method: [ensure(study.run(method, rates[method], seed)) for seed in seeds] for method in METHODS}
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
        "path_points": POINTS,
        "ties_density": DENSITY,
        "seeds": seeds,
        "tuning_seeds": tuning_seeds,
        "rates": rates,
        "tuning": {method: {f"{rate:g}": values for rate, values in by.items()} for method, by in found.items()},
        "trained": trained,
        "measures": summarise(measured, seeds),
        "values": {
            method: {name: {" ".join(map(str, of)): value for of, value in by.items()} for name, by in each.items()}
            for method, each in measured.items()
        },
    }
    options.results.mkdir(parents=True, exist_ok=True)
    write_json(options.results / f"papers-{options.date}.json", facts)
    atomic_write(options.results / f"papers-{options.date}.md", table(facts))
    print(table(facts))


if __name__ == "__main__":
    main()
