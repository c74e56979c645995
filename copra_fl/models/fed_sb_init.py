"""Initial factors of Fed-SB (arXiv 2502.15436), computed as in LoRA-SB (arXiv 2411.19557).

    W0 + s B R A,    G = U S V^T the gradient of the loss with respect to W0,    B = U_r,    A = V_r^T,    R = 0

With these factors, W0 + s B R A can represent the best approximation of rank r of a step of full fine-tuning. LoRA-SB
starts from that step; here R starts at 0, so the first round starts from W0.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from copra_fl.adapters.state import Adapter
from copra_fl.aggregation.products import a_of, b_of, signed
from copra_fl.aggregation.ranks import pad
from copra_fl.models.adapted import AdaptedModel
from copra_fl.tasks import Examples


def core_start(model: AdaptedModel, examples: Examples, indices: np.ndarray, batch_size: int) -> Adapter:
    """Return the initial adapter, with factors from the gradient on the examples `indices` and the head of `model`."""
    adapter = model.read_adapter()
    for module, gradient in base_gradients(model, examples, indices, batch_size).items():
        core = adapter[f"{module}.lora_R.weight"]
        left, right = leading_directions(gradient, len(core))
        factors = {b_of(module): left.to("cpu", core.dtype), a_of(module): right.to("cpu", core.dtype)}
        adapter |= pad(factors, len(core)) | {f"{module}.lora_R.weight": torch.zeros_like(core)}
    return adapter


def base_gradients(model: AdaptedModel, examples: Examples, indices: np.ndarray, batch_size: int) -> dict[str, Tensor]:
    """Return adapted module -> gradient (d, k) of the mean loss over `indices` with respect to W0, with adapters off.

    Gradients are summed over batches in float32 or wider. Afterwards the base is frozen again and every gate is open.
    """
    weights = {name: linear.weight for name, linear in model.linears.items()}
    totals = {
        name: torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        for name, weight in weights.items()
    }
    num_targets = int(examples.num_targets[indices].sum())
    model.gates.set([False] * len(model.gates.names))
    for weight in weights.values():
        weight.requires_grad_(True)
    try:
        for start in range(0, len(indices), batch_size):
            batch = examples.batch(indices[start : start + batch_size], model.device)
            loss = model.losses(batch).sum() / num_targets
            for total, gradient in zip(totals.values(), torch.autograd.grad(loss, list(weights.values())), strict=True):
                total += gradient
    finally:
        for weight in weights.values():
            weight.requires_grad_(False)
        model.gates.open()
    return {name: total.T if isinstance(model.linears[name], Conv1D) else total for name, total in totals.items()}


def leading_directions(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the first `rank` left (d, r) and right (r, k) singular vectors of `matrix`, signed as `signed` does.

    All of them if there are fewer.
    """
    u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
    left, right = signed(u[:, :rank], vt[:rank])
    return left.contiguous(), right.contiguous()
