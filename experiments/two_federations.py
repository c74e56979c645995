"""Merge two federations: do global adapters that CopRA trained apart average better than LoRA's?

Two runs of one method with different seeds are two federations: their clients and examples differ, the first A and the
order of the data. The final adapters of each pair are merged with equal weights, as the average of their factors, which
needs connectivity, and as the average of their products, which needs twice the rank. Heads are averaged.

    copra-fl study passes --grids splits --output runs/passes
    python -m experiments.two_federations runs/passes/splits/iid/12x10/test --date 20261128

The folder is that of a comparison. Accuracies and losses are on its test data.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from functools import reduce
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from copra_fl import startup

startup.prepare()

from copra_fl import provenance
from copra_fl.adapters.state import Adapter
from copra_fl.files import write_json
from copra_fl.probes.merging import MERGE_METHODS, merge
from copra_fl.probes.open_run import Metrics, OpenRun, open_runs, plain_adapters, rank_of
from copra_fl.training.evaluation import evaluate_each
from experiments import two_federations_summary
from experiments.two_federations_summary import MERGES

RESULTS = Path(__file__).parent / "results"
#: arguments of the shortest run, with paths that tests/test_experiments.py makes
TINY = "{comparison} --methods lora,copra --seeds 0,1 --date today --results {folder}"


def measure(runs: Sequence[OpenRun]) -> dict[str, Any]:
    """Return the metrics of each run's final adapter, and those of the merges of each pair.

    All are measured on the test examples that are in no run's training data.
    """
    test = reduce(np.intersect1d, [run.indices("test") for run in runs])
    adapters, residual = plain_adapters([run.final for run in runs], [run.scaling for run in runs])

    def score(adapter: Adapter) -> Metrics:
        engine, batch_size = runs[0].plain_engines.of_rank(rank_of(adapter)), runs[0].config.evaluation.eval_batch_size
        engine.model.write_residual(residual)
        [metrics] = evaluate_each(engine, [adapter], runs[0].data, test, batch_size)
        return metrics

    return {
        "examples": len(test),
        "alone": [score(adapter) for adapter in adapters],
        "pairs": [
            {"members": pair, **{name: score(merged([adapters[run] for run in pair], name)) for name in MERGES}}
            for pair in combinations(range(len(runs)), 2)
        ],
    }


def merged(pair: Sequence[Adapter], name: str) -> Adapter:
    """Return two adapters merged with equal weights by one of `MERGE_METHODS`."""
    return merge(pair, MERGE_METHODS[name], [0.5, 0.5], scale=1, density=1, seed=0)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the pairs of each method of a comparison, and write ``two-federations-SPLIT-DATE.json``."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.two_federations", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("comparison", type=Path, help="folder of a comparison, SPLIT/REGIME/test of a study")
    parser.add_argument("--methods", default="lora,copra,anchored", help="the first is the rival")
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--date", required=True, help="date in the name of the results")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args(arguments)
    split = options.comparison.absolute().parts[-3]
    measured = {}
    for method in options.methods.split(","):
        print(method, file=sys.stderr)
        folders = [options.comparison / f"{method}-seed{seed}" for seed in options.seeds.split(",")]
        measured[method] = measure(open_runs(folders))
    facts = {
        "command": shlex.join(["python", "-m", "experiments.two_federations", *(arguments or sys.argv[1:])]),
        "versions": provenance.versions(),
        "machine": provenance.machine(),
        "split": split,
        "measured": measured,
    }
    write_json(options.results / f"two-federations-{split}-{options.date}.json", facts)
    print(two_federations_summary.table([facts]).markdown())


if __name__ == "__main__":
    main()
