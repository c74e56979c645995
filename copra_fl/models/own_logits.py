"""Compute a language model's own logits from those of its output layer.

Granite, MiniCPM3                 divided by ``logits_scaling``; HyperCLOVA X multiplies by it
Cohere, Falcon-H1, Muse           multiplied by ``logit_scale``, ``lm_head_multiplier``, ``output_multiplier``
Gemma 2 and later, NanoChat       c tanh(logits / c), with c = ``final_logit_softcapping``
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedConfig

MULTIPLIERS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
CAPS = ("final_logit_softcapping", "logits_soft_cap")  # RecurrentGemma has the second one
#: models whose configuration has a factor that their forward pass does not use
UNUSED = {"mpt": "logit_scale"}


def own_logits(config: PreTrainedConfig, logits: Tensor) -> Tensor:
    """Return the logits of the model with `config` from those of its output layer; the same ones if they are equal."""
    factor, cap = logit_factor(config), logit_cap(config)
    if factor != 1:
        logits = logits * factor
    return torch.tanh(logits / cap) * cap if cap else logits


def logit_factor(config: PreTrainedConfig) -> float:
    """Return the number that the model multiplies the logits of its output layer by."""
    text = config.get_text_config()
    unused = UNUSED.get(text.model_type)
    factor = 1.0
    for name in MULTIPLIERS:
        if name != unused and (value := getattr(text, name, None)) is not None:
            factor *= value
    scaling = getattr(text, "logits_scaling", None) or 1.0
    return factor * scaling if text.model_type == "hyperclovax" else factor / scaling


def logit_cap(config: PreTrainedConfig) -> float | None:
    """Return c of the model's c tanh(logits / c); None for a model that leaves its logits unbounded."""
    text = config.get_text_config()
    return next((cap for name in CAPS if (cap := getattr(text, name, None))), None)
