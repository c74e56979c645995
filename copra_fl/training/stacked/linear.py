"""A linear layer of the base with one adapter per client."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peft.tuners import lora
from torch import Tensor, nn
from torch.nn import functional as F

from copra_fl.adapters import residual
from copra_fl.training.stacked.step import ForwardContext, on_device


@dataclass(frozen=True)
class FrozenProduct:
    """The product y_c = scale_c x_c A_c^T B_c^T of adapters that are not trained.

    A (c, r, in) and B (c, out, r), or (r, in) and (out, r) if all clients have the same; scale (c, 1, 1).
    """

    a: Tensor
    b: Tensor
    scale: Tensor

    def add(self, y: Tensor, x: Tensor) -> None:
        """Add the product for x (clients, N, in) to y (clients, N, out), in place."""
        y += (x @ self.a.mT * self.scale) @ self.b.mT

    def add_gradient(self, grad_x: Tensor, grad_y: Tensor) -> None:
        """Add the gradient of the product with respect to x to `grad_x`, in place."""
        grad_x += (grad_y @ self.b * self.scale) @ self.a


class AdapterProduct(torch.autograd.Function):
    """y_c = x_c W^T + b + scale_c (noise x)_c A_c^T B_c^T, in few memory passes.

    x (c, N, in), A (c, r, in), B (c, out, r), scale (c, 1, 1), noise (c, N, in) or None; scale and noise in x's dtype,
    to which A and B are converted. A client whose adapter is off has scale 0. For a factor that needs no gradient,
    nothing is stored or computed. `frozen` is added as well.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: Tensor,
                noise: Tensor | None, frozen: FrozenProduct | None) -> Tensor:  # fmt: skip
        a, b = a.to(x.dtype), b.to(x.dtype)
        y = F.linear(x, weight, bias)
        adapted = x if noise is None else x * noise
        inner = torch.bmm(adapted, a.mT).mul_(scale)
        y.baddbmm_(inner, b.mT)
        if frozen is not None:
            frozen.add(y, x)
        ctx.frozen = frozen
        for_a, for_b = ctx.needs_input_grad[3:5]
        ctx.save_for_backward(weight, a, b, scale, noise, adapted if for_a else None, inner if for_b else None)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        weight, a, b, scale, noise, adapted, inner = ctx.saved_tensors
        for_x, for_a, for_b = (ctx.needs_input_grad[index] for index in (0, 3, 4))
        grad_x = grad_a = grad_b = None
        if for_b:
            grad_b = torch.bmm(grad.mT, inner)
        if for_a or for_x:
            grad_inner = torch.bmm(grad, b).mul_(scale)
        if for_a:
            grad_a = torch.bmm(grad_inner.mT, adapted)
        if for_x:
            grad_x = grad @ weight
            if noise is None:
                grad_x.baddbmm_(grad_inner, a)
            else:
                grad_x += torch.bmm(grad_inner, a).mul_(noise)
            if ctx.frozen is not None:
                ctx.frozen.add_gradient(grad_x, grad)
        return grad_x, None, None, grad_a, grad_b, None, None, None


class StackedLinear(nn.Module):
    """A linear layer of the base with an adapter for each client of the current step.

    `residual_factors` is `AdaptedModel.residual_factors`. Without an active adapter the base layer runs with its hook,
    which adds the residual. Clients whose adapter is off get the product of the step's `Fallback`, if it has one.
    """

    def __init__(
        self,
        name: str,
        module: lora.Linear,
        group: int,
        context: ForwardContext,
        residual_factors: Mapping[str, tuple[Tensor, ...]],
    ) -> None:
        super().__init__()
        self.base = module.get_base_layer()
        self.name = name
        self.group = group
        self.scaling = module.scaling["default"]
        self.dropout = getattr(module.lora_dropout["default"], "p", 0.0)
        self.context = context
        self.residual_factors = residual_factors

    def forward(self, x: Tensor) -> Tensor:
        step, clients = self.context.step, self.context.clients
        scale, frozen = step.scales(self.group, clients), self._frozen(x.dtype)
        has_product = scale is not None or frozen is not None
        by_client = x.reshape(len(clients), -1, x.shape[-1]) if has_product else x
        if scale is None:
            y = self.base(by_client)
            if frozen is not None:
                frozen.add(y, by_client)
            return y.view(*x.shape[:-1], -1)
        a, b = self._factors(step.stack.tensors, clients)
        if self.context.record is not None:
            with torch.no_grad():
                positions = np.flatnonzero(step.on[clients.start : clients.stop, self.group])
                inner = torch.bmm(by_client, a.to(x.dtype).mT)
                self.context.record(self.name, clients.start + positions, inner[on_device(positions, inner.device)])
        noise = self._noise(x) if step.dropout and self.dropout else None
        weight, bias = self.base.weight, self.base.bias
        y = AdapterProduct.apply(by_client, weight, bias, a, b, (self.scaling * scale).to(x.dtype), noise, frozen)
        if self.name in self.residual_factors:
            y = y + residual.product(by_client, self.residual_factors[self.name])
        return y.view(*x.shape[:-1], -1)

    def _frozen(self, dtype: torch.dtype) -> FrozenProduct | None:
        """Return the product of the step's `Fallback` for clients whose adapter is off; None without such a client."""
        fallback, clients = self.context.step.fallback, self.context.clients
        scale = self.context.step.fallback_scales(self.group, clients)
        if fallback is None or scale is None:
            return None
        a, b = self._factors(fallback.tensors, None if fallback.shared else clients)
        return FrozenProduct(a.to(dtype), b.to(dtype), (self.scaling * scale).to(dtype))

    def _factors(self, tensors: Mapping[str, Tensor], clients: range | None) -> tuple[Tensor, Tensor]:
        """Return A, or R A, and B of `clients`; None: `tensors` are those of one adapter."""
        names = {part: f"{self.name}.lora_{part}.weight" for part in "ABRS"}
        parts = {part: tensors[name] for part, name in names.items() if name in tensors}
        if clients is not None and len(clients) < len(parts["A"]):
            parts = {part: tensor[clients.start : clients.stop] for part, tensor in parts.items()}
        return (_times_core(parts["A"], parts["R"], parts.get("S")) if "R" in parts else parts["A"]), parts["B"]

    def _noise(self, x: Tensor) -> Tensor:
        """Return the dropout factors of the clients' rows, drawn from each client's stream over its own tokens only.

        A client whose adapter is off draws nothing.
        """
        step, clients = self.context.step, self.context.clients
        noise = x.new_zeros(len(clients), len(x) // len(clients), *x.shape[1:])
        for client_noise, position in zip(noise, clients, strict=True):
            if not step.on[position, self.group]:
                continue
            num_rows, num_tokens = self.context.rows.shapes[position]
            unpadded = client_noise[:num_rows, :num_tokens] if x.dim() == 3 else client_noise[:num_rows]
            drawn = torch.empty(unpadded.shape, device=x.device)
            drawn.bernoulli_(1 - self.dropout, generator=step.dropout[position])
            unpadded.copy_(drawn.div_(1 - self.dropout))
        return noise.view(len(noise), -1, x.shape[-1])


def _times_core(a: Tensor, core: Tensor, scales: Tensor | None) -> Tensor:
    """Return R A for A (r, in) or (c, r, in), block by block (`adapters.core`)."""
    size = core.shape[-1]
    blocks = core.reshape(-1, size, size)
    if scales is not None:
        blocks = blocks * scales.reshape(-1, 1, 1)
    return torch.bmm(blocks, a.reshape(-1, size, a.shape[-1])).view_as(a)
