"""Count the bytes that autograd keeps for the backward pass: the activations of a forward pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class KeptBytes:
    """Counter of the tensors that autograd keeps, each storage once.

    Blocks that the backward pass computes again (``gradient-checkpointing``) are not counted.

    Attributes:
        peak: the largest count of a block of `counting`, in bytes; 0 before the first.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        """The storages of `known` are not counted: they exist anyway, as parameters do."""
        self._known = _storages(known)
        self.peak = 0.0

    @contextmanager
    def counting(self, share: float = 1.0, also_known: Iterable[Tensor] = ()) -> Iterator[None]:
        """Count what the block keeps, times `share`; of `also_known`, too, the storages are not counted."""
        kept: dict[int, int] = {}
        known = self._known | _storages(also_known)

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in known:
                kept[storage._cdata] = storage.nbytes()
            return tensor

        with saved_tensors_hooks(keep, lambda tensor: tensor):
            yield
        self.peak = max(self.peak, share * sum(kept.values()))


def _storages(tensors: Iterable[Tensor]) -> set[int]:
    return {tensor.untyped_storage()._cdata for tensor in tensors}
