"""Many clients' adapters on one shared base, in one forward and one backward.

    rows       client 0 | client 1 | ...     each client's batch, all padded alike
    base       y = x W^T                      one product over all rows
    adapters   y_c += s x_c A_c^T B_c^T       batched over the clients whose gate is open

Each adapter sees only its own client's rows, so the gradient of the sum of the clients' losses
is each client's own gradient. The base is the plain PEFT model's, tensor for tensor; `Classifier`
stays as it is beside it and is what this file is checked against.

Truncated backward: below its lowest active adapter a client needs no graph. Rows are sorted by
that depth; the `Trunk` runs those that have not reached it yet without one, and they join at
their own depth.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import torch
from peft.tuners import lora
from torch import Tensor, nn
from torch.nn import functional as F

from copra_fl.adapter import Adapter, Layout
from copra_fl.gates import group_name
from copra_fl.models import Classifier, pool
from copra_fl.prefix import PrefixCache


class Stack:
    """The adapters of C clients, a row each.

    Attributes:
        values: (C, P) float32.
        grads: (C, P), summed over backwards.
        tensors: adapter tensor name -> (C, *shape), views of `values`.
    """

    def __init__(self, layout: Layout, values: Tensor) -> None:
        self.values = values
        self.grads = torch.zeros_like(values)
        self.tensors = {name: _view(values, layout, name).requires_grad_() for name in layout.shapes}
        self._tensor_grads = [_view(self.grads, layout, name) for name in layout.shapes]

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss` to `grads`."""
        found = torch.autograd.grad(loss, list(self.tensors.values()), allow_unused=True)
        for total, grad in zip(self._tensor_grads, found, strict=True):
            if grad is not None:
                total += grad


def _view(matrix: Tensor, layout: Layout, name: str) -> Tensor:
    return matrix[:, layout.spans[name]].unflatten(1, layout.shapes[name])


@dataclass
class Step:
    """What one forward has to know. Clients are sorted by `depth`, and their rows with them.

    Attributes:
        stack: the adapters.
        clients: (c,) the stack's row of each client that takes part.
        on: (c, groups) whether a client's adapters of a gate group are on.
        depth: (c,) how many blocks are below the client's lowest active adapter.
        scale: (c,) what active adapters are multiplied by besides alpha / r.
        dropout: one generator a client, where there is dropout.
        shapes: rows and tokens of each client's batch by itself, which is what dropout is drawn for.
        samples: (rows,) what the prefix cache knows each row by.
        live: how many clients, from the first, are in the graph where the forward is now.
    """

    stack: Stack
    clients: np.ndarray
    on: np.ndarray
    depth: np.ndarray
    scale: Tensor
    dropout: Sequence[torch.Generator] = ()
    shapes: Sequence[tuple[int, int]] = ()
    samples: np.ndarray = field(default_factory=lambda: np.zeros(0, int))
    live: int = 0
    _routes: dict[tuple[int, int], Route | None] = field(default_factory=dict)

    def route(self, group: int) -> Route | None:
        """The live clients whose `group` is on; None if there is none."""
        key = group, self.live
        if key not in self._routes:
            positions = np.flatnonzero(self.on[: self.live, group])
            self._routes[key] = Route.to(self, positions) if len(positions) else None
        return self._routes[key]


@dataclass(frozen=True)
class Route:
    """Clients that an adapter product is for.

    Attributes:
        positions: where they are among the step's clients.
        places: the same as a tensor; None where it is all that are live.
        rows: their rows of the stack; None where it is all of them in order.
        scale: (c, 1, 1).
    """

    positions: np.ndarray
    places: Tensor | None
    rows: Tensor | None
    scale: Tensor

    @classmethod
    def to(cls, step: Step, positions: np.ndarray) -> Route:
        device = step.scale.device
        places = torch.from_numpy(positions).to(device, non_blocking=True)
        clients = step.clients[positions]
        whole = np.array_equal(clients, np.arange(len(step.stack.values)))
        return cls(
            positions,
            None if len(positions) == step.live else places,
            None if whole else torch.from_numpy(clients).to(device, non_blocking=True),
            step.scale[places][:, None, None],
        )

    def of(self, tensor: Tensor) -> Tensor:
        """The rows of a stacked tensor that belong to these clients."""
        return tensor if self.rows is None else tensor.index_select(0, self.rows)


