"""Cache of the plain base's hidden states below each sample's lowest active adapter.

The base is frozen and in eval mode, so the output of its block l for a sample whose adapters up to l are all off is the
same in every step, round and run. CopRA switches on lower adapters as training goes on, so when the cache is full,
states of the highest blocks are evicted first.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


class HiddenStateCache:
    """Outputs of the base's blocks by sample and block, of at most `megabytes`.

    A state takes ``num_tokens * width`` values of `dtype`, even if its sample is shorter.
    """

    def __init__(self, megabytes: float, num_tokens: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        capacity = max(1, int(megabytes * 1e6 / (num_tokens * width * dtype.itemsize)))
        self._states = torch.zeros(capacity, num_tokens, width, dtype=dtype, device=device)
        self._slots: dict[int, dict[int, int]] = {}
        self._used = 0

    def find(self, samples: np.ndarray, block: int) -> np.ndarray:
        """Return the slot of each sample's output of `block`; -1 if it is not cached."""
        slots = self._slots.get(block, {})
        return np.array([slots.get(sample, -1) for sample in samples.tolist()])

    def load(self, slots: np.ndarray, num_tokens: int) -> Tensor:
        """Return the states (len(slots), num_tokens, width) in `slots`; for slot -1 arbitrary finite values."""
        places = torch.from_numpy(slots.clip(0)).to(self._states.device)
        return self._states[:, :num_tokens].index_select(0, places)

    def store(self, samples: np.ndarray, block: int, states: Tensor) -> None:
        """Store `states` (len(samples), T, width), as many as there are slots for outputs of `block`."""
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
        """Return an unused slot, or the slot of an evicted state of a higher block; None if there is neither."""
        if self._used < len(self._states):
            self._used += 1
            return self._used - 1
        highest = max((b for b, slots in self._slots.items() if slots), default=block)
        return self._slots[highest].popitem()[1] if highest > block else None
