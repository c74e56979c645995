"""The early end of a run: at a target, or when the validation accuracy no longer improves.

The decision follows from the journal alone, so a resumed run ends where the whole run would.
"""

from __future__ import annotations

from collections.abc import Sequence

from copra_fl.config import Config
from copra_fl.records import RoundRecord


def end_reason(config: Config, server_round: int, accuracies: Sequence[float]) -> str | None:
    """Return the reason to end a run after `server_round`; None in the last of num-rounds, or to continue.

    `accuracies` are those of all evaluations so far, the newest last.
    """
    target, patience = config.evaluation.target_accuracy, config.evaluation.patience
    if not accuracies or server_round == config.federation.num_rounds:
        return None
    if target and accuracies[-1] >= target:
        return f"reached target-accuracy = {target:g}"
    if patience and len(accuracies) > patience and max(accuracies[-patience:]) <= max(accuracies[:-patience]):
        return f"no improvement in {patience} evaluation{'s' if patience > 1 else ''}"
    return None


def validation_accuracies(records: Sequence[RoundRecord]) -> list[float]:
    """Return the validation accuracy of every evaluated round."""
    return [record.validation.accuracy for record in records if record.validation]


def next_round(config: Config, records: Sequence[RoundRecord]) -> int | None:
    """Return the number of the round after `records`; None at the end of the run."""
    if len(records) == config.federation.num_rounds or (records and records[-1].ended_early):
        return None
    return len(records) + 1