class AdapterProduct(torch.autograd.Function):
    """y = x W^T + b, and for the clients at `places` y_c += scale_c (noise x)_c A_c^T B_c^T, in few passes over memory.

    x (clients, N, in), A (c, r, in), B (c, out, r), scale (c, 1, 1), noise (c, N, in) or None; A and B in x's dtype.
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
        ctx.save_for_backward(weight, a, b, scale, places, noise, own, inner)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        weight, a, b, scale, places, noise, own, inner = ctx.saved_tensors
        mine = grad if places is None else grad.index_select(0, places)
        grad_b = torch.bmm(mine.mT, inner)
        grad_inner = torch.bmm(mine, b).mul_(scale)
        grad_a = torch.bmm(grad_inner.mT, own)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ weight
            if places is None and noise is None:
                grad_x.baddbmm_(grad_inner, a)
            else:
                part = torch.bmm(grad_inner, a)
                part = part if noise is None else part.mul_(noise)
                grad_x = grad_x + part if places is None else grad_x.index_add_(0, places, part)
        return grad_x, None, None, grad_a, grad_b, None, None, None


class StackedLinear(nn.Module):
    """A linear layer of the base with an adapter for each client of the present step."""

    def __init__(self, name: str, module: lora.Linear, group: int, stacked: StackedClassifier) -> None:
        super().__init__()
        self.base = module.get_base_layer()
        self.name = name
        self.group = group
        self.scaling = module.scaling["default"]
        self.dropout = getattr(module.lora_dropout["default"], "p", 0.0)
        self._stacked = [stacked]  # in a list, so that it is not taken for a submodule

    def forward(self, x: Tensor) -> Tensor:
        step = self._stacked[0].step
        route = step.route(self.group)
        if route is None:
            return self.base(x)
        a = route.of(step.stack.tensors[f"{self.name}.lora_A.weight"]).to(x.dtype)
        b = route.of(step.stack.tensors[f"{self.name}.lora_B.weight"]).to(x.dtype)
        by_client = x.reshape(step.live, -1, x.shape[-1])
        noise = self._noise(step, route, x) if step.dropout and self.dropout else None
        scale = (self.scaling * route.scale).to(x.dtype)
        y = AdapterProduct.apply(by_client, self.base.weight, self.base.bias, a, b, scale, route.places, noise)
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


class Trunk(nn.Module):
    """Stands for the base's blocks: runs each row without a graph up to the depth where its client joins."""

    def __init__(self, blocks: Sequence[nn.Module], stacked: StackedClassifier) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self._stacked = [stacked]

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        step, num_rows = self._stacked[0].step, len(hidden)
        per_client = num_rows // len(step.clients)
        live, frozen = hidden[:0], hidden
        output: Any = hidden
        for depth, block in enumerate(self.blocks):
            joined = int(np.searchsorted(step.depth, depth, side="right"))
            fresh = joined * per_client - len(live)
            live, frozen = _joined(live, frozen[:fresh]), frozen[fresh:]
            first = num_rows - len(frozen)
            if len(frozen):
                step.live = 0
                with torch.no_grad():
                    frozen = self._frozen(depth, block, frozen, _rows((args, kwargs), slice(first, None), num_rows))
            if len(live):
                step.live = joined
                taken_args, taken_kwargs = _rows((args, kwargs), slice(0, first), num_rows)
                output = block(live, *taken_args, **taken_kwargs)
                live = output[0] if isinstance(output, tuple) else output
        step.live = len(step.clients)
        hidden = _joined(live, frozen)
        return (hidden,) if isinstance(output, tuple) else hidden

    def _frozen(self, depth: int, block: nn.Module, hidden: Tensor, inputs: Any) -> Tensor:
        """The plain base's `block` on rows that no adapter has touched: from the cache, where it is there."""
        cache, samples = self._stacked[0].prefix, self._stacked[0].step.samples[-len(hidden) :]

        def run(rows: Tensor, inputs: Any) -> Tensor:
            output = block(rows, *inputs[0], **inputs[1])
            return output[0] if isinstance(output, tuple) else output

        if cache is None:
            return run(hidden, inputs)
        slots = cache.find(samples, depth)
        missing = torch.from_numpy(np.flatnonzero(slots < 0)).to(hidden.device)
        if not len(missing):
            return cache.load(slots, hidden.shape[1])
        computed = run(hidden.index_select(0, missing), _rows(inputs, missing, len(hidden)))
        cache.store(samples[missing.cpu().numpy()], depth, computed)
        if len(missing) == len(hidden):
            return computed
        return cache.load(slots, hidden.shape[1]).index_copy_(0, missing, computed)


def _joined(live: Tensor, rest: Tensor) -> Tensor:
    if not len(live) or not len(rest):
        return rest if len(rest) else live
    return torch.cat([live, rest])


def _rows(value: Any, chosen: slice | Tensor, num_rows: int) -> Any:
    """`value` with every tensor in it that has a row for each of `num_rows` cut to the `chosen` ones."""
    if isinstance(value, Tensor) and value.dim() > 1 and len(value) == num_rows:
        return value[chosen]
    if isinstance(value, tuple | list):
        return type(value)(_rows(item, chosen, num_rows) for item in value)
    if type(value) is dict:
        return {key: _rows(item, chosen, num_rows) for key, item in value.items()}
    return value


class NotStackable(TypeError):
    """A model whose adapters cannot be stacked, with the reason; it trains one client at a time."""


