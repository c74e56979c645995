"""The privacy budget of a run: every release is charged, and written to ``privacy.jsonl`` before it is published.

A round is released when its noisy adapter goes to the clients or into a checkpoint, and where nodes add the noise when
they are asked to unmask the sum. A round that is interrupted after its charge and done again draws another sample and
other noise, and is charged again: two releases of one round. ``dp-budget`` limits the epsilon towards those who do not
know the samples; that towards the server is in the records.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from copra_fl.aggregation.accounting import Release, epsilon, epsilon_of_participants
from copra_fl.config import ConfigError, PrivacyConfig
from copra_fl.files import DamagedFile, append_line, atomic_write
from copra_fl.records import DamagedRecord, PrivacyCharge, PrivacySpent

LEDGER = "privacy.jsonl"


class PrivacyBudget:
    """Differential privacy spent by the run in `directory` so far, and its limit.

    `num_rounds` is the number of finished rounds. Raises DamagedFile if the file has fewer releases than that.
    """

    def __init__(self, directory: Path, settings: PrivacyConfig, num_rounds: int) -> None:
        self._ledger = directory / LEDGER
        self._settings = settings
        spent = read_ledger(self._ledger)
        if len(spent) < num_rounds:
            raise DamagedFile(self._ledger, f"it has {len(spent)} releases, and the run has {num_rounds} rounds")
        if self._ledger.exists():  # without half a line at the end: the next release begins a new one
            atomic_write(self._ledger, "".join(charge.to_json() + "\n" for charge in spent))
        self._releases = [Release(charge.sampling_rate, charge.noise_multiplier) for charge in spent]
        self._participants = [(charge.clients, charge.noise_multiplier) for charge in spent]

    @property
    def is_charged(self) -> bool:
        """True if the run has had a release."""
        return bool(self._releases)

    def reason_to_end(self, sampling_rate: float) -> str | None:
        """Return the reason to end the run if one more round would exceed ``dp-budget``; otherwise None.

        Releases of interrupted rounds count, so the last of num-rounds may not fit any more.
        """
        settings = self._settings
        if settings.dp_budget and self._epsilon_after(sampling_rate, 1) > settings.dp_budget:
            return f"no round more fits into dp-budget = {settings.dp_budget:g}"
        return None

    def _epsilon_after(self, sampling_rate: float, num_rounds: int) -> float:
        """Return the epsilon of the releases so far and of `num_rounds` more."""
        release = Release(sampling_rate, self._settings.dp_noise_multiplier)
        return epsilon([*self._releases, *[release] * num_rounds], self._settings.dp_delta)

    def check(self, sampling_rate: float, num_rounds: int) -> None:
        """Raise ConfigError if `num_rounds` more rounds would exceed ``dp-budget``."""
        settings, epsilon_after = self._settings, partial(self._epsilon_after, sampling_rate)
        if settings.dp_budget and (total := epsilon_after(num_rounds)) > settings.dp_budget:
            num_fitting = bisect_right(range(1, num_rounds + 1), settings.dp_budget, key=epsilon_after)
            raise ConfigError(
                f"{num_rounds} more rounds would bring epsilon to {total:.3f} at delta = {settings.dp_delta:g}, more "
                f"than dp-budget = {settings.dp_budget:g}. {num_fitting} more rounds fit; set num-rounds accordingly, "
                f"or raise dp-noise-multiplier above {settings.dp_noise_multiplier:g}"
            )

    def charge(self, sampling_rate: float, clients: Sequence[int]) -> PrivacySpent:
        """Charge one more release, write it to the disk, and return the privacy spent so far.

        `clients` are those that were sampled. Raises ConfigError for a release that would exceed ``dp-budget``: nodes
        that join late can raise the sampling rate.
        """
        settings = self._settings
        self.check(sampling_rate, num_rounds=1)
        self._releases.append(Release(sampling_rate, settings.dp_noise_multiplier))
        self._participants.append((tuple(clients), settings.dp_noise_multiplier))
        towards_server = None
        if settings.is_local:
            towards_server = epsilon_of_participants(self._participants, settings.dp_delta)
        spent = PrivacySpent(
            epsilon=epsilon(self._releases, settings.dp_delta),
            server_epsilon=towards_server,
            delta=settings.dp_delta,
            sampling_rate=sampling_rate,
            noise_multiplier=settings.dp_noise_multiplier,
            clip=settings.dp_clip,
        )
        append_line(self._ledger, PrivacyCharge(**vars(spent), clients=self._participants[-1][0]).to_json())
        return spent


def read_ledger(path: Path) -> list[PrivacyCharge]:
    """Return the releases in ``privacy.jsonl``. Half a line at the end is of a release that was not published.

    Raises DamagedFile for any other damaged line.
    """
    lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else [""]
    try:
        return [PrivacyCharge.from_json(line) for line in lines[:-1]]
    except DamagedRecord as damage:
        raise DamagedFile(path, str(damage)) from damage
