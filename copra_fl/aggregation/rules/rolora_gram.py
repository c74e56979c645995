"""RoLoRA with the Gram mean in the rounds that train B (ours, after LoRM).

    odd rounds    A as it is,    B <- (sum_i p_i B_i G_i)(sum_i p_i G_i)^+,    G_i = mean_t (A x_t)(A x_t)^T
    even rounds   B as it is,    A <- sum_i p_i A_i

RoLoRA: Chen et al., arXiv 2409.02346; LoRM: Salami et al., arXiv 2410.17961. As `ffa_lora_gram` in odd rounds. The Gram
mean of A would need k x k matrices, which LoRM sends; here it is the plain average.
Traffic, up and down: r d per module in odd rounds, and r^2 more up; r k in even ones.
"""

from __future__ import annotations

from copra_fl.aggregation.rule import Rule
from copra_fl.aggregation.rules.ffa_lora_gram import gram_average
from copra_fl.aggregation.rules.rolora import trained_parts

RULE = Rule("rolora-gram", gram_average, trains=trained_parts, linear=True, grams=True)