class StackedClassifier:
    """A `Classifier` for many clients at once, on the same base tensors.

    Attributes:
        layout: a client's adapter as a row: gate group after gate group, then the head.
        spans: the part of the row of each gate group.
        head_span: the part of the row of the head.
        prefix: hidden states kept for rows that no adapter has touched, if wanted.
    """

    def __init__(self, classifier: Classifier, prefix: PrefixCache | None = None) -> None:
        self.device = classifier.device
        self.group_of = classifier.group_of
        self.pooling = classifier.pooling
        self.prefix = prefix
        self.step: Step
        adapter, group_of = classifier.read_adapter(), classifier.group_of
        num_groups = len(classifier.gates.names)
        order = sorted(adapter, key=lambda name: group_of.get(name, num_groups))
        self.layout = Layout.of({name: adapter[name] for name in order})
        ends = np.cumsum(
            np.bincount(
                [group_of.get(name, num_groups) for name in order],
                [adapter[name].numel() for name in order],
                num_groups + 1,
            )
        ).astype(int)
        self.spans = [slice(start, end) for start, end in zip([0, *ends], ends[:-1], strict=False)]
        self.head_span = slice(ends[-2], ends[-1])
        self._tree: Any
        self._tree, self._block_of = self._build(classifier)

    def _build(self, classifier: Classifier) -> tuple[nn.Module, np.ndarray]:
        """The base with stacked linear layers and a trunk, and the block of each gate group."""
        base = classifier.encoder.get_base_model()
        shared = {id(tensor): tensor for tensor in chain(base.parameters(), base.buffers())}
        tree = copy.deepcopy(base, shared)
        blocks: list[str] = []
        for name, group in classifier.gates.group_of.items():
            module = base.get_submodule(name)
            if type(module) is not lora.Linear or type(module.get_base_layer()) is not nn.Linear or module.lora_variant:
                raise NotStackable(f"{name} is a {type(module.get_base_layer()).__name__} in a {type(module).__name__}")
            tree.set_submodule(name, StackedLinear(f"base_model.model.{name}", module, group, self))
            blocks.append(group_name(name, "layer"))
        inside = [block for block in dict.fromkeys(blocks) if block.split(".")[-1].isdigit()]
        trunks = {block.rpartition(".")[0] for block in inside}
        if len(trunks) != 1:
            raise NotStackable(f"its blocks are in {len(trunks)} lists: {', '.join(sorted(trunks))}")
        (trunk,) = trunks
        modules = list(tree.get_submodule(trunk).children())
        tree.set_submodule(trunk, nn.ModuleList([Trunk(modules, self)]))
        first = blocks.index(inside[0])
        block_of = np.zeros(len(classifier.gates.names), dtype=int)
        for position, (block, group) in enumerate(zip(blocks, classifier.gates.group_of.values(), strict=True)):
            outside = 0 if position < first else len(modules)
            block_of[group] = int(block.split(".")[-1]) if block in inside else outside
        self.blocks = modules
        self.num_blocks = len(modules)
        return tree.eval(), block_of

    def stack(self, adapters: Sequence[Adapter]) -> Stack:
        """The adapters side by side, on this device."""
        return Stack(self.layout, torch.stack([self.layout.flatten(adapter) for adapter in adapters]).to(self.device))

    def tensor(self, values: Sequence[float] | np.ndarray) -> Tensor:
        """`values` on this device: float32, or int64 where they are whole numbers."""
        array = np.asarray(values)
        array = array if array.dtype.kind == "i" else array.astype(np.float32)
        return torch.from_numpy(array).to(self.device, non_blocking=True)

    def predictor(self, adapters: Sequence[Adapter]) -> Callable[[Tensor, Tensor], Tensor]:
        """What gives (adapters, B, classes) logits for (B, T) tokens and attention mask, every gate open."""
        number = len(adapters)
        on = np.ones((number, len(self.spans)), dtype=bool)
        step = Step(self.stack(adapters), np.arange(number), on, np.zeros(number, int), self.tensor(np.ones(number)))

        def predict(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return self(step, input_ids.repeat(number, 1), attention_mask.repeat(number, 1))

        return predict

    def depth(self, on: np.ndarray) -> np.ndarray:
        """(c,) blocks below the lowest active adapter of each row of `on` (c, groups); all where none is."""
        return np.where(on, self._block_of, self.num_blocks).min(axis=1, initial=self.num_blocks)

    def __call__(self, step: Step, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(clients * n, T) tokens to (clients, n, classes) logits in float32."""
        with self._stepping(step):
            output = self._tree(input_ids=input_ids, attention_mask=attention_mask)
        pooler_output = getattr(output, "pooler_output", None)
        features = pool(output.last_hidden_state, attention_mask, self.pooling, pooler_output)
        clients = torch.from_numpy(step.clients).to(self.device, non_blocking=True)
        weight = step.stack.tensors["head.weight"].index_select(0, clients)
        bias = step.stack.tensors["head.bias"].index_select(0, clients)
        return torch.baddbmm(bias[:, None], features.unflatten(0, (len(clients), -1)), weight.mT)

    @contextmanager
    def _stepping(self, step: Step) -> Iterator[None]:
        self.step, step.live = step, len(step.clients)
        try:
            yield
        finally:
            del self.step
