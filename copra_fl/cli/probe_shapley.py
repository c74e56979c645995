"""`copra-fl probe shapley`: what each layer of finished runs' adapters is worth."""

from __future__ import annotations

from typing import Annotated

import typer

from copra_fl.cli import probe

StandardErrorOption = Annotated[
    float,
    typer.Option("--standard-error", min=0, help="In accuracy, 0.005 is half a point: orders are drawn until then."),
]
MaxPairsOption = Annotated[int, typer.Option("--max-pairs", min=2, help="Pairs of orders drawn at most.")]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="Of the orders; the same for all runs.")]
ModulesOption = Annotated[bool, typer.Option("--modules", help="Each module's value too, as a map; takes longer.")]


def shapley(
    runs: probe.RunsArgument,
    split: probe.SplitOption = probe.SplitName.SERVER_VALIDATION,
    modules: ModulesOption = False,
    standard_error: StandardErrorOption = 0.005,
    max_pairs: MaxPairsOption = 256,
    seed: SeedOption = 0,
    output: probe.OutputOption = None,
) -> None:
    """Shapley values of layers: exact up to 10 layers, else from sampled orders with standard errors.

    Several runs, for example LoRA and CopRA of one seed, are shown side by side.
    """
    with probe.opened(runs) as open_runs, probe.progress_bar() as progress:
        from copra_fl.probes import shapley  # slow to import

        findings = shapley.probe(open_runs, split.value, modules, standard_error, max_pairs, seed, progress)
    probe.leave(findings, output or runs[0])
