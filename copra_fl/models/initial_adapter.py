"""The adapter that a federation starts from: the model's own, or one with the fixed B and A of a rule with a core."""

from __future__ import annotations

import torch

from copra_fl.adapters.state import Adapter, part_of
from copra_fl.aggregation import find_rule
from copra_fl.config import Config
from copra_fl.data.federated import FederatedData
from copra_fl.models.adapted import AdaptedModel
from copra_fl.models.fed_sb_init import core_start
from copra_fl.seeding import derive


def initial_adapter(model: AdaptedModel, data: FederatedData, config: Config) -> Adapter:
    """Return the adapter that a federation of `config` starts from.

    `model` is new. The validation examples of the server's `data` give the gradient, for a rule that needs one.
    """
    match find_rule(config.aggregation.rule).core:
        case "gradient":
            return core_start(model, data.examples, data.server_validation, config.evaluation.eval_batch_size)
        case "orthogonal":
            return orthogonal_bases(model.read_adapter(), config.federation.seed)
        case _:
            return model.read_adapter()


def orthogonal_bases(adapter: Adapter, seed: int) -> Adapter:
    """Return `adapter` with random B (d, r) of orthonormal columns and A (r, k) of orthonormal rows.

    They are the Q of normal matrices, that is, normal vectors after Gram and Schmidt, so that the heads of a module
    change W0 in orthogonal directions. If r is larger than d or k, the other side is orthonormal. The matrices come
    from the ``bases`` stream of `seed`.
    """
    stream = torch.Generator().manual_seed(derive(seed, "bases"))
    bases = {}
    for name, tensor in sorted(adapter.items()):
        if part_of(name) in ("A", "B"):
            bases[name] = torch.nn.init.orthogonal_(torch.empty_like(tensor), generator=stream)
    return adapter | bases
