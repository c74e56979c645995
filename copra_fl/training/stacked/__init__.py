"""Adapters of many clients on one shared base, in one forward and one backward pass.

    rows       client 0 | client 1 | ...     the batch of each client, all padded to one size
    base       y = x W^T                      one product over all rows
    adapters   y_c += s x_c A_c^T B_c^T       batched over the clients whose gate is open

Each adapter sees only the rows of its own client, so the gradient of the sum of the clients' losses contains each
client's own gradient. The base shares its tensors with the plain PEFT model (`AdaptedModel`), which stays unchanged and
is the reference for this one.
"""

from copra_fl.training.stacked.chain import NotStackable
from copra_fl.training.stacked.model import StackedModel

__all__ = ["NotStackable", "StackedModel"]
