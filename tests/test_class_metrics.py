"""Metrics by class: numbers by hand, and evaluations that count what a plain forward pass predicts."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from copra_fl.class_metrics import by_class, class_metrics
from copra_fl.models.build import build_model
from copra_fl.training.evaluation import evaluate, evaluate_each
from tests.support.tiny import Settings
from tests.support.worlds import World, jitter


def test_metrics_of_a_matrix_by_hand() -> None:
    """Class 0: 4 of 6 found, 4 of 5 predictions right. Class 1: 1 of 2, 1 of 3. Class 2 has no example, no prediction.

    F1: 2 * 4 / 11 and 2 * 1 / 5; recall: 2 / 3 and 1 / 2. The most frequent class has 6 of 8 examples.
    """
    matrix = [[4, 2, 0], [1, 1, 0], [0, 0, 0]]
    assert class_metrics(matrix) == pytest.approx(
        {"macro_f1": (8 / 11 + 2 / 5) / 2, "balanced_accuracy": (2 / 3 + 1 / 2) / 2, "majority": 0.75}
    )
    assert by_class(matrix)["precision"].tolist() == pytest.approx([0.8, 1 / 3, 0])


def test_a_class_that_is_only_predicted_lowers_macro_f1() -> None:
    """F1 of class 1, which has no example, is 0 and counts; its recall does not exist. As scikit-learn has it."""
    assert class_metrics([[3, 1], [0, 0]]) == pytest.approx(
        {"macro_f1": (6 / 7 + 0) / 2, "balanced_accuracy": 0.75, "majority": 1.0}
    )


def test_both_engines_count_what_a_plain_forward_pass_predicts(tiny: Settings) -> None:
    world = World(tiny)
    held_out = world.data.server_validation
    with torch.inference_mode():
        world.plain.write_adapter(world.start)
        batch = world.data.examples.batch(held_out)
        predicted = world.plain(**batch).argmax(1).tolist()
    expected = [[0] * 3 for _ in range(3)]
    for label, prediction in zip(batch["labels"].tolist(), predicted, strict=True):
        expected[label][prediction] += 1
    for model in (world.plain, world.stacked):
        first, second = evaluate_each(model, [world.start] * 2, world.data, held_out, 20, num_classes=3)
        assert first["confusion"] == second["confusion"] == expected
        assert {name: first[name] for name in class_metrics(expected)} == class_metrics(expected)
    (without,) = evaluate_each(world.plain, [world.start], world.data, held_out, 20)
    assert without.keys() == {"loss", "accuracy", "examples"}, "clients send no counts by class"


class LargestTensor(TorchDispatchMode):
    """Record the number of values in the largest tensor that an operation returns."""

    numel = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor))])
        return result


def test_thousands_of_classes_are_counted_without_a_matrix(tiny: Settings) -> None:
    """Oracle: F1 and recall of each class that occurs, from lists; half of the examples have the class predicted."""
    world, num_classes = World(tiny), 3000
    model = build_model(world.config.model, "layer", num_classes, seed=0)
    model.write_adapter(jitter(model.read_adapter(), 3, 0.3))
    adapter, held_out = model.read_adapter(), world.data.server_validation
    with torch.inference_mode():
        predicted = model(**world.data.examples.batch(np.arange(len(world.data.examples)))).argmax(1)
    labels = predicted.where(torch.arange(len(predicted)) % 2 == 0, torch.arange(len(predicted)) // 4)
    with LargestTensor() as largest:
        (measured,) = evaluate(model, [adapter], replace(world.data.examples, labels=labels), held_out, 20, num_classes)
    assert largest.numel < num_classes**2 / 10 and "confusion" not in measured
    pairs = list(zip(labels[held_out].tolist(), predicted[held_out].tolist(), strict=True))
    true, found = Counter(label for label, _ in pairs), Counter(prediction for _, prediction in pairs)
    right = Counter(label for label, prediction in pairs if label == prediction)
    assert 0 < right.total() < len(pairs) and len(found) > 3
    assert measured["macro_f1"] == pytest.approx(fmean(2 * right[c] / (true[c] + found[c]) for c in {*true, *found}))
    assert measured["balanced_accuracy"] == pytest.approx(fmean(right[c] / true[c] for c in true))
    assert measured["majority"] == max(true.values()) / len(pairs)
