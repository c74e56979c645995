"""Evaluation on the server: its model and its held-out data score any adapter."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np
import torch

from copra_fl import tensor_files
from copra_fl.adapters.interpolation import walk
from copra_fl.adapters.server_state import ServerState
from copra_fl.adapters.state import Adapter, Update, complete
from copra_fl.aggregation import find_rule
from copra_fl.aggregation.heads import lend
from copra_fl.aggregation.shared_moments import no_moments
from copra_fl.config import Config
from copra_fl.data.federated import FederatedData
from copra_fl.models.initial_adapter import initial_adapter
from copra_fl.records import Evaluation, LinePath, MergeGap
from copra_fl.seeding import generator
from copra_fl.training.engine import engine_of
from copra_fl.training.evaluation import evaluate_each, merge_gap_each

#: start -> metrics of `Evaluator.evaluate_base`, of the last run in this process: compared methods have the same start
_base_metrics: dict[object, tuple[Evaluation, Evaluation]] = {}

#: metrics of one adapter, as `evaluate_each` returns them
Metrics = dict[str, Any]


class Evaluator:
    """The server's model and its held-out data.

    Attributes:
        config: of the run.
        data: the server's data.
        engine: the engine with the server's model.
    """

    def __init__(self, config: Config, data: FederatedData) -> None:
        self.config = config
        self.data = data
        self.engine = engine_of(config, len(data.label_names), config.federation.seed)
        self.model = self.engine.model
        self._initial_adapter = initial_adapter(self.model, data, config)

    def score(self, adapters: Sequence[Adapter], residual: Adapter, indices: np.ndarray) -> list[Metrics]:
        """Return the metrics of each adapter on W0 + `residual`, on the examples `indices`."""
        self.model.write_residual(residual)
        batch_size, num_classes = self.config.evaluation.eval_batch_size, len(self.data.label_names)
        return evaluate_each(self.engine, adapters, self.data, indices, batch_size, num_classes)

    def validate(self, adapters: Sequence[Adapter], residual: Adapter) -> list[Metrics]:
        """Return the metrics of each adapter on W0 + `residual`, on the server's validation data."""
        return self.score(adapters, residual, self.data.server_validation)

    def start_state(self) -> ServerState:
        """Return the state before the first round."""
        adapter, training = self._initial_adapter, self.config.training
        zeros = {name: torch.zeros_like(tensor) for name, tensor in adapter.items()}
        return ServerState(
            adapter,
            control_sum=zeros if self.config.aggregation.control_variates else {},
            optimizer=no_moments(training, adapter) if training.optimizer_state == "shared" else {},
        )

    def round_metrics(
        self, state: ServerState, before: ServerState, updates: Sequence[Update]
    ) -> tuple[Evaluation, MergeGap | None]:
        """Return the validation metrics of the global adapter, and the merge gap; None without updates.

        With several data sets each client's adapter is evaluated on its own data set.

        Args:
            state: after the round.
            before: the state before the round.
            updates: of the clients selected for the merge gap, in order.
        """
        (average,) = self.validate([state.adapter], state.residual)
        clients: list[Metrics] = []
        for number, members in groupby(updates, lambda update: self.data.dataset_of(update.client)):
            indices = self.data.among(self.data.server_validation, [number])
            adapters = [complete(update, before.adapter) for update in members]
            clients += self.score(adapters, before.residual, indices)
        if not updates:
            return Evaluation.of(average), None
        gap = merge_gap_each(average, clients, [update.num_examples for update in updates])
        return Evaluation.of(average), MergeGap(**gap)

    def paths(self, before: ServerState, pairs: Sequence[tuple[Update, Update]]) -> tuple[LinePath, ...]:
        """Return loss and accuracy along the line between the adapters of each pair of clients, with both barriers.

        If the clients have different data sets, each end gets the other's rows of the head for the other's data set,
        and the line is evaluated on both data sets.
        """
        records = []
        for a, b in pairs:
            numbers = [self.data.dataset_of(update.client) for update in (a, b)]
            adapters = [complete(update, before.adapter) for update in (a, b)]
            start, end = lend(adapters, numbers, [a.num_examples, b.num_examples], self.data.head_sizes)
            evaluate = partial(self.score, residual=before.residual, indices=self._path_examples(numbers))
            path = walk(evaluate, start, end, self.config.evaluation.path_points)
            records.append(LinePath(clients=(a.client, b.client), **path.facts))
        return tuple(records)

    def test(self, state: ServerState) -> tuple[Evaluation | None, Evaluation | None]:
        """Return the final model's metrics on the test data and on the held-out clients.

        None without such data, with a personal rule, and without ``final-test``.
        """
        config = self.config
        if not config.evaluation.final_test or not config.data.dataset or find_rule(config.aggregation.rule).personal:
            return None, None
        (test,) = self.score([state.adapter], state.residual, self.data.test)
        if not len(self.data.held_out):
            return Evaluation.of(test, with_confusion=True), None
        (held_out,) = self.score([state.adapter], state.residual, self.data.held_out)
        return Evaluation.of(test, with_confusion=True), Evaluation.of(held_out)

    def evaluate_base(self) -> tuple[Evaluation, Evaluation]:
        """Return the metrics of the model before the first round, on the test data and on the validation data."""
        state = self.start_state()
        start = self.config.model, self.data.digest, tensor_files.digest(state.adapter)
        if start not in _base_metrics:
            (test,) = self.score([state.adapter], state.residual, self.data.test)
            (validation,) = self.validate([state.adapter], state.residual)
            _base_metrics.clear()
            _base_metrics[start] = Evaluation.of(test), Evaluation.of(validation)
        return _base_metrics[start]

    def _path_examples(self, numbers: Collection[int | None]) -> np.ndarray:
        """Return validation examples for a line, at most ``path-examples`` of each of these data sets."""
        max_examples, seed = self.config.evaluation.path_examples, self.config.federation.seed
        shuffled = generator(seed, "path-examples").permutation(self.data.server_validation)
        return np.concatenate([self.data.among(shuffled, [number])[:max_examples] for number in dict.fromkeys(numbers)])
