"""A small training setup: data, one model in both engines, a plan; and comparisons of updates."""

from __future__ import annotations

import pytest
import torch

from copra_fl.adapters.state import Adapter, OptimizerState, Update
from copra_fl.config import Config
from copra_fl.data.federated import load_data
from copra_fl.models import adapted
from copra_fl.models.build import build_model, load_processor
from copra_fl.training.cohort import train_cohort
from copra_fl.training.plan import Plan, Start
from copra_fl.training.single import train_client
from copra_fl.training.stacked import StackedModel
from tests.support.tiny import Settings

#: local training with every option that changes what a client computes
CASES: dict[str, Settings] = {
    "lora": {"local-training": "lora"},
    "copra": {},
    "head": {"local-training": "head"},
    "sgd with momentum": {"optimizer": "sgd", "momentum": 0.9, "learning-rate": 0.1, "head-learning-rate": 0.1},
    "dropout": {"lora-dropout": 0.3},
    "clipped hard, decayed, cosine": {"max-grad-norm": 0.05, "weight-decay": 0.1, "lr-schedule": "cosine"},
    "not clipped": {"max-grad-norm": 0.0},
    "rescale, at least one on": {"rescale": True, "min-active": 1, "p0": 0.2},
    "shared masks": {"mask-scope": "shared"},
    "masks for a round": {"mask-scope": "round", "p0": 0.3},
    "two of three layers": {"layers-per-round": 2, "rescale": True, "min-active": 1, "p0": 0.2},
    "one of three layers, always on": {"layers-per-round": 1, "local-training": "lora", "lora-dropout": 0.2,
                                       "off": "global"},
    "top layers": {"client-depths": "1,2,3,3,1,2", "lora-dropout": 0.2, "p0": 0.3},
    "allocated layers, always on": {"client-depths": "1,2,3,3,1,2", "depth-allocation": "random",
                                    "local-training": "lora", "off": "global"},
    "a gate per module": {"gate-group": "module"},
    "all linear, pooler": {"target-modules": "all-linear", "pooling": "pooler"},
    "modules of two layers": {"target-modules": "layer.0.attention.self.query,layer.2.attention.self.value"},
    "cls": {"pooling": "cls"},
    "micro-batches": {"gradient-accumulation": 3, "lora-dropout": 0.2},
    "epochs: unequal steps, short last batches": {"local-epochs": 2, "gradient-accumulation": 2, "alpha": 0.2,
                                                  "lr-schedule": "cosine", "lora-dropout": 0.2, "batch-size": 7},
    "bucketed": {"bucket-batches": 4},
    "off layers use the start": {"off": "global", "lora-dropout": 0.2, "rescale": True, "min-active": 1},
    "off modules use the start": {"off": "global", "gate-group": "module", "gradient-accumulation": 2},
}  # fmt: skip


class World:
    """A training setup: data, the model for both engines, a plan, and the clients' starts, moments and the like."""

    def __init__(self, flat: Settings, server_round: int = 2, double: bool = False, heads: int = 0) -> None:
        self.config = Config.from_flat({"dtype": "float32"} | flat)
        self.data = load_data(self.config, load_processor(self.config.model))
        num_labels = len(self.data.label_names) or 3
        self.plain = build_model(self.config.model, self.config.copra.gate_group, num_labels, seed=0, heads=heads)
        if double:
            self.plain.double()
        self.stacked = StackedModel(self.plain)
        self.start = jitter(self.plain.read_adapter(), 3)
        self.starts = dict.fromkeys(range(6), self.start)
        self.corrections: dict[int, Adapter] = {}
        self.optimizers: dict[int, OptimizerState] = {}
        self.anchors: dict[int, tuple[Adapter, ...]] = {}
        self.plan = Plan(server_round, tuple(range(6)), self.config)

    def alone(self, client: int) -> Update:
        """Train `client` by itself with plain PEFT."""
        return train_client(self.plain, self.data, self.plan, client, self._start(client))

    def together(self, *clients: int) -> list[Update]:
        """Train `clients` as one cohort with the stacked engine."""
        starts = {client: self._start(client) for client in clients}
        return train_cohort(self.stacked, self.data, self.plan, clients, starts)

    def _start(self, client: int) -> Start:
        correction, optimizer = self.corrections.get(client, {}), self.optimizers.get(client, {})
        return Start(self.starts[client], correction, optimizer, self.anchors.get(client, ()))


def jitter(adapter: Adapter, seed: int, size: float = 0.02) -> Adapter:
    """Return `adapter` with normal noise of standard deviation `size` on every value."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: tensor + size * torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
        for name, tensor in adapter.items()
    }


def relative_error(got: Adapter, expected: Adapter) -> float:
    """Return ||got - expected|| / ||expected|| over the whole adapter."""
    error, norm = (
        torch.stack([(t.double() ** 2).sum() for t in tensors]).sum().sqrt()
        for tensors in ([got[name] - expected[name] for name in expected], expected.values())
    )
    return float(error / norm)


def assert_alike(got: Update, expected: Update, tolerance: float) -> None:
    """Assert that two updates of a client agree up to a relative error of `tolerance`."""
    assert (got.client, got.num_examples, got.active_steps) == (
        expected.client,
        expected.num_examples,
        expected.active_steps,
    )
    assert got.adapter.keys() == expected.adapter.keys() and got.grams.keys() == expected.grams.keys()
    assert relative_error(got.adapter, expected.adapter) < tolerance
    assert not expected.grams or relative_error(got.grams, expected.grams) < tolerance
    assert [got.metrics[name] for name in ("steps", "flops")] == [expected.metrics[name] for name in ("steps", "flops")]
    assert got.metrics["loss"] == pytest.approx(expected.metrics["loss"], rel=max(1e-6, 100 * tolerance))


#: two texts of 8 and 5 tokens
BATCH = {"input_ids": torch.arange(5, 21).view(2, 8), "attention_mask": torch.tensor([[1] * 8, [1] * 5 + [0] * 3])}

QUERY = "base_model.model.encoder.layer.0.attention.self.query"


def random_residual(model: adapted.AdaptedModel, dense: bool, size: float = 0.1) -> Adapter:
    """Return a residual of all adapted modules but one, dense or in factors of rank 3."""
    stream = torch.Generator().manual_seed(7)
    drawn: Adapter = {}
    for name in sorted(model.linears)[1:]:
        d, k = model.linears[name].weight.shape
        if dense:
            drawn[f"{name}.residual"] = size * torch.randn(d, k, generator=stream)
        else:
            drawn[f"{name}.residual_B"] = size * torch.randn(d, 3, generator=stream)
            drawn[f"{name}.residual_A"] = size * torch.randn(3, k, generator=stream)
    return drawn
