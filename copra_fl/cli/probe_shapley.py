"""`copra-fl probe shapley`: Shapley values of the layers of finished runs' adapters."""

from __future__ import annotations

from typing import Annotated

import typer

from copra_fl.cli import probe

StandardErrorOption = Annotated[
    float,
    typer.Option(
        "--standard-error",
        min=0,
        help="Stop sampling at this standard error, in accuracy (0.005 = half a percentage point).",
    ),
]
MaxPairsOption = Annotated[int, typer.Option("--max-pairs", min=2, help="Maximum number of pairs of sampled orders.")]
SeedOption = Annotated[
    int, typer.Option("--seed", min=0, help="Random seed for sampling orders; the same for all runs.")
]
ModulesOption = Annotated[
    bool, typer.Option("--modules", help="Also compute the value of each module, shown as a map; takes longer.")
]


def shapley(
    runs: probe.RunsArgument,
    split: probe.SplitOption = probe.SplitName.SERVER_VALIDATION,
    modules: ModulesOption = False,
    standard_error: StandardErrorOption = 0.005,
    max_pairs: MaxPairsOption = 256,
    seed: SeedOption = 0,
    output: probe.OutputOption = None,
) -> None:
    """Compute Shapley values of layers: exactly up to 10 layers, else from sampled orders with standard errors.

    Several runs, for example LoRA and CopRA with the same seed, are shown side by side.
    """
    with probe.opened(runs) as open_runs, probe.progress_bar() as progress:
        from copra_fl.probes import shapley  # slow to import

        findings = shapley.probe(open_runs, split.value, modules, standard_error, max_pairs, seed, progress)
    probe.leave(findings, output or runs[0])
