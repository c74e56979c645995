"""What a task is: how rows of a table become batches, what is predicted of them, and how good that is.

The unit of loss is a target: one an example in classification, many an example in language modelling.

    rows  --encode-->  tensors, kept in the cache  --examples-->  batches: a model's inputs, and `labels`
    batch  --base-->  hidden states  --features-->  (targets, D)  --head-->  logits  --losses-->  (targets,)

Everything else (who holds which examples, adapters, gates, training, aggregation) is the same for every task.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from copra_fl.config import DataConfig
from copra_fl.sources.tables import as_text

if TYPE_CHECKING:  # slow to import, and needed only where the cache is empty
    import pandas as pd

#: a model's inputs and, where there are any, ``labels``: by name; rows are examples. With several data sets there is
#: ``outputs`` (B, L) bool besides: the labels of each example's own data set
Inputs = Mapping[str, Tensor]


class Examples(Protocol):
    """All examples of a data set, encoded; subsets are arrays of indices into them.

    Attributes:
        lengths: (N,) tokens of each example: what computing it costs.
        num_targets: (N,) targets of each example.
        max_length: tokens of the longest example that there can be.
    """

    @property
    def lengths(self) -> np.ndarray: ...

    @property
    def num_targets(self) -> np.ndarray: ...

    @property
    def max_length(self) -> int: ...

    def __len__(self) -> int: ...

    def batch(self, indices: np.ndarray, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """The examples `indices` as the base's inputs, by name, and ``labels``; a row each, on `device`."""


class Task(ABC):
    """A subclass fills in what is abstract, and changes what is not as for text classification.

    Attributes:
        columns: configuration keys of the columns that are read of a table; first the content, what examples are told
            apart by.
        optional_columns: keys of columns that are read too where they are set.
        labels: what an example has in its ``label-column``: none, one, or several of a list of labels, which all nodes
            agree on. With one, partitioners can deal examples out by it.
        trains_head: whether a linear layer is trained on the features; otherwise the base's own output layer makes
            logits of them, frozen.
        model_class: the Transformers class that opens the base.
        processor_class: the Transformers class of what `encode` needs besides: a tokenizer, an image processor.
        peft_type: PEFT's name for such a model (`peft.TaskType`), written beside an adapter.
        version: to be raised whenever `encode` would give other tensors for the same rows.
    """

    columns: ClassVar[tuple[str, ...]] = ("text-column", "label-column")
    optional_columns: ClassVar[tuple[str, ...]] = ()
    labels: ClassVar[Literal["none", "one", "several"]] = "one"
    trains_head: ClassVar[bool] = True
    model_class: ClassVar[Any] = AutoModel
    processor_class: ClassVar[Any] = AutoTokenizer
    peft_type: ClassVar[str] = "FEATURE_EXTRACTION"
    version: ClassVar[int] = 1

    @property
    def name(self) -> str:
        """What `find_task` finds it by."""
        package, _, module = type(self).__module__.rpartition(".")
        return module.replace("_", "-") if package == __package__ else f"{package}.{module}"

    # Rows to tensors.

    def content(self, column: pd.Series, folder: Path) -> pd.Series:
        """The content column as values that can be compared, NA for what is missing. Here texts.

        Relative paths in it are from `folder` on, where the table lies.
        """
        return as_text(column)

    def labels_of(self, entry: str) -> list[str]:
        """The labels that an entry of the label column names."""
        return [entry]

    @abstractmethod
    def processor_digest(self, processor: Any) -> str:
        """Names all that decides how `processor` encodes. Raises ConfigError for one that cannot be used."""

    @abstractmethod
    def encode(self, rows: pd.DataFrame, labels: list[str], processor: Any, data: DataConfig) -> dict[str, Tensor]:
        """What the cache keeps of `rows`, whose columns are called as in `columns`; `labels` is the list of them all.

        With one label an example, ``labels`` (N,) int64 is its place in the list.
        """

    @abstractmethod
    def examples(self, tensors: Mapping[str, Tensor], processor: Any, data: DataConfig) -> Examples:
        """What `encode` has made, as examples."""

    def join(self, parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """What `encode` has made of several tables, as of one that has all their rows. Here tensors have a row each."""
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    # Batches to losses. Targets come in the order of the rows that they belong to.

    def inputs(self, batch: Inputs) -> dict[str, Any]:
        """What the base is called with."""
        return {name: tensor for name, tensor in batch.items() if name not in ("labels", "outputs")}

    @abstractmethod
    def features(self, output: Any, batch: Inputs, pooling: str) -> Tensor:
        """(targets, D), what the head sees, of the base's `output`; in float32 at least where a head is trained.

        Raises ConfigError for a pooling that the base has not.
        """

    def head(self, width: int, num_labels: int) -> nn.Linear:
        """The head on features of `width`, where one is trained, as torch draws it; who calls sets the stream."""
        return nn.Linear(width, num_labels)

    @abstractmethod
    def losses(self, logits: Tensor, batch: Inputs) -> Tensor:
        """(targets, outputs) logits to the loss of each target (targets,)."""

    @abstractmethod
    def correct(self, logits: Tensor, batch: Inputs) -> Tensor:
        """(targets, outputs) logits to how right each target is (targets,): 0 to 1, or a bool."""

    def metrics(self, loss: float, accuracy: float) -> dict[str, float]:
        """What else is told of an evaluation, from its mean loss and accuracy."""
        return {}
