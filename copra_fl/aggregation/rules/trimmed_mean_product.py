"""Coordinate-wise trimmed mean of products (trimmed mean: Yin et al., arXiv 1803.01498) dW_i = s B_i A_i, in rank r.

    D_jl = mean of dW_1jl ... dW_Kjl without the floor(beta K) largest and smallest, K clients that trained the module
    s B A <- the best rank-r approximation of D

beta is the parameter ``trim-fraction``. As `median_product`, with the trimmed mean in place of the median: equal
products count as equal, whatever their factors. Unweighted; the head is as in `trimmed_mean`.
Traffic, up and down: r_i (d + k) per module.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from copra_fl.aggregation.rule import Outcome, Round, Rule
from copra_fl.aggregation.rules.median_product import factors_of_products
from copra_fl.aggregation.rules.trimmed_mean import trimmed, trimmed_mean
from copra_fl.config import option


@dataclass(frozen=True)
class Parameters:
    trim_fraction: float = option(0.2, "share beta of the products' values to drop at each end", low=0, high=0.49)


def trimmed_mean_product(round_: Round) -> Outcome:
    """Return the best factors of the trimmed mean of each module's products, and the trimmed mean of the head."""
    parameters: Parameters = round_.parameters
    center = partial(trimmed, fraction=parameters.trim_fraction)
    return Outcome(trimmed_mean(round_).adapter | factors_of_products(round_, center))


RULE = Rule(
    "trimmed-mean-product", trimmed_mean_product, Parameters, unequal_ranks=True, averages=False, keeps_factors=False
)
