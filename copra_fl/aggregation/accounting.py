"""What a run has told of its clients: client-level differential privacy, accounted.

A round is the Gaussian mechanism on a Poisson sample (DP-FedAvg; McMahan et al., arXiv 1710.06963): every client is in
with probability q, its change is clipped to norm C, and the sum gets noise of deviation z C. Neighbouring federations
differ in one client being there or not, with all of its examples. Rounds are composed by their privacy loss
distributions (Koskela et al., arXiv 1906.03049; dp-accounting), from above.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from copra_fl.config import ConfigError


@dataclass(frozen=True)
class Release:
    """A round whose result was seen: q and z."""

    sampling_rate: float
    noise_multiplier: float


def epsilon(releases: Iterable[Release], delta: float) -> float:
    """The epsilon at `delta` of all `releases` together. Raises ConfigError where the accountant is not installed."""
    try:
        import dp_accounting  # slow, and only private runs need it
        from dp_accounting.pld import PLDAccountant
    except ImportError:
        raise ConfigError("dp-clip needs an accountant: pip install 'copra-fl[privacy]'") from None
    accountant = PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    for release, count in Counter(releases).items():
        gaussian = dp_accounting.GaussianDpEvent(release.noise_multiplier)
        accountant.compose(dp_accounting.PoissonSampledDpEvent(release.sampling_rate, gaussian), count)
    return float(accountant.get_epsilon(delta))
