"""A linear layer of the base with an adapter for each client."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor, nn
from torch.nn import functional as F

from copra_fl.adapters import residual
from copra_fl.training.stacked.step import Present, Route, Step


class AdapterProduct(torch.autograd.Function):
    """y = x W^T + b, and for the clients at `places` y_c += scale_c (noise x)_c A_c^T B_c^T, in few passes over memory.

    x (clients, N, in), A (c, r, in), B (c, out, r), scale (c, 1, 1), noise (c, N, in) or None; A and B in x's dtype.
    Keeps and computes nothing for a factor that wants no gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: Tensor,
                places: Tensor | None, noise: Tensor | None) -> Tensor:  # fmt: skip
        y = F.linear(x, weight, bias)
        own = x if places is None else x.index_select(0, places)
        if noise is not None:
            own = own * noise
        inner = torch.bmm(own, a.mT).mul_(scale)
        if places is None:
            y.baddbmm_(inner, b.mT)
        else:
            y.index_add_(0, places, torch.bmm(inner, b.mT))
        for_a, for_b = ctx.needs_input_grad[3:5]
        ctx.save_for_backward(weight, a, b, scale, places, noise, own if for_a else None, inner if for_b else None)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        weight, a, b, scale, places, noise, own, inner = ctx.saved_tensors
        mine = grad if places is None else grad.index_select(0, places)
        for_x, for_a, for_b = (ctx.needs_input_grad[index] for index in (0, 3, 4))
        grad_x = grad_a = grad_b = None
        if for_b:
            grad_b = torch.bmm(mine.mT, inner)
        if for_a or for_x:
            grad_inner = torch.bmm(mine, b).mul_(scale)
        if for_a:
            grad_a = torch.bmm(grad_inner.mT, own)
        if for_x:
            grad_x = grad @ weight
            if places is None and noise is None:
                grad_x.baddbmm_(grad_inner, a)
            else:
                part = torch.bmm(grad_inner, a)
                part = part if noise is None else part.mul_(noise)
                grad_x = grad_x + part if places is None else grad_x.index_add_(0, places, part)
        return grad_x, None, None, grad_a, grad_b, None, None, None


class StackedLinear(nn.Module):
    """A linear layer of the base with an adapter for each client of the present step.

    `beside` is `AdaptedModel.beside`, what residuals multiply by; where no adapter is on the base's own hook does.
    """

    def __init__(
        self, name: str, module: lora.Linear, group: int, present: Present, beside: Mapping[str, tuple[Tensor, ...]]
    ) -> None:
        super().__init__()
        self.base = module.get_base_layer()
        self.name = name
        self.group = group
        self.scaling = module.scaling["default"]
        self.dropout = getattr(module.lora_dropout["default"], "p", 0.0)
        self.present = present
        self.beside = beside

    def forward(self, x: Tensor) -> Tensor:
        step = self.present.step
        route = step.route(self.group)
        if route is None:
            return self.base(x)
        a = route.of(step.stack.tensors[f"{self.name}.lora_A.weight"])
        b = route.of(step.stack.tensors[f"{self.name}.lora_B.weight"]).to(x.dtype)
        core = step.stack.tensors.get(f"{self.name}.lora_R.weight")
        a = (a if core is None else torch.bmm(route.of(core), a)).to(x.dtype)
        by_client = x.reshape(step.live, -1, x.shape[-1])
        noise = self._noise(step, route, x) if step.dropout and self.dropout else None
        scale = (self.scaling * route.scale).to(x.dtype)
        y = AdapterProduct.apply(by_client, self.base.weight, self.base.bias, a, b, scale, route.places, noise)
        if self.name in self.beside:
            y = y + residual.product(by_client, self.beside[self.name])
        return y.view(*x.shape[:-1], -1)

    def _noise(self, step: Step, route: Route, x: Tensor) -> Tensor:
        """What dropout multiplies the clients' rows by: each client's own stream, over its own tokens only."""
        noise = x.new_zeros(len(route.positions), len(x) // step.live, *x.shape[1:])
        for out, position in zip(noise, route.positions, strict=True):
            num_rows, num_tokens = step.shapes[position]
            own = out[:num_rows, :num_tokens] if x.dim() == 3 else out[:num_rows]
            drawn = torch.empty(own.shape, device=x.device)
            own.copy_(drawn.bernoulli_(1 - self.dropout, generator=step.dropout[position]).div_(1 - self.dropout))
        return noise.view(len(noise), -1, x.shape[-1])
