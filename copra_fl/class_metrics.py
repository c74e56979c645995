"""Metrics of a classifier from its confusion matrix, as scikit-learn defines them.

Accuracy hides a class that is never found where another one is frequent. These metrics weigh all classes alike:

    recall of c         = correct examples of c / examples of c
    F1 of c             = 2 correct of c / (examples of c + predictions of c)
    balanced accuracy   = mean recall, over the classes with examples
    macro-F1            = mean F1, over the classes with examples or predictions
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

#: confusion matrices of more classes are not computed
MAX_CLASSES = 100


def class_metrics(matrix: Sequence[Sequence[int]] | npt.NDArray[np.int64]) -> dict[str, float]:
    """Return the metrics of a matrix whose row i, column j counts the examples of class i predicted as class j."""
    counts = np.asarray(matrix)
    return metrics_of_counts(counts.diagonal(), counts.sum(1), counts.sum(0))


def metrics_of_counts(
    correct: npt.NDArray[np.int64], examples: npt.NDArray[np.int64], predicted: npt.NDArray[np.int64]
) -> dict[str, float]:
    """Return the metrics of (C,) numbers by class: examples that are predicted correctly, examples, and predictions.

    They are ``macro_f1``, ``balanced_accuracy``, and ``majority``: the share of the most frequent class, which is the
    accuracy of always predicting it.
    """
    scores = _scores(correct, examples, predicted)
    seen = examples > 0
    return {
        "macro_f1": float(scores["f1"][seen | (predicted > 0)].mean()),
        "balanced_accuracy": float(scores["recall"][seen].mean()),
        "majority": float(examples.max() / examples.sum()),
    }


def by_class(matrix: Sequence[Sequence[int]] | npt.NDArray[np.int64]) -> dict[str, npt.NDArray[np.float64]]:
    """Return (C,) ``examples``, ``precision``, ``recall`` and ``f1`` of each class; 0 where nothing can be counted."""
    counts = np.asarray(matrix)
    return _scores(counts.diagonal(), counts.sum(1), counts.sum(0))


def _scores(
    correct: npt.NDArray[np.int64], examples: npt.NDArray[np.int64], predicted: npt.NDArray[np.int64]
) -> dict[str, npt.NDArray[np.float64]]:
    return {
        "examples": examples.astype(np.float64),
        "precision": correct / np.maximum(predicted, 1),
        "recall": correct / np.maximum(examples, 1),
        "f1": 2 * correct / np.maximum(examples + predicted, 1),
    }
