"""Classify the rows of a table with a saved model: labels, probabilities, and their score."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from copra_fl.class_metrics import metrics_of_counts
from copra_fl.config import ConfigError, DataConfig, ModelConfig
from copra_fl.models.build import check_max_length
from copra_fl.models.export import SavedModel
from copra_fl.sources.tables import Table, TableError, as_text, codes, separator_hint
from copra_fl.tasks.classification import Classification
from copra_fl.wording import listed

if TYPE_CHECKING:
    import pandas as pd

#: the column with the predicted label, and the beginning of the name of a column with a label's probability
PREDICTED, PROBABILITY = "predicted", "probability "
#: rows without content that an error names
MAX_NAMED_ROWS = 5


def predict(
    saved: SavedModel, table: Table, data: DataConfig, batch_size: int, on_progress: Callable[[int, int], None]
) -> pd.DataFrame:
    """Return the rows of `table`, in their order, with the predicted label and the probability of each label.

    The columns of the table stay, except for those with the bytes of images. The labels in it are not read
    (`score` reads them).

    Args:
        data: settings of the columns and of the length of texts, as in training.
        on_progress: called with rows done and rows in total.

    Raises ConfigError for a task that is not a classification with one label, a ``max-length`` above the model's and a
    column of the result that the table has already, TableError for a table that lacks the column of the content or has
    rows without content, which it names by their number.
    """
    task = saved.model.task
    if not isinstance(task, Classification) or task.labels != "one":
        hint = ": `copra-fl chat` writes texts" if task.name == "causal-lm" else ""
        raise ConfigError(f"task = {task.name!r} does not classify with one label per example{hint}")
    check_max_length(ModelConfig(task=task.name, model=str(saved.model.base.name_or_path)), data.max_length)
    rows = table.read()
    content = _content(table, rows, task, data)
    names = [f"{PROBABILITY}{label}" for label in saved.labels]
    if taken := [name for name in (PREDICTED, *names) if name in rows]:
        raise ConfigError(f"{table.where} already has a column {taken[0]!r}; rename it")
    probabilities = _probabilities(saved, task, content, data, batch_size, on_progress)
    kept = [name for name in rows if not rows[name].map(_has_bytes).any()]
    result = rows[kept].copy()
    result[PREDICTED] = [saved.labels[number] for number in probabilities.argmax(1)]
    result[names] = probabilities.numpy()
    return result


@dataclass(frozen=True)
class Score:
    """Predictions compared with labels.

    Attributes:
        examples: rows with a label.
        unknown: those of them whose label the model does not have, which counts as a class that is never predicted.
        accuracy: share of correct predictions.
        macro_f1: as in `class_metrics`.
    """

    examples: int
    unknown: int
    accuracy: float
    macro_f1: float


def score(predicted: pd.DataFrame, labels: list[str], column: str) -> Score | None:
    """Return the score of the rows that `predict` returned against the labels in their `column`; None without any.

    `labels` are those of the model.
    """
    if column not in predicted:
        return None
    texts = as_text(predicted[column]).str.strip()
    is_labeled = texts.notna()
    if not is_labeled.any():
        return None
    classes = [*labels, *sorted(set(texts[is_labeled]) - set(labels))]
    truth, guess = (codes(entries[is_labeled], classes).numpy() for entries in (texts, predicted[PREDICTED]))
    counts = (np.bincount(indices, minlength=len(classes)) for indices in (truth[truth == guess], truth, guess))
    macro_f1 = metrics_of_counts(*counts)["macro_f1"]
    return Score(len(truth), int((truth >= len(labels)).sum()), float((truth == guess).mean()), macro_f1)


def _has_bytes(value: Any) -> bool:
    """Return True for bytes, and for a dict with bytes, as Hugging Face data sets store images."""
    return any(isinstance(part, bytes) for part in (value.values() if isinstance(value, dict) else [value]))


def _content(table: Table, rows: pd.DataFrame, task: Classification, data: DataConfig) -> pd.Series:
    """Return the texts or images of `rows`, all of them there."""
    key = task.columns[0]
    column = data.value(key)
    if rows.empty:
        raise TableError(f"{table.where} has no examples", "its file has no examples")
    if column not in rows:
        hint = separator_hint(rows) or f". Set it: --set {key}=COLUMN"
        raise TableError(
            f"{key} = {column!r} is not a column of {table.where}; its columns are {listed(list(rows))}{hint}",
            f"{key} = {column!r} is not a column of its file",
        )
    content = task.content(rows[column], table.folder)
    missing = np.flatnonzero(content.isna())
    if len(missing):
        numbers = ", ".join(map(str, missing[:MAX_NAMED_ROWS]))
        more = f" and {len(missing) - MAX_NAMED_ROWS} more" if len(missing) > MAX_NAMED_ROWS else ""
        problem = f"{key} = {column!r} is empty in {len(missing)} of {len(rows)} rows"
        raise TableError(f"{table.where}: {problem}: {numbers}{more} (counted from 0). Remove or fill them", problem)
    return content


@torch.inference_mode()
def _probabilities(
    saved: SavedModel,
    task: Classification,
    content: pd.Series,
    data: DataConfig,
    batch_size: int,
    on_progress: Callable[[int, int], None],
) -> torch.Tensor:
    """Return (N, labels) float32, in the order of `content`. Batches have examples of similar length."""
    import pandas as pd

    model = saved.model
    processor = task.processor_class.from_pretrained(model.base.name_or_path)
    unlabeled = pd.Series(pd.NA, index=content.index, dtype="string")
    rows = pd.DataFrame({task.columns[0]: content, "label-column": unlabeled})
    examples = task.examples(task.encode(rows, saved.labels, processor, data), processor, data)
    by_length = np.argsort(examples.lengths, kind="stable")
    probabilities = torch.zeros(len(by_length), len(saved.labels))
    for start in range(0, len(by_length), batch_size):
        indices = by_length[start : start + batch_size]
        logits = model(**examples.batch(indices, model.device))
        probabilities[torch.as_tensor(indices)] = logits.softmax(1).float().cpu()
        on_progress(start + len(indices), len(by_length))
    return probabilities
