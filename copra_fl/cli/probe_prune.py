"""`copra-fl probe prune`: accuracy of finished runs with pruned adapters."""

from __future__ import annotations

from typing import Annotated

import typer

from copra_fl.cli import probe
from copra_fl.cli.probe_shapley import MaxPairsOption, SeedOption, StandardErrorOption

SubsetsOption = Annotated[
    int,
    typer.Option("--subsets", min=2, help="Maximum number of subsets of layers of one size; all of them if fewer."),
]


def prune(
    runs: probe.RunsArgument,
    split: probe.SplitOption = probe.SplitName.SERVER_VALIDATION,
    standard_error: StandardErrorOption = 0.005,
    max_pairs: MaxPairsOption = 256,
    subsets: SubsetsOption = 32,
    seed: SeedOption = 0,
    output: probe.OutputOption = None,
) -> None:
    """Evaluate adapters of which only some layers, one target module, a part of the rank, or the largest values remain.

    The elastic score is the mean over random subsets with 1, 3/4, 1/2 and 1/4 of the layers.

    Several runs, for example LoRA and CopRA with the same seed, are shown side by side.
    """
    with probe.opened(runs) as open_runs, probe.progress_bar() as progress:
        from copra_fl.probes import prune  # slow to import

        findings = prune.probe(open_runs, split.value, standard_error, max_pairs, subsets, seed, progress)
    probe.leave(findings, output or runs[0])
