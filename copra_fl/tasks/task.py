"""The interface of a task: from rows of a table to batches, and from hidden states to losses and metrics.

The unit of loss is a target: one per example in classification, many per example in language modeling.

    rows  --encode-->  tensors, kept in the cache  --examples-->  batches: a model's inputs, and `labels`
    batch  --base-->  hidden states  --features-->  (targets, D)  --head-->  logits  --losses-->  (targets,)

Everything else (the clients' examples, adapters, gates, training, aggregation) is the same for every task.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from copra_fl.config import DataConfig, Value
from copra_fl.sources.tables import as_text

if TYPE_CHECKING:  # slow to import, and needed only if the cache is empty
    import pandas as pd

#: a model's inputs by name, and ``labels`` for tasks that have them; rows are examples, or targets in the order of the
#: examples. With several data sets also ``outputs`` (B, L) bool: the labels of each example's data set
Inputs = Mapping[str, Tensor]


class Examples(Protocol):
    """All examples of a data set, encoded; subsets are arrays of indices into them.

    Attributes:
        lengths: (N,) number of tokens of each example.
        num_targets: (N,) number of targets of each example.
        max_length: maximum number of tokens of an example.
    """

    @property
    def lengths(self) -> np.ndarray: ...

    @property
    def num_targets(self) -> np.ndarray: ...

    @property
    def max_length(self) -> int: ...

    def __len__(self) -> int: ...

    def batch(self, indices: np.ndarray, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Return the examples `indices`, one row each, on `device`: the base's inputs by name, and ``labels``."""


