"""The engines that train and evaluate in a process: ``stacked``, ``peft`` and ``trainer``.

`StackedEngine` trains all clients of a slice together, `PeftEngine` one after the other with plain PEFT. Both give the
same adapters up to floating-point rounding. `stacked` is fast; `peft` is its reference and takes every model that PEFT
takes, so it also replaces `stacked` for models that cannot be stacked. `TrainerEngine` evaluates as `PeftEngine` does
and trains with the Trainer of a user's script (`training.script`).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import torch

from copra_fl.adapters.state import Adapter, Update
from copra_fl.aggregation.compatibility import heads_of
from copra_fl.config import Config, ModelConfig
from copra_fl.data.federated import FederatedData
from copra_fl.models.adapted import AdaptedModel
from copra_fl.models.build import build_model
from copra_fl.tasks import Task
from copra_fl.training.cohort import slices, train_cohort
from copra_fl.training.evaluation import Predict
from copra_fl.training.plan import Plan, Start
from copra_fl.training.single import train_client
from copra_fl.training.stacked import NotStackable, StackedModel

if TYPE_CHECKING:  # slow to import
    from copra_fl.training.trainer import ScriptedClient

#: parameters of glibc's mallopt
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
#: free memory that a process keeps; the activations of a step of the default size are smaller (experiments/LOG.md)
KEPT_BYTES = 512 * 2**20
#: tensors from this size on are returned at once; glibc's largest value
LARGE_TENSOR_BYTES = 32 * 2**20

#: called with the number of clients' worth of training since the last call
OnTrained = Callable[[float], None]


class Engine(Protocol):
    """Training and evaluation of clients on one model.

    Attributes:
        model: the plain PEFT model: tensor names, gate groups, initial values, saving.
        task: the task of the model.
        device: the device of the model.
        note: a remark for the user on the choice of engine; usually empty.
    """

    model: AdaptedModel
    task: Task
    device: torch.device
    note: str

    def predictor(self, adapters: Sequence[Adapter]) -> Predict: ...

    def slices(self, data: FederatedData, plan: Plan) -> list[tuple[int, ...]]:
        """Return the plan's clients in the slices that `train` takes."""

    def train(
        self,
        data: FederatedData,
        plan: Plan,
        clients: Sequence[int],
        starts: Mapping[int, Start],
        progress: OnTrained,
    ) -> list[Update]:
        """Train a slice of clients, each from its entry of `starts`, and return their updates."""


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
        starts: Mapping[int, Start],
        progress: OnTrained,
    ) -> list[Update]:
        updates = []
        for client in clients:
            updates.append(self.train_one(data, plan, client, starts[client]))
            progress(1)
        return updates

    def train_one(self, data: FederatedData, plan: Plan, client: int, start: Start) -> Update:
        """Train one client from `start`, and return its update."""
        return train_client(self.model, data, plan, client, start)


class TrainerEngine(PeftEngine):
    """The clients of a script. The last one's Trainer stays in memory: a node that is one client runs its script once.

    A process with several clients runs it for each of them in each round, because each has a model of its own.
    """

    def __init__(self, model: AdaptedModel) -> None:
        super().__init__(model)
        self._key: tuple[object, ...] = ()
        self._scripted: ScriptedClient | None = None

    def train_one(self, data: FederatedData, plan: Plan, client: int, start: Start) -> Update:
        from copra_fl.training.trainer import train_client as train_by_script  # slow to import

        scripted = self._open(data, plan.config, client)
        return train_by_script(client, scripted, plan, start, len(data.train[client]), self.model)

    def _open(self, data: FederatedData, config: Config, client: int) -> ScriptedClient:
        from copra_fl.training.trainer import open_client

        key = config.model, config.copra.gate_group, config.training.script, config.federation.seed, data.digest, client
        if self._scripted is None or key != self._key:
            self._scripted = None  # frees its model before the next one is made
            self._scripted = open_client(data, config, client, self.model)
            self._key = key
        return self._scripted


class StackedEngine:
    note = ""

    def __init__(self, model: AdaptedModel) -> None:
        self.model = model
        self.task = model.task
        self.device = model.device
        self.stacked = StackedModel(model)
        self.predictor = self.stacked.predictor

    def slices(self, data: FederatedData, plan: Plan) -> list[tuple[int, ...]]:
        return slices(plan.config, data, plan.clients)

    def train(
        self,
        data: FederatedData,
        plan: Plan,
        clients: Sequence[int],
        starts: Mapping[int, Start],
        progress: OnTrained,
    ) -> list[Update]:
        return train_cohort(self.stacked, data, plan, clients, starts, progress)


def train_all(
    engine: Engine,
    data: FederatedData,
    plan: Plan,
    starts: Mapping[int, Start],
    progress: OnTrained = lambda number: None,
) -> list[Update]:
    """Train all clients of `plan`, slice by slice, each from its entry of `starts`; return their updates, sorted."""
    slices = engine.slices(data, plan)
    updates = [update for part in slices for update in engine.train(data, plan, part, starts, progress)]
    return sorted(updates, key=lambda update: update.client)


def keep_freed_memory() -> None:
    """Let the C library keep `KEPT_BYTES` of freed memory in this process, if it is GNU's.

    By default it returns the activations of each step to the system, and gets them back page by page in the next.
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
        mallopt(M_MMAP_THRESHOLD, LARGE_TENSOR_BYTES)


def engine_of(config: Config, num_labels: int, seed: int = 0) -> Engine:
    """Return the engine that `config` names, as `open_engine` does."""
    kind, group = config.training.engine, config.copra.gate_group
    return open_engine(kind, config.model, group, num_labels, seed, heads_of(config))


def open_engine(kind: str, config: ModelConfig, group: str, num_labels: int, seed: int, heads: int = 0) -> Engine:
    """Return the engine of `kind` with its model at the common start; arguments as in `build.build_model`.

    A model that cannot be stacked gets a `PeftEngine`, with the reason as its `note`. Raises ConfigError as
    `build_model` does.
    """
    keep_freed_memory()
    model = build_model(config, group, num_labels, seed, heads)
    if kind == "trainer":
        return TrainerEngine(model)
    if kind == "peft":
        return PeftEngine(model)
    try:
        return StackedEngine(model)
    except NotStackable as error:
        return PeftEngine(model, f"clients train one by one: engine = 'stacked' cannot take this model: {error}")
