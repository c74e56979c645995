"""Hidden states of the plain base, kept: what is below a sample's lowest active adapter never changes.

The base is frozen and in eval mode, so the output of its block l for a sample whose adapters
up to l are all off is the same in every step, round and run. As training goes on adapters
come on lower and lower down, so where room is short the states of the highest blocks go first.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


class PrefixCache:
    """Outputs of the base's blocks by sample and block, at most `megabytes` of them.

    A state takes ``num_tokens * width`` values of `dtype`, however short its sample is.
    """

    def __init__(self, megabytes: int, num_tokens: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        capacity = max(1, int(megabytes * 1e6 / (num_tokens * width * dtype.itemsize)))
        self._states = torch.zeros(capacity, num_tokens, width, dtype=dtype, device=device)
        self._slots: dict[int, dict[int, int]] = {}
        self._used = 0

    def find(self, samples: np.ndarray, block: int) -> np.ndarray:
        """Where each sample's output of `block` is; -1 where it is not kept."""
        slots = self._slots.get(block, {})
        return np.array([slots.get(sample, -1) for sample in samples.tolist()])

    def load(self, slots: np.ndarray, num_tokens: int) -> Tensor:
        """(len(slots), num_tokens, width): the states there; anything finite where a slot is -1."""
        places = torch.from_numpy(slots.clip(0)).to(self._states.device)
        return self._states[:, :num_tokens].index_select(0, places)

    def store(self, samples: np.ndarray, block: int, states: Tensor) -> None:
        """Keep `states` (len(samples), T, width), as far as there is room for outputs of `block`."""
        chosen = {}
        for sample, row in {sample: row for row, sample in enumerate(samples.tolist())}.items():
            slot = self._free(block)
            if slot is None:
                break
            self._slots.setdefault(block, {})[sample] = slot
            chosen[slot] = row
        if chosen:
            places, rows = (torch.tensor(list(x), device=states.device) for x in (chosen, chosen.values()))
            self._states[places, : states.shape[1]] = states.index_select(0, rows)

    def _free(self, block: int) -> int | None:
        """An unused slot, or that of a state of a higher block."""
        if self._used < len(self._states):
            self._used += 1
            return self._used - 1
        highest = max((b for b, slots in self._slots.items() if slots), default=block)
        return self._slots[highest].popitem()[1] if highest > block else None
