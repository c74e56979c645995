"""What trains and evaluates in a process: all clients of a slice stacked, or one after the other with plain PEFT.

Both give the same adapters up to float rounding. `stacked` is fast; `peft` is what it is checked against, and takes
every model that PEFT takes, also in place of `stacked` where that cannot.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch

from copra_fl.adapters.state import Adapter, Update
from copra_fl.config import Config, ModelConfig
from copra_fl.data.federated import FederatedData
from copra_fl.models.adapted import AdaptedModel
from copra_fl.models.build import build_model
from copra_fl.tasks import Task
from copra_fl.training.cohort import slices, train_cohort
from copra_fl.training.evaluation import Predict
from copra_fl.training.plan import Plan
from copra_fl.training.single import train_client
from copra_fl.training.stacked import NotStackable, StackedModel
from copra_fl.training.stacked.hidden_state_cache import PrefixCache

#: called with how many clients' worth of training was done since the last call
Progress = Callable[[float], None]


class Engine(Protocol):
    """
    Attributes:
        model: the plain PEFT model: names of tensors and gate groups, start values, saving.
        task: what it learns.
        device: where it computes.
        note: what a user should know of the choice of engine; mostly empty.
    """

    model: AdaptedModel
    task: Task
    device: torch.device
    note: str

    def predictor(self, adapters: Sequence[Adapter]) -> Predict: ...

    def slices(self, data: FederatedData, plan: Plan) -> list[tuple[int, ...]]:
        """The plan's clients in parts that `train` takes."""

    def train(
        self,
        data: FederatedData,
        plan: Plan,
        clients: Sequence[int],
        starts: Mapping[int, Adapter],
        progress: Progress,
        corrections: Mapping[int, Adapter],
    ) -> list[Update]:
        """The updates of `clients`, each from its own of `starts`; `corrections` are SCAFFOLD's c - c_k, or empty."""


class PeftEngine:
    def __init__(self, model: AdaptedModel, note: str = "") -> None:
        self.model = model
        self.note = note
        self.task = model.task
        self.device = model.device
        self.predictor = model.predictor

    def slices(self, data: FederatedData, plan: Plan) -> list[tuple[int, ...]]:
        return [(client,) for client in plan.clients]

    def train(
        self,
        data: FederatedData,
        plan: Plan,
        clients: Sequence[int],
        starts: Mapping[int, Adapter],
        progress: Progress,
        corrections: Mapping[int, Adapter],
    ) -> list[Update]:
        updates = []
        for client in clients:
            updates.append(train_client(self.model, data, plan, client, starts[client], corrections.get(client)))
            progress(1)
        return updates


class StackedEngine:
    note = ""

    def __init__(self, model: AdaptedModel) -> None:
        self.model = model
        self.task = model.task
        self.device = model.device
        self.stacked = StackedModel(model)
        self.predictor = self.stacked.predictor
        self._prefix_of = ""

    def slices(self, data: FederatedData, plan: Plan) -> list[tuple[int, ...]]:
        return slices(plan.config, data, plan.clients)

    def train(
        self,
        data: FederatedData,
        plan: Plan,
        clients: Sequence[int],
        starts: Mapping[int, Adapter],
        progress: Progress,
        corrections: Mapping[int, Adapter],
    ) -> list[Update]:
        self._keep_prefixes(data, plan.config)
        return train_cohort(self.stacked, data, plan, clients, starts, corrections, progress)

    def _keep_prefixes(self, data: FederatedData, config: Config) -> None:
        """A cache of the wanted size for these tokens, if it is not there already."""
        megabytes, tokens = config.training.hidden_state_cache_mb, data.examples.max_length
        wanted = f"{data.tokens_digest} {megabytes}" if megabytes else ""
        if wanted != self._prefix_of:
            width, dtype = self.model.base.config.hidden_size, self.model.base.dtype
            self.stacked.present.prefix = (
                PrefixCache(megabytes, tokens, width, dtype, self.device) if megabytes else None
            )
            self._prefix_of = wanted


def open_engine(kind: str, config: ModelConfig, group: str, num_labels: int, seed: int, core: bool = False) -> Engine:
    """The engine of that kind, its model at the common start of the run's seed; `core` as in `models.build`.

    A model that cannot be stacked gets the other engine, whose `note` says why. Raises ConfigError as `models.build`.
    """
    model = build_model(config, group, num_labels, seed, core)
    if kind == "peft":
        return PeftEngine(model)
    try:
        return StackedEngine(model)
    except NotStackable as error:
        return PeftEngine(model, f"clients train one by one: engine = 'stacked' cannot take this model: {error}")