class Task(ABC):
    """A task; the concrete methods and attributes are those of text classification.

    A subclass implements the abstract methods and overrides those concrete ones that differ. A `processor` is an
    instance of its `processor_class`.

    Attributes:
        columns: configuration keys of the table's columns that are read. The first is the content: examples with equal
            content are duplicates.
        optional_columns: keys of columns that are read if they are set.
        names_files: whether entries of the content column can be paths of files, as those of images can.
        options: further configuration keys that `encode` reads.
        labels: number of labels of an example in the ``label-column``: none, one, or several of a list of labels, which
            is the same on all nodes. With one, partitioners can split examples by label.
        trains_head: whether a linear layer is trained on the features; otherwise the base's own output layer, frozen,
            gives the logits.
        adapts_output_layer: whether the base's own output layer can have an adapter.
        model_class: the Transformers class that opens the base.
        processor_class: the Transformers class of the tokenizer or image processor that `encode` uses.
        peft_type: PEFT's name of the task (`peft.TaskType`), written to adapter folders.
        classifier_class: the Transformers class that opens a base with a classifier for this task; None without one.
        pipeline: Transformers' name of the task (`transformers.pipeline`), written to model cards.
        version: number to raise whenever `encode` would return other tensors for the same rows.
    """

    columns: ClassVar[tuple[str, ...]] = ("text-column", "label-column")
    optional_columns: ClassVar[tuple[str, ...]] = ()
    names_files: ClassVar[bool] = False
    options: ClassVar[tuple[str, ...]] = ()
    labels: ClassVar[Literal["none", "one", "several"]] = "one"
    trains_head: ClassVar[bool] = True
    adapts_output_layer: ClassVar[bool] = True
    model_class: ClassVar[Any] = AutoModel
    processor_class: ClassVar[Any] = AutoTokenizer
    peft_type: ClassVar[str] = "FEATURE_EXTRACTION"
    classifier_class: ClassVar[Any] = AutoModelForSequenceClassification
    pipeline: ClassVar[str] = "text-classification"
    version: ClassVar[int] = 1

    @property
    def name(self) -> str:
        """The name of the task in a configuration (`find_task`)."""
        module = type(self).__module__
        package, _, last = module.rpartition(".")
        if package == __package__:
            return last.replace("_", "-")
        attributes = (name for name, value in vars(sys.modules[module]).items() if value is self)
        attribute = next(attributes, "TASK")
        return module if package and attribute == "TASK" else f"{module}:{attribute}"

    # Rows to tensors.

    def content(self, column: pd.Series, folder: Path) -> pd.Series:
        """Return the content column as values that can be compared, with NA for missing ones. By default texts.

        Relative paths in it start from `folder`, the table's folder.
        """
        return as_text(column)

    def labels_of(self, entry: str) -> list[str]:
        """Return the labels in an entry of the label column."""
        return [entry]

    @abstractmethod
    def processor_digest(self, processor: Any) -> str:
        """Return a digest of all that affects encoding in `processor`. Raises ConfigError if it cannot be used."""

    @abstractmethod
    def encode(self, rows: pd.DataFrame, labels: list[str], processor: Any, data: DataConfig) -> dict[str, Tensor]:
        """Encode `rows`, whose columns are named as in `columns`, to the tensors that the cache keeps.

        `labels` is the list of all labels. With one label per example, the tensor ``labels`` (N,) int64 has its index.
        """

    @abstractmethod
    def examples(self, tensors: Mapping[str, Tensor], processor: Any, data: DataConfig) -> Examples:
        """Return the tensors of `encode` as examples."""

    def option_values(self, data: DataConfig) -> dict[str, Value]:
        """Return the value of each of `options` in `data`."""
        return {key: data.value(key) for key in self.options}

    def opened_processor(self, processor: Any, labels: list[str], options: Mapping[str, Any]) -> Any:
        """Return what makes new contents the inputs of an exported model: by default the `processor`.

        `options` are the `option_values` of the run.
        """
        return processor

    def saved_processor(self, opened: Any) -> Any:
        """Return the tokenizer or image processor of an adapter folder, from the `opened_processor`."""
        return opened

    def join(self, parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Join the encoded tensors of several tables into those of one table with all their rows, in order."""
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    # Batches to losses. Targets are in the order of their rows.

    def inputs(self, batch: Inputs) -> dict[str, Any]:
        """Return the arguments of the base's forward pass."""
        return {name: tensor for name, tensor in batch.items() if name not in ("labels", "outputs")}

    @abstractmethod
    def features(self, output: Any, batch: Inputs, pooling: str) -> Tensor:
        """Return (targets, D) the features of the base's `output`; in float32 or wider if a head is trained.

        Raises ConfigError for a pooling that the base does not have.
        """

    def head(self, width: int, num_labels: int) -> nn.Linear:
        """Return a new head on features of `width`, drawn from torch's global generator, which the caller seeds."""
        return nn.Linear(width, num_labels)

    def frozen_logits(self, output_layer: nn.Module, features: Tensor, batch: Inputs) -> Tensor:
        """Return the (targets, outputs) logits of the base's own output layer, for tasks that train no head.

        The base's own factors are applied to them afterwards (`models.own_logits`).
        """
        logits: Tensor = output_layer(features)
        return logits

    def frozen_head(self, output_layer: nn.Module, processor: Any) -> nn.Linear | None:
        """Return the rows of the base's own output layer that give the labels' logits; None if they are all of it.

        `processor` is the `opened_processor`.
        """
        return None

    def classifier_processor(self, processor: Any, max_length: int) -> Any:
        """Return the tokenizer of a merged classifier that makes contents its inputs, from the `opened_processor`.

        It truncates texts to `max_length` tokens when it is asked to truncate; 0: the length is not known.
        """
        if max_length and hasattr(processor, "model_max_length"):
            processor.model_max_length = max_length
        return processor

    @abstractmethod
    def losses(self, logits: Tensor, batch: Inputs) -> Tensor:
        """Return (targets,) the loss of each target from (targets, outputs) logits."""

    @abstractmethod
    def correct(self, logits: Tensor, batch: Inputs) -> Tensor:
        """Return (targets,) the score of each target from (targets, outputs) logits: 0 to 1, or a bool."""

    def predictions(self, logits: Tensor, batch: Inputs) -> Tensor | None:
        """Return (targets,) int64 the predicted label of each target; None for a task without one label per target."""
        return None

    def metrics(self, loss: float, accuracy: float) -> dict[str, float]:
        """Return further metrics of an evaluation, from its mean loss and accuracy."""
        return {}
