"""A global adapter with two gate groups and a head, and a valid update of it."""

from __future__ import annotations

import torch

from copra_fl.adapters.state import Update

GLOBAL = {"x.lora_A.weight": torch.zeros(2, 3), "y.lora_A.weight": torch.zeros(2, 3), "head.weight": torch.zeros(4)}
GROUP_OF = {"x.lora_A.weight": 0, "y.lora_A.weight": 1}

#: from `GLOBAL`: group 0 was on in all 3 steps, group 1 in none; 6 values moved by 1, the head by 0, 1, 2, 3
VALID = Update(
    7,
    {"x.lora_A.weight": torch.ones(2, 3), "head.weight": torch.arange(4.0)},
    12,
    (3, 0),
    {"loss": 1.25, "steps": 3.0, "seconds": 0.5, "distance": 20**0.5, "flops": 1e9},
)
