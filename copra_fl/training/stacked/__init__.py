"""Many clients' adapters on one shared base, in one forward and one backward.

    rows       client 0 | client 1 | ...     each client's batch, all padded alike
    base       y = x W^T                      one product over all rows
    adapters   y_c += s x_c A_c^T B_c^T       batched over the clients whose gate is open

Each adapter sees only its own client's rows, so the gradient of the sum of the clients' losses
is each client's own gradient. The base is the plain PEFT model's, tensor for tensor; `AdaptedModel`
stays as it is beside it and is what this is checked against.
"""

from copra_fl.training.stacked.chain import NotStackable
from copra_fl.training.stacked.model import StackedModel

__all__ = ["NotStackable", "StackedModel"]
