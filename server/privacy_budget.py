"""The privacy of a run: what it has spent, what it may spend, and the secret that its noise comes from.

Noise hides nothing from who can draw it again. Every node knows the run's seed, so noise and sampling of a private run
come from streams below a secret instead: drawn when the run begins, kept in its folder for a resume, never sent, and
removed when the run is finished.
"""

from __future__ import annotations

import secrets
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path

from copra_fl.aggregation.accounting import Release, epsilon
from copra_fl.config import ConfigError, PrivacyConfig
from copra_fl.files import atomic_write
from server.journal import Row

SECRET = "dp-secret"


class Budget:
    """What the rounds in `rows`, and those to come, spend."""

    def __init__(self, settings: PrivacyConfig, rows: Sequence[Row]) -> None:
        self._settings = settings
        self._spent = [Release(row["privacy"]["sampling_rate"], row["privacy"]["noise_multiplier"]) for row in rows]

    def check(self, sampling_rate: float, num_rounds: int) -> None:
        """Raise ConfigError where `num_rounds` more of them would pass ``dp-budget``."""
        settings, release = self._settings, Release(sampling_rate, self._settings.dp_noise_multiplier)

        def after(number: int) -> float:
            return epsilon([*self._spent, *[release] * number], settings.dp_delta)

        if num_rounds and settings.dp_budget and (whole := after(num_rounds)) > settings.dp_budget:
            fitting = bisect_right(range(1, num_rounds + 1), settings.dp_budget, key=after)
            raise ConfigError(
                f"{num_rounds} more rounds would bring epsilon to {whole:.3f} at delta = {settings.dp_delta:g}, more "
                f"than dp-budget = {settings.dp_budget:g}. {fitting} more rounds fit; a larger dp-noise-multiplier "
                f"(it is {settings.dp_noise_multiplier:g}) lets more in"
            )

    def spend(self, sampling_rate: float) -> Row:
        """A round more: what has been spent by now, for its journal line."""
        settings = self._settings
        self._spent.append(Release(sampling_rate, settings.dp_noise_multiplier))
        return {
            "epsilon": epsilon(self._spent, settings.dp_delta),
            "delta": settings.dp_delta,
            "sampling_rate": sampling_rate,
            "noise_multiplier": settings.dp_noise_multiplier,
            "clip": settings.dp_clip,
        }


def open_secret(directory: Path) -> int:
    """The secret of the run in `directory`, readable by its owner only; drawn if there is none."""
    path = directory / SECRET
    if not path.exists():
        atomic_write(path, secrets.token_hex(32), mode=0o600)
    return int(path.read_text(encoding="ascii"), 16)


def forget_secret(directory: Path) -> None:
    """Remove the secret of a finished run."""
    (directory / SECRET).unlink(missing_ok=True)
