"""Client-level differential-privacy accounting.

A round is the Gaussian mechanism on a Poisson sample (DP-FedAvg; McMahan et al., arXiv 1710.06963): each client takes
part with probability q, its change is clipped to norm C, and the sum gets noise of standard deviation z C. Neighbouring
federations differ by one client with all of its examples. Rounds are composed by their privacy loss distributions
(Koskela et al., arXiv 1906.03049; dp-accounting); the resulting epsilon is an upper bound.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec

from copra_fl.config import ConfigError
from copra_fl.provenance import pip_install

#: message for a machine without the package that counts
MISSING = f"dp-clip needs the package dp-accounting: {pip_install('privacy')}"


@dataclass(frozen=True)
class Release:
    """A round with a published result.

    Attributes:
        sampling_rate: q.
        noise_multiplier: z.
    """

    sampling_rate: float
    noise_multiplier: float


def check_installed() -> None:
    """Raise ConfigError if dp-accounting is missing."""
    if find_spec("dp_accounting") is None:
        raise ConfigError(MISSING)


def epsilon(releases: Iterable[Release], delta: float) -> float:
    """Return the epsilon at `delta` of all `releases` together. Raises ConfigError if dp-accounting is missing."""
    try:
        import dp_accounting  # slow, and only private runs need it
        from dp_accounting.pld import PLDAccountant
    except ImportError:
        raise ConfigError(MISSING) from None
    accountant = PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    for release, count in Counter(releases).items():
        gaussian = dp_accounting.GaussianDpEvent(release.noise_multiplier)
        accountant.compose(dp_accounting.PoissonSampledDpEvent(release.sampling_rate, gaussian), count)
    return float(accountant.get_epsilon(delta))
