"""Features of local training: parts, starts, ranks, layers that are off, points of a line, FedProx, SCAFFOLD."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from copra_fl.adapters.state import Adapter, Update, part_of
from copra_fl.aggregation import ALL, RULES
from copra_fl.aggregation.ranks import cut, pad
from copra_fl.aggregation.rule import Rule
from copra_fl.aggregation.rules.fedavg import fedavg
from copra_fl.copra import schedule
from copra_fl.models.build import build_model
from copra_fl.seeding import generator
from copra_fl.training import cohort, single
from copra_fl.training.batches import LocalSteps
from copra_fl.training.plan import Plan, Start
from copra_fl.training.single import train_client
from copra_fl.training.stacked.linear import AdapterProduct
from copra_fl.training.update import make_update
from tests.support.tiny import Settings
from tests.support.worlds import World, assert_alike, jitter, random_residual, relative_error

RANKS = {"client-ranks": "2,1,2,1,1,2"}
HARSH = {"weight-decay": 0.1, "lora-dropout": 0.2}
#: blocks of a rule's matrix R between the factors
HEADS = {"core-only": 1, "ravan": 2}
SGD: Settings = {"optimizer": "sgd", "learning-rate": 0.1, "head-learning-rate": 0.1, "max-grad-norm": 0.0}


@pytest.fixture(autouse=True)
def core_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule like Fed-SB."""
    rule = Rule("core-only", fedavg, trains=lambda number: frozenset({"R", "head"}), core="orthogonal")
    monkeypatch.setattr("copra_fl.aggregation.rules.RULES", (*RULES, rule))


def individual_starts(world: World) -> None:
    world.starts = {client: jitter(world.start, 10 + client) for client in range(6)}


def individual_corrections(world: World) -> None:
    zeros = {name: torch.zeros_like(tensor) for name, tensor in world.start.items()}
    world.corrections = {client: jitter(zeros, 20 + client, 0.1) for client in range(6)}


def padded_starts(world: World) -> None:
    ranks = map(int, str(RANKS["client-ranks"]).split(","))
    world.starts = {client: pad(cut(world.start, rank), 2) for client, rank in enumerate(ranks)}


def older_anchors(world: World) -> None:
    world.anchors = {client: (jitter(world.start, 30), jitter(world.start, 40 + client)) for client in range(6)}


def residual(dense: bool) -> Callable[[World], None]:
    return lambda world: world.plain.write_residual(random_residual(world.plain, dense))


#: settings, round, and changes of the world
CASES: dict[str, tuple[Settings, int, tuple[Callable[[World], None], ...]]] = {
    "B and head": ({"rule": "ffa-lora"} | HARSH, 2, ()),
    "A and head": ({"rule": "rolora"} | HARSH, 2, ()),
    "R and head": ({"rule": "core-only"} | HARSH, 2, ()),
    "R and head, always on": ({"rule": "core-only", "local-training": "lora"}, 2, ()),
    "individual starts": ({}, 2, (individual_starts,)),
    "dense residual": (HARSH, 2, (residual(True),)),
    "residual in factors": ({"local-training": "lora"}, 2, (residual(False),)),
    "FedProx": ({"proximal-mu": 0.5} | HARSH, 2, ()),
    "SCAFFOLD": ({"control-variates": True}, 2, (individual_corrections,)),
    "SCAFFOLD in the first round": ({"control-variates": True, "gradient-accumulation": 2}, 1, ()),
    "unequal ranks": (RANKS | HARSH | {"rescale": True, "min-active": 1}, 2, (padded_starts,)),
    "off layers use individual starts": ({"off": "global", "rule": "ffa-lora", "proximal-mu": 0.3} | HARSH, 2,
                                         (individual_starts, residual(True))),
    "off layers use starts of unequal ranks": ({"off": "global", "rescale": True, "min-active": 1} | RANKS, 2,
                                               (padded_starts,)),
    "off layers use R": ({"off": "global", "rule": "core-only"} | HARSH, 2, ()),
    "off layers use R and S": ({"off": "global", "rule": "ravan"} | HARSH, 2, ()),
    "on the line": ({"local-training": "line"} | HARSH, 2, (individual_starts,)),
    "FedGuCci": ({"rule": "ffa-lora-gram", "gucci-beta": 0.5, "off": "global", "gradient-accumulation": 2} | HARSH, 2,
                 ()),
    "FedGuCci with older anchors": ({"gucci-beta": 0.5, "gradient-accumulation": 2} | HARSH, 2,
                                    (individual_starts, older_anchors)),
    "everything": ({"rule": "ffa-lora-gram", "proximal-mu": 0.3, "control-variates": True, "local-epochs": 1,
                   "alpha": 0.3, "max-grad-norm": 0.1, "off": "global"} | RANKS | HARSH, 2,
                  (individual_starts, individual_corrections, residual(True))),
}  # fmt: skip


