"""The privacy budget of a run, and the secret seed of its noise.

The noise seed must be secret: whoever knows it can subtract the noise. Every node knows the run's seed, so noise and
sampling of a private run come from streams of a secret instead. It is drawn when the run begins, stored in the run's
folder for a resume, never sent, and removed when the run is finished.
"""

from __future__ import annotations

import secrets
from bisect import bisect_right
from collections.abc import Iterable
from pathlib import Path

from copra_fl.aggregation.accounting import Release, epsilon
from copra_fl.config import ConfigError, PrivacyConfig
from copra_fl.files import atomic_write
from copra_fl.records import PrivacySpent

SECRET = "dp-secret"


class PrivacyBudget:
    """Differential privacy spent so far, and its limit. `spent` is that of the earlier rounds, in order."""

    def __init__(self, settings: PrivacyConfig, spent: Iterable[PrivacySpent]) -> None:
        self._settings = settings
        self._releases = [Release(spending.sampling_rate, spending.noise_multiplier) for spending in spent]

    def check(self, sampling_rate: float, num_rounds: int) -> None:
        """Raise ConfigError if `num_rounds` more rounds would exceed ``dp-budget``."""
        settings, release = self._settings, Release(sampling_rate, self._settings.dp_noise_multiplier)

        def epsilon_after(number: int) -> float:
            return epsilon([*self._releases, *[release] * number], settings.dp_delta)

        if num_rounds and settings.dp_budget and (total := epsilon_after(num_rounds)) > settings.dp_budget:
            num_fitting = bisect_right(range(1, num_rounds + 1), settings.dp_budget, key=epsilon_after)
            raise ConfigError(
                f"{num_rounds} more rounds would bring epsilon to {total:.3f} at delta = {settings.dp_delta:g}, more "
                f"than dp-budget = {settings.dp_budget:g}. {num_fitting} more rounds fit; set num-rounds accordingly, "
                f"or raise dp-noise-multiplier above {settings.dp_noise_multiplier:g}"
            )

    def spend(self, sampling_rate: float) -> PrivacySpent:
        """Count one more round, and return the privacy spent so far."""
        settings = self._settings
        self._releases.append(Release(sampling_rate, settings.dp_noise_multiplier))
        return PrivacySpent(
            epsilon=epsilon(self._releases, settings.dp_delta),
            delta=settings.dp_delta,
            sampling_rate=sampling_rate,
            noise_multiplier=settings.dp_noise_multiplier,
            clip=settings.dp_clip,
        )


def open_secret(directory: Path) -> int:
    """Return the secret of the run in `directory`; draw it if the file is missing. Only the owner can read it."""
    path = directory / SECRET
    if not path.exists():
        atomic_write(path, secrets.token_hex(32), mode=0o600)
    return int(path.read_text(encoding="ascii"), 16)


def remove_secret(directory: Path) -> None:
    """Remove the secret of a finished run."""
    (directory / SECRET).unlink(missing_ok=True)
