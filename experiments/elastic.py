"""Elastic adapters in a federation: do CopRA's adapters with fewer layers beat LoRA's, repaired after pruning?

Devices keep some layers of one adapter. Its elastic score (`probes.elastic`) is measured for each run. The adapters of
the first method, the rival, are also repaired for each subset of the layers: all clients train the layers that are
kept, and the head, for one epoch in rounds like those of the run, with FedAvg and plain LoRA. A repair costs a
federation of its own for each subset; CopRA's promise is to need none.

    copra-fl study passes --grids partial --output runs/passes
    python -m experiments.elastic runs/passes/partial/fashion/12x10/test --date 20261128

The folder is that of a comparison. A finished run's measures are kept in its folder, so the command can be stopped and
started again.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from copra_fl import startup

startup.prepare()

from copra_fl import provenance
from copra_fl.adapters.state import PEFT_PREFIX, Adapter
from copra_fl.aggregation.rules.fedavg import weighted_average
from copra_fl.files import write_json
from copra_fl.probes import pruned_adapters
from copra_fl.probes.elastic import subsets
from copra_fl.probes.open_run import OpenRun, open_run
from copra_fl.probes.pruned_adapters import SHARES, size_of
from copra_fl.seeding import generator
from copra_fl.training.engine import engine_of, train_all
from copra_fl.training.evaluation import evaluate_each
from copra_fl.training.plan import Plan, Start
from experiments import findings

RESULTS = Path(__file__).parent / "results"
#: arguments of the shortest run, with paths that tests/test_experiments.py makes
TINY = "{comparison} --methods lora,copra --seeds 0 --subsets 1 --date today --results {folder}"
#: share of the layers -> mean test accuracy over the subsets
Scores = dict[str, float]


def rounds_per_epoch(run: OpenRun) -> int:
    """Return the number of rounds in which the client with the most examples sees all of them once."""
    training = run.config.training
    return -(-max(map(len, run.data.train)) // (training.batch_size * training.local_steps))


def repair(run: OpenRun, modules: Sequence[str], rounds: int) -> tuple[Adapter, float]:
    """Train the final adapter with only `modules` in it for some rounds; return it and its test accuracy.

    The rounds continue those of the run: their batches are new, and the moments of the optimizers begin anew.
    """
    config = run.config.changed(
        target_modules=",".join(module.removeprefix(PEFT_PREFIX) for module in modules),
        local_training="lora",
        num_rounds=run.num_rounds + rounds,
    )
    engine = engine_of(config, len(run.data.label_names))
    adapter = {name: run.adapter[name] for name in engine.model.read_adapter()}
    clients = tuple(run.sampled(run.num_rounds))
    starts = dict.fromkeys(clients, Start(adapter))
    for server_round in range(run.num_rounds + 1, config.federation.num_rounds + 1):
        plan = Plan(server_round, clients, config)
        updates = train_all(engine, run.data, plan, starts)
        adapter = weighted_average(adapter, updates, config.aggregation.weighting, engine.model.group_of)
        starts = {update.client: Start(adapter, optimizer=update.optimizer) for update in updates}
    [metrics] = evaluate_each(engine, [adapter], run.data, run.indices("test"), config.evaluation.eval_batch_size)
    return adapter, metrics["accuracy"]


def kept_modules(run: OpenRun, max_subsets: int) -> dict[float, list[list[str]]]:
    """Return share -> the modules of each random subset of the layers; the same for all runs with as many layers."""
    layers = pruned_adapters.layers(run.adapter)
    sizes = {share: size_of(share, len(layers)) for share in SHARES}
    return {
        share: [
            [module for modules, keep in zip(layers.values(), row, strict=True) if keep for module in modules]
            for row in subsets(len(layers), size, max_subsets, generator(0, "elastic", len(layers), size))
        ]
        for share, size in sizes.items()
    }


def score_pruned(run: OpenRun, kept: Sequence[Sequence[str]]) -> float:
    """Return the mean test accuracy of the final adapter with each subset of its modules."""
    scores = run.score([pruned_adapters.keep(run.adapter, modules) for modules in kept], "test")
    return fmean(metrics["accuracy"] for metrics in scores)


def score_repaired(run: OpenRun, kept: Sequence[Sequence[str]]) -> float:
    """Return the mean test accuracy after a repair of each subset; the whole adapter needs none."""
    if len(kept[0]) == len(pruned_adapters.adapted_modules(run.adapter)):
        return score_pruned(run, kept)
    return fmean(repair(run, modules, rounds_per_epoch(run))[1] for modules in kept)


#: state of an adapter -> how its subsets of modules are scored
STATES = {"as trained": score_pruned, "repaired": score_repaired}


def measured_once(folder: Path, max_subsets: int, state: str) -> Scores:
    """Return share of the layers -> score of the run in `folder`, which keeps them."""
    path = folder / f"elastic-{max_subsets}-{state.replace(' ', '-')}.json"
    if not path.exists():
        print(f"{folder.name}, {state}", file=sys.stderr)
        run = open_run(folder)
        kept = kept_modules(run, max_subsets)
        write_json(path, {str(share): STATES[state](run, subsets) for share, subsets in kept.items()})
    scores: Scores = json.loads(path.read_text(encoding="utf-8"))
    return scores


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the runs of a comparison, and write ``elastic-SPLIT-DATE.json``."""
    parser = argparse.ArgumentParser(prog="python -m experiments.elastic", description=__doc__.partition("\n")[0])
    parser.add_argument("comparison", type=Path, help="folder of a comparison, SPLIT/REGIME/test of a study")
    parser.add_argument("--methods", default="lora,copra,anchored,stochastic-depth", help="the first is the rival")
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--subsets", type=int, default=4, help="maximum number of subsets of each size")
    parser.add_argument("--date", required=True, help="date in the name of the results")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args(arguments)
    methods, seeds = options.methods.split(","), options.seeds.split(",")
    split = options.comparison.absolute().parts[-3]
    measured = {}
    for method in methods:
        states = STATES if method == methods[0] else ["as trained"]
        folders = [options.comparison / f"{method}-seed{seed}" for seed in seeds]
        measured[method] = [
            {state: measured_once(folder, options.subsets, state) for state in states} for folder in folders
        ]
    facts = {
        "command": shlex.join(["python", "-m", "experiments.elastic", *(arguments or sys.argv[1:])]),
        "versions": provenance.versions(),
        "machine": provenance.machine(),
        "split": split,
        "subsets": options.subsets,
        "measured": measured,
    }
    write_json(options.results / f"elastic-{split}-{options.date}.json", facts)
    print(findings.elastic(facts).markdown())


if __name__ == "__main__":
    main()
