"""`copra-fl probe prune`: accuracy of finished runs with pruned adapters."""

from __future__ import annotations

from copra_fl.cli import probe
from copra_fl.cli.probe_shapley import MaxPairsOption, SeedOption, StandardErrorOption


def prune(
    runs: probe.RunsArgument,
    split: probe.SplitOption = probe.SplitName.SERVER_VALIDATION,
    standard_error: StandardErrorOption = 0.005,
    max_pairs: MaxPairsOption = 256,
    seed: SeedOption = 0,
    output: probe.OutputOption = None,
) -> None:
    """Evaluate adapters of which only some layers, one target module, or the largest values are kept.

    Several runs, for example LoRA and CopRA with the same seed, are shown side by side.
    """
    with probe.opened(runs) as open_runs, probe.progress_bar() as progress:
        from copra_fl.probes import prune  # slow to import

        findings = prune.probe(open_runs, split.value, standard_error, max_pairs, seed, progress)
    probe.leave(findings, output or runs[0])
