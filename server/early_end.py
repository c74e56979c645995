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


def validation_accuracies(config: Config, records: Sequence[RoundRecord]) -> list[float]:
    """Return the validation accuracy of every round that eval-every evaluates.

    The last round of a run that was made longer later is evaluated too, but not in a run that has always been as long.
    """
    every = config.evaluation.eval_every
    return [record.validation.accuracy for record in records if record.validation and record.round % every == 0]


def reason_to_end(config: Config, records: Sequence[RoundRecord]) -> str | None:
    """Return the reason why the run ends after `records`; None if it goes on, or after the last of num-rounds.

    The last record of a run that was made longer has no reason, because its round was the last of num-rounds then.
    """
    if not records:
        return None
    return records[-1].ended_early or end_reason(config, len(records), validation_accuracies(config, records))
