"""Metrics by class: numbers by hand, and evaluations that count what a plain forward pass predicts."""

from __future__ import annotations

import pytest
import torch

from copra_fl.class_metrics import by_class, class_metrics
from copra_fl.training.evaluation import evaluate_each
from tests.support.tiny import Settings
from tests.support.worlds import World


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
        assert first["macro_f1"] == class_metrics(expected)["macro_f1"]
    (without,) = evaluate_each(world.plain, [world.start], world.data, held_out, 20)
    assert without.keys() == {"loss", "accuracy", "examples"}, "clients send no counts by class"
