"""SCAFFOLD (Karimireddy et al., arXiv 1910.06378): control variates against what clients differ in.

    client   g <- g + c - c_k in each local step;    c_k+ = mean of its own gradients g over the round's steps
    server   c <- c + 1/N sum_k (c_k+ - c_k)

c_k+ is measured along the local path, as in the paper's option I, and not derived from the distance walked (option II),
so that it is right for any local optimiser. A tensor that was off or not trained keeps its control variate.
"""

from __future__ import annotations

from collections.abc import Sequence

from copra_fl.adapters.state import Adapter


def next_control(control: Adapter, changes: Sequence[Adapter], num_clients: int) -> Adapter:
    """The global control variate after a round; `changes` are c_k+ - c_k of its clients, of `num_clients` N in all."""
    return {
        name: (old + sum(c[name].double() for c in changes if name in c) / num_clients).float()
        for name, old in control.items()
    }