@pytest.mark.parametrize(
    "double", [pytest.param(True, id="float64"), pytest.param(False, id="float32", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_both_engines_agree(tiny: Settings, case: tuple, double: bool) -> None:
    """Oracle: plain PEFT, one client after the other."""
    flat, server_round, changes = case
    flat = tiny | {"local-steps": 10, "num-rounds": 4, "alpha": 1.0} | flat
    world = World(flat, server_round, double, HEADS.get(str(flat.get("rule")), 0))
    for change in changes:
        change(world)
    tolerance = 1e-10 if double else 1e-5
    for update in world.together(*range(6)):
        alone = world.alone(update.client)
        assert_alike(update, alone, tolerance)
        assert update.metrics["distance"] == pytest.approx(alone.metrics["distance"], rel=1e-3)
        assert {part_of(name) for name in update.adapter} <= world.plan.trained_parts
        assert update.gradient.keys() == (update.adapter.keys() if world.config.aggregation.control_variates else set())
        if update.gradient:
            assert alone.gradient.keys() == update.gradient.keys()
            assert relative_error(update.gradient, alone.gradient) < 10 * tolerance


class Spy:
    """Records every client's whole adapter after its training, in either engine."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.adapters: list[tuple[int, Adapter]] = []
        for module in (cohort, single):
            monkeypatch.setattr(module, "make_update", self._make_update)

    def _make_update(self, plan: Plan, steps: LocalSteps, adapter: Adapter, *rest: object) -> Update:
        self.adapters.append((steps.client, adapter))
        return MAKE_UPDATE(plan, steps, adapter, *rest)  # type: ignore[arg-type]


MAKE_UPDATE = make_update


@pytest.mark.parametrize(("rule", "untrained"), [("ffa-lora", "A"), ("rolora", "B"), ("core-only", "AB")])
@pytest.mark.parametrize("optimizer", [{}, SGD | {"momentum": 0.9}], ids=["adamw", "sgd"])
def test_untrained_parts_stay_bitwise_the_same(
    tiny: Settings, rule: str, untrained: str, optimizer: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(tiny | HARSH | optimizer | {"rule": rule, "local-training": "lora"}, heads=HEADS.get(rule, 0))
    spy = Spy(monkeypatch)
    world.together(0, 1)
    world.alone(0)
    assert len(spy.adapters) == 3
    for _, adapter in spy.adapters:
        for name, tensor in adapter.items():
            assert torch.equal(tensor, world.start[name]) == (part_of(name) in untrained), name


def test_peft_computes_no_gradient_for_untrained_parts_with_any_gates(tiny: Settings) -> None:
    world = World(tiny)
    batch = world.data.examples.batch(world.data.train[0][:4])
    world.plain.train_only({"B", "head"})
    world.plain.gates.set([False, False, False])
    world.plain.gates.set([False, True, True])
    F.cross_entropy(world.plain(**batch), batch["labels"]).backward()
    grads = {name: p.grad is not None for name, p in world.plain.train_only(ALL).items()}
    assert grads == {name: part_of(name) == "head" or (part_of(name) == "B" and ".layer.0." not in name)
                     for name in grads}  # fmt: skip


@pytest.mark.parametrize("with_gradient", ["xab", "ab", "b", "xa", "a", "xb"])
def test_the_adapter_product_computes_only_the_required_gradients(with_gradient: str) -> None:
    """c clients, N rows, k inputs, d outputs, rank r: the backward pass computes only the products that it needs.

    torch's counter does not count ``baddbmm_``, the last of the two products for x.
    """
    c, n, k, d, r = 3, 5, 7, 11, 2
    x, a, b = torch.randn(c, n, k), torch.randn(c, r, k), torch.randn(c, d, r)
    for name, tensor in {"x": x, "a": a, "b": b}.items():
        tensor.requires_grad_(name in with_gradient)
    y = AdapterProduct.apply(x, torch.randn(d, k), None, a, b, torch.ones(c, 1, 1), None, None)
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    products = {
        "grad_B": ("b" in with_gradient, r * d),
        "through B": (with_gradient != "b", r * d),
        "grad_A": ("a" in with_gradient, r * k),
        "grad_x": ("x" in with_gradient, d * k),
    }
    assert counter.get_total_flops() == sum(2 * c * n * size for needed, size in products.values() if needed)
    assert [tensor.grad is not None for tensor in (x, a, b)] == [name in with_gradient for name in "xab"]


def test_fedprox_is_the_gradient_of_the_penalty(tiny: Settings) -> None:
    """Oracle: a loop in which autograd differentiates loss + mu/2 |theta - start|^2."""
    mu = 3.0
    world = World(tiny | {"local-training": "lora", "proximal-mu": mu, "max-grad-norm": 0.5}, 1, double=True)
    plain = build_model(world.config.model, "layer", 3, seed=0).double()
    plain.write_adapter(world.start)
    parameters = plain.train_only(ALL)
    optimizer = torch.optim.AdamW(parameters.values(), lr=2e-3, weight_decay=0.0)
    shuffled = generator(0, "order", 1, 0).permutation(world.data.train[0])
    losses = []
    for step in range(3):
        batch = world.data.examples.batch(shuffled[4 * step : 4 * step + 4])
        loss = F.cross_entropy(plain(**batch), batch["labels"])
        penalty = sum((tensor - world.start[name]).square().sum() for name, tensor in parameters.items())
        (loss + mu / 2 * penalty).backward()
        torch.nn.utils.clip_grad_norm_(list(parameters.values()), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    for update in (world.alone(0), *world.together(0)):
        assert relative_error(update.adapter, plain.read_adapter()) < 1e-10
        assert update.metrics["loss"] == pytest.approx(sum(losses) / 3, rel=1e-5), (
            "the loss is reported without the penalty"
        )


def test_a_layer_that_is_off_uses_the_adapter_of_the_start(tiny: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: PEFT with a second adapter, where each layer that is off has the second one active."""
    masks = [[False, True, False], [True, False, True], [False, False, False], [True, True, False]]
    monkeypatch.setattr(schedule, "client_masks", lambda *args, **kwargs: (np.array(masks), np.ones(4)))
    world = World(tiny | {"off": "global", "local-steps": 4, "weight-decay": 0.1, "lora-dropout": 0.0}, double=True)
    plain = build_model(world.config.model, "layer", 3, seed=0)
    parameters = plain.train_only(ALL)
    plain.peft.add_adapter("start", plain.peft.peft_config["default"])
    plain.double().eval().write_adapter(world.start)
    layers: dict[str, Any] = {name: module for name, module in plain.named_modules() if isinstance(module, LoraLayer)}
    for layer in layers.values():
        for factor in (layer.lora_A, layer.lora_B):
            factor["start"].load_state_dict(factor["default"].state_dict())
    optimizer = torch.optim.AdamW(parameters.values(), lr=2e-3, weight_decay=0.1)
    shuffled = generator(0, "order", 2, 0).permutation(world.data.train[0])
    for step, mask in enumerate(masks):
        for name, layer in layers.items():
            on = any(mask[number] and f".layer.{number}." in name for number in range(3))
            layer.set_adapter("default" if on else "start", inference_mode=not on)
        batch = world.data.examples.batch(shuffled[4 * step : 4 * step + 4])
        F.cross_entropy(plain(**batch), batch["labels"]).backward()
        torch.nn.utils.clip_grad_norm_(list(parameters.values()), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    for update in (world.alone(0), *world.together(0)):
        assert update.active_steps == (2, 2, 1)
        assert relative_error(update.adapter, plain.read_adapter()) < 1e-10


@pytest.mark.parametrize(
    ("changes", "num_older"),
    [
        ({"local-training": "line"}, 0),
        ({"local-training": "lora", "gucci-beta": 0.7}, 0),
        ({"local-training": "lora", "gucci-beta": 0.7}, 2),
    ],
)
def test_the_loss_at_points_of_the_line(tiny: Settings, changes: Settings, num_older: int) -> None:
    """Oracle: autograd differentiates the losses of PEFT's model with parameters anchor + u (theta - anchor)."""
    world = World(tiny | {"local-steps": 4, "max-grad-norm": 0.1, "weight-decay": 0.1} | changes, double=True)
    plain = build_model(world.config.model, "layer", 3, seed=0).double()
    plain.write_adapter(world.start)
    names = {name.removeprefix("peft.").replace(".default.", "."): name for name, _ in plain.named_parameters()}
    parameters = plain.train_only(ALL)
    optimizer = torch.optim.AdamW(parameters.values(), lr=2e-3, weight_decay=0.1)
    shuffled = generator(0, "order", 2, 0).permutation(world.data.train[0])
    positions = generator(0, "line", 2, 0).random(4)
    older = tuple(jitter(world.start, 30 + number) for number in range(num_older))
    world.anchors = {0: older}
    losses = []
    for step in range(4):
        batch = world.data.examples.batch(shuffled[4 * step : 4 * step + 4])

        def loss_at(
            adapters: float, head: float, anchor: Adapter = world.start, batch: dict[str, torch.Tensor] = batch
        ) -> torch.Tensor:
            moved = {}
            for name, tensor in parameters.items():
                u = head if part_of(name) == "head" else adapters
                moved[names[name]] = (1 - u) * anchor[name] + u * tensor
            return F.cross_entropy(torch.func.functional_call(plain, moved, kwargs=batch), batch["labels"])

        if "gucci-beta" in changes:
            loss = loss_at(1, 1)
            halfway = [loss_at(0.5, 0.5, anchor) for anchor in (world.start, *older)]
            (loss + 0.7 * sum(halfway) / len(halfway)).backward()
        else:
            loss = loss_at(positions[step], 1)
            loss.backward()
        losses.append(float(loss.detach()))
        torch.nn.utils.clip_grad_norm_(list(parameters.values()), 0.1)
        optimizer.step()
        optimizer.zero_grad()
    for update in (world.alone(0), *world.together(0)):
        assert relative_error(update.adapter, plain.read_adapter()) < 1e-10
        assert update.metrics["loss"] == pytest.approx(sum(losses) / 4, rel=1e-5)


@pytest.mark.parametrize("engine", ["peft", "stacked"])
def test_fedgucci_computes_every_step_once_more_for_each_anchor(tiny: Settings, engine: str) -> None:
    work = []
    for beta, num_older in ((0.0, 0), (0.1, 0), (0.1, 2)):
        world = World(tiny | {"local-training": "lora", "gucci-beta": beta})
        world.anchors = {0: (world.start,) * num_older}
        with FlopCounterMode(display=False) as counter:
            _ = world.alone(0) if engine == "peft" else world.together(0)
        work.append(counter.get_total_flops())
    assert work == [work[0], 2 * work[0], 4 * work[0]] and work[0] > 0


def test_from_a_start_without_a_product_nothing_changes(tiny: Settings) -> None:
    """In the first round B = 0, so layers that are off compute the base alone: bit for bit plain CopRA."""
    worlds = [World(tiny | {"num-rounds": 4, "off": off, "lora-dropout": 0.2}, 1) for off in ("base", "global")]
    for world in worlds:
        world.starts = dict.fromkeys(range(6), world.plain.read_adapter())
    base, anchored = ([*world.together(*range(3)), world.alone(4)] for world in worlds)
    for one, other in zip(base, anchored, strict=True):
        assert all(torch.equal(one.adapter[name], other.adapter[name]) for name in one.adapter)


@pytest.mark.parametrize("engine", ["peft", "stacked"])
def test_scaffold_by_hand(tiny: Settings, engine: str) -> None:
    """SGD without momentum at rate 0.1: theta = start - 0.1 sum over steps on of (g + correction)."""
    world = World(tiny | SGD | {"control-variates": True, "local-steps": 5}, double=True)
    individual_corrections(world)
    (update,) = [world.alone(1)] if engine == "peft" else world.together(1)
    assert len(set(update.active_steps)) > 1
    for name, tensor in update.adapter.items():
        steps = update.active_steps[world.plain.group_of[name]] if name in world.plain.group_of else 5
        walked = steps * (update.gradient[name] + world.corrections[1][name])
        assert torch.allclose(tensor, world.start[name] - 0.1 * walked, atol=1e-12), name


@pytest.mark.parametrize("engine", ["peft", "stacked"])
def test_a_correction_opposite_to_the_gradient_leaves_the_adapter_unchanged(tiny: Settings, engine: str) -> None:
    world = World(tiny | SGD | {"control-variates": True, "local-training": "lora", "local-steps": 1}, double=True)
    free = world.alone(0)
    world.corrections = {0: {name: -gradient for name, gradient in free.gradient.items()}}
    (update,) = [world.alone(0)] if engine == "peft" else world.together(0)
    assert update.metrics["distance"] < 1e-12 < free.metrics["distance"]
    assert relative_error(update.gradient, free.gradient) < 1e-12, (
        "the client's gradient is reported without the correction"
    )


@pytest.mark.parametrize("engine", ["peft", "stacked"])
def test_clipping_comes_after_the_correction(tiny: Settings, engine: str) -> None:
    world = World(tiny | SGD | {"control-variates": True, "local-steps": 1, "max-grad-norm": 0.05}, double=True)
    individual_corrections(world)
    (update,) = [world.alone(0)] if engine == "peft" else world.together(0)
    assert update.metrics["distance"] == pytest.approx(0.1 * 0.05, rel=1e-4)


@pytest.mark.parametrize("scaling", ["standard", "rslora", "constant"])
def test_a_padded_client_trains_as_a_client_of_its_rank(tiny: Settings, scaling: str) -> None:
    """Oracle: a PEFT model built with rank 1, with the scaling of rank 1."""
    flat = tiny | RANKS | HARSH | {"lora-scaling": scaling, "local-steps": 8, "lora-dropout": 0.0}
    world = World(flat, double=True)
    padded_starts(world)
    config = world.config.changed(client_ranks="", rank=1)
    small = build_model(config.model, "layer", 3, seed=0).double()
    updates = {update.client: update for update in world.together(*range(6))}
    for client in (1, 3):
        start = Start(cut(world.start, 1))
        expected = train_client(small, world.data, replace(world.plan, config=config), client, start)
        for update in (updates[client], world.alone(client)):
            assert relative_error(cut(update.adapter, 1), expected.adapter) < 1e-10


@pytest.mark.parametrize("optimizer", [{}, SGD | {"momentum": 0.9}], ids=["adamw", "sgd"])
@pytest.mark.parametrize("rule", ["fedavg", "ffa-lora"])
def test_padding_stays_exactly_zero(
    tiny: Settings, optimizer: Settings, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    flat = tiny | RANKS | HARSH | optimizer | {"proximal-mu": 0.5, "local-steps": 8, "rule": rule}
    world = World(flat)
    padded_starts(world)
    spy = Spy(monkeypatch)
    updates = [*world.together(*range(6)), world.alone(1), world.alone(3)]
    assert all(update.metrics["distance"] > 0 for update in updates)
    padded = [adapter for client, adapter in spy.adapters if client in (1, 3)]
    assert len(padded) == 4
    for adapter in padded:
        assert all(torch.equal(tensor, pad(cut({name: tensor}, 1), 2)[name]) for name, tensor in adapter.items())


def test_the_optimizer_has_one_parameter_per_client_and_group_for_any_trained_parts(tiny: Settings) -> None:
    world = World(tiny, heads=1)
    for parts in (ALL, {"B", "head"}, {"A", "head"}, {"R", "head"}, {"A", "B", "head"}):
        spans = world.stacked.spans(parts)
        assert [group for group, _ in spans] == [0, 1, 2, 3]
        sizes = sum(tensor.numel() for name, tensor in world.start.items() if part_of(name) in parts)
        assert sum(span.stop - span.start for _, span in spans) == sizes
