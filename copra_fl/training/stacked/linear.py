"""A linear layer of the base with one adapter per client."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor, nn
from torch.nn import functional as F

from copra_fl.adapters import residual
from copra_fl.training.stacked.step import ForwardContext, Route


@dataclass(frozen=True)
class FrozenProduct:
    """The product y_c = scale_c x_c A_c^T B_c^T of adapters that are not trained, for the clients at `places`.

    A (c, r, in) and B (c, out, r), or (r, in) and (out, r) if all clients have the same; scale (c, 1, 1).
    """

    a: Tensor
    b: Tensor
    scale: Tensor
    places: Tensor | None

    def add(self, y: Tensor, x: Tensor) -> None:
        """Add the product for x (clients, N, in) to y (clients, N, out), in place."""
        self._add(y, x, self.a.mT, self.b.mT)

    def add_gradient(self, grad_x: Tensor, grad_y: Tensor) -> None:
        """Add the gradient of the product with respect to x to `grad_x`, in place."""
        self._add(grad_x, grad_y, self.b, self.a)

    def _add(self, total: Tensor, rows: Tensor, first: Tensor, second: Tensor) -> None:
        if self.places is None:
            total += (rows @ first * self.scale) @ second
        else:
            total.index_add_(0, self.places, (rows.index_select(0, self.places) @ first * self.scale) @ second)


class AdapterProduct(torch.autograd.Function):
    """y = x W^T + b, and y_c += scale_c (noise x)_c A_c^T B_c^T for the clients at `places`, in few memory passes.

    x (clients, N, in), A (c, r, in), B (c, out, r), scale (c, 1, 1), noise (c, N, in) or None; A and B in x's dtype.
    For a factor that needs no gradient, nothing is stored or computed. `frozen` is added as well.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: Tensor,
                places: Tensor | None, noise: Tensor | None, frozen: FrozenProduct | None) -> Tensor:  # fmt: skip
        y = F.linear(x, weight, bias)
        adapted = x if places is None else x.index_select(0, places)
        if noise is not None:
            adapted = adapted * noise
        inner = torch.bmm(adapted, a.mT).mul_(scale)
        if places is None:
            y.baddbmm_(inner, b.mT)
        else:
            y.index_add_(0, places, torch.bmm(inner, b.mT))
        if frozen is not None:
            frozen.add(y, x)
        ctx.frozen = frozen
        for_a, for_b = ctx.needs_input_grad[3:5]
        ctx.save_for_backward(weight, a, b, scale, places, noise, adapted if for_a else None, inner if for_b else None)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        weight, a, b, scale, places, noise, adapted, inner = ctx.saved_tensors
        adapted_grad = grad if places is None else grad.index_select(0, places)
        for_x, for_a, for_b = (ctx.needs_input_grad[index] for index in (0, 3, 4))
        grad_x = grad_a = grad_b = None
        if for_b:
            grad_b = torch.bmm(adapted_grad.mT, inner)
        if for_a or for_x:
            grad_inner = torch.bmm(adapted_grad, b).mul_(scale)
        if for_a:
            grad_a = torch.bmm(grad_inner.mT, adapted)
        if for_x:
            grad_x = grad @ weight
            if places is None and noise is None:
                grad_x.baddbmm_(grad_inner, a)
            else:
                part = torch.bmm(grad_inner, a)
                part = part if noise is None else part.mul_(noise)
                grad_x = grad_x + part if places is None else grad_x.index_add_(0, places, part)
            if ctx.frozen is not None:
                ctx.frozen.add_gradient(grad_x, grad)
        return grad_x, None, None, grad_a, grad_b, None, None, None, None


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
        route, frozen = step.route(self.group, clients), self._frozen(x.dtype)
        by_client = x.reshape(len(clients), -1, x.shape[-1]) if route or frozen else x
        if route is None:
            y = self.base(by_client)
            if frozen is not None:
                frozen.add(y, by_client)
            return y.view(*x.shape[:-1], -1)
        a, b = self._factors(step.stack.tensors, route, x.dtype)
        scale = (self.scaling * route.scale(step.scale)).to(x.dtype)
        if self.context.record is not None:
            with torch.no_grad():
                inputs = by_client if route.places is None else by_client.index_select(0, route.places)
                self.context.record(self.name, route.positions, torch.bmm(inputs, a.mT))
        noise = self._noise(route, x) if step.dropout and self.dropout else None
        weight, bias = self.base.weight, self.base.bias
        y = AdapterProduct.apply(by_client, weight, bias, a, b, scale, route.places, noise, frozen)
        if self.name in self.residual_factors:
            y = y + residual.product(by_client, self.residual_factors[self.name])
        return y.view(*x.shape[:-1], -1)

    def _frozen(self, dtype: torch.dtype) -> FrozenProduct | None:
        """Return the product of the step's `Fallback` for clients whose adapter is off; None without such a client."""
        step, fallback = self.context.step, self.context.step.fallback
        route = step.route(self.group, self.context.clients, on=False) if fallback else None
        if fallback is None or route is None:
            return None
        a, b = self._factors(fallback.tensors, None if fallback.shared else route, dtype)
        return FrozenProduct(a, b, (self.scaling * route.scale(fallback.scale)).to(dtype), route.places)

    def _factors(self, tensors: Mapping[str, Tensor], route: Route | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return A, or R A, and B of the clients of `route`; None: `tensors` are those of one adapter."""
        names = {part: f"{self.name}.lora_{part}.weight" for part in "ABRS"}
        parts = {part: tensors[name] for part, name in names.items() if name in tensors}
        if route is not None:
            parts = {part: route.select(tensor) for part, tensor in parts.items()}
        a = _times_core(parts["A"], parts["R"], parts.get("S")) if "R" in parts else parts["A"]
        return a.to(dtype), parts["B"].to(dtype)

    def _noise(self, route: Route, x: Tensor) -> Tensor:
        """Return the dropout factors of the clients' rows, drawn from each client's stream over its own tokens only."""
        context = self.context
        noise = x.new_zeros(len(route.positions), len(x) // len(context.clients), *x.shape[1:])
        for client_noise, position in zip(noise, route.positions, strict=True):
            num_rows, num_tokens = context.rows.shapes[position]
            unpadded = client_noise[:num_rows, :num_tokens] if x.dim() == 3 else client_noise[:num_rows]
            drawn = torch.empty(unpadded.shape, device=x.device)
            drawn.bernoulli_(1 - self.dropout, generator=context.step.dropout[position])
            unpadded.copy_(drawn.div_(1 - self.dropout))
        return noise.view(len(noise), -1, x.shape[-1])


def _times_core(a: Tensor, core: Tensor, scales: Tensor | None) -> Tensor:
    """Return R A for A (r, in) or (c, r, in), block by block (`adapters.core`)."""
    size = core.shape[-1]
    blocks = core.reshape(-1, size, size)
    if scales is not None:
        blocks = blocks * scales.reshape(-1, 1, 1)
    return torch.bmm(blocks, a.reshape(-1, size, a.shape[-1])).view_as(a)
