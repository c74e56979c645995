"""Tasks: clear errors, and the same training in both engines for any task, also with many targets per text."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from copra_fl.config import Config, ConfigError, DataConfig
from copra_fl.data.local import load_local_data
from copra_fl.models.build import load_processor
from copra_fl.models.export import load, save
from copra_fl.sources.tables import TableError
from copra_fl.tasks import Inputs, Task, find_task
from copra_fl.tasks.texts import Texts, encode_texts, tokenizer_digest
from copra_fl.training.evaluation import evaluate
from tests.support.compatibility import check
from tests.support.tiny import Settings
from tests.support.worlds import World, assert_alike

GUIDE = (Path(__file__).parent.parent / "docs" / "how-to" / "write-a-task.md").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Words(Texts):
    @property
    def num_targets(self) -> np.ndarray:
        return self.lengths - 2

    def batch(self, indices: np.ndarray, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Label each word with its token modulo 3; [CLS], [SEP] and [PAD] (tokens 0 to 4) have no label."""
        batch = self.inputs(indices)
        tokens = batch["input_ids"]
        return batch | {"labels": torch.where(tokens > 4, tokens % 3, -100)}


class Tagging(Task):
    """One label per word, so texts of different lengths have different numbers of targets."""

    columns = ("text-column",)
    labels = "none"

    def processor_digest(self, processor: Any) -> str:
        return tokenizer_digest(processor)

    def encode(self, rows: pd.DataFrame, labels: list[str], processor: Any, data: DataConfig) -> dict[str, Tensor]:
        return encode_texts(processor, rows["text-column"], data.max_length)

    def examples(self, tensors: Mapping[str, Tensor], processor: Any, data: DataConfig) -> Words:
        return Words(tensors["input_ids"], tensors["offsets"], int(processor.pad_token_id), data.max_length)

    def features(self, output: Any, batch: Inputs, pooling: str) -> Tensor:
        return output.last_hidden_state[batch["labels"] >= 0].float()

    def head(self, width: int, num_labels: int) -> nn.Linear:
        return nn.Linear(width, 3)

    def losses(self, logits: Tensor, batch: Inputs) -> Tensor:
        return F.cross_entropy(logits, batch["labels"][batch["labels"] >= 0], reduction="none")

    def correct(self, logits: Tensor, batch: Inputs) -> Tensor:
        return logits.argmax(1) == batch["labels"][batch["labels"] >= 0]

    def metrics(self, loss: float, accuracy: float) -> dict[str, float]:
        return {"error": 1 - accuracy}


TASK = Tagging()


@pytest.fixture
def uneven(tiny: Settings, tmp_path: Path) -> Settings:
    """Texts of 2 to 8 words."""
    words = pd.read_csv(str(tiny["dataset"]))["text"].str.split()
    texts = [" ".join(text_words[: 2 + i % 7]) for i, text_words in enumerate(words)]
    pd.DataFrame({"text": texts}).to_csv(tmp_path / "uneven.csv", index=False)
    return tiny | {"dataset": str(tmp_path / "uneven.csv"), "task": "tests.test_tasks", "partitioner": "iid"}


@pytest.mark.parametrize("changes", [{}, {"gradient-accumulation": 3, "lora-dropout": 0.2, "local-epochs": 1}])
def test_clients_with_different_numbers_of_targets_train_as_if_alone(uneven: Settings, changes: Settings) -> None:
    """Oracle: `train_client`, each client alone with plain PEFT."""
    world = World(uneven | changes)
    assert len(set(world.data.examples.num_targets)) > 5 and world.data.label_names == []
    for update in world.together(*range(6)):
        assert_alike(update, world.alone(update.client), 1e-5)


def test_metrics_are_means_over_targets(uneven: Settings) -> None:
    """Oracle: each text alone through PEFT's model, with the losses of all words in one list."""
    world = World(uneven)
    losses, right = [], []
    with torch.inference_mode():
        world.plain.write_adapter(world.start)
        for index in world.data.server_validation:
            batch = world.data.examples.batch(np.array([index]))
            hidden = world.plain.peft(input_ids=batch["input_ids"]).last_hidden_state[0, 1:-1]
            logits, labels = world.plain.head(hidden), batch["input_ids"][0, 1:-1] % 3
            losses += (torch.logsumexp(logits, 1) - logits[torch.arange(len(labels)), labels]).tolist()
            right += (logits.argmax(1) == labels).tolist()
    indices = world.data.server_validation
    expected = {"loss": np.mean(losses), "accuracy": np.mean(right), "examples": len(indices)}
    for model in (world.plain, world.stacked):
        first, other = evaluate(model, [world.start] * 2, world.data.examples, indices, 14)
        assert first == pytest.approx(expected | {"error": 1 - np.mean(right)}, rel=1e-5)
        assert other == pytest.approx(first)


@pytest.fixture
def topics(tiny: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """The task of docs/how-to/write-a-task.md, with texts labeled with each topic that has at least three words."""
    (tmp_path / "hospital").mkdir()
    (source,) = re.findall(r"^```python\n(.*?)^```", GUIDE, re.MULTILINE | re.DOTALL)
    assert source.count("\n") < 60
    (tmp_path / "hospital" / "topics.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    rows = pd.read_csv(str(tiny["dataset"]))
    names = ("sea", "sky", "sand")
    rows["label"] = ["|".join(t for t in names if text.count(t) > 2) for text in rows["text"]]
    rows.to_csv(tmp_path / "notes.csv", index=False)
    return tiny | {"task": "hospital.topics", "dataset": str(tmp_path / "notes.csv"), "partitioner": "iid"}


def test_the_task_of_the_guide_trains_in_both_engines_and_can_be_saved(topics: Settings, tmp_path: Path) -> None:
    world = World(topics)
    assert world.data.label_names == ["sand", "sea", "sky"]
    (update,) = world.together(0)
    assert_alike(update, world.alone(0), 1e-5)
    indices = world.data.server_validation
    (metrics,) = evaluate(world.stacked, [world.start | update.adapter], world.data.examples, indices, 60)
    save(world.plain, tmp_path / "adapter", world.data.label_names, world.config.data)
    batch = world.data.examples.batch(indices)
    opened = load(tmp_path / "adapter", device="cpu")
    with torch.inference_mode():
        probabilities = torch.sigmoid(opened.model(**batch).double())
    right = torch.where(batch["labels"] > 0, probabilities, 1 - probabilities)
    assert metrics["loss"] == pytest.approx(float(-right.log().mean()), rel=1e-4)
    assert metrics["accuracy"] == pytest.approx(float((right > 0.5).double().mean()))


def test_the_labels_of_a_local_file_must_be_in_the_list(topics: Settings, tmp_path: Path) -> None:
    config = Config.from_flat(topics | {"partitioner": "own", "labels": "sand,sea,sky"})
    processor = load_processor(config.model)
    local = load_local_data(config, processor, str(topics["dataset"]), client=0, num_clients=1)
    assert set(local.examples.batch(local.train[0])["labels"].sum(1).tolist()) > {1.0}
    with pytest.raises(TableError, match="examples have a label that is none of sand, sea"):
        load_local_data(config.changed(labels="sand,sea"), processor, str(topics["dataset"]), client=0, num_clients=1)


def test_tasks_are_found_by_name() -> None:
    for name in ("text-classification", "tests.test_tasks"):
        assert find_task(name).name == name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "text-clasification"}, "unknown task 'text-clasification'. Did you mean 'text-classification'"),
        ({"task": "texts"}, "unknown task 'texts'"),
        ({"task": "hospital.nowhere"}, "no module hospital.nowhere that can be imported and has TASK"),
        ({"task": "tests.rounds"}, "no module tests.rounds that can be imported and has TASK"),
        (
            {"task": "tests.test_tasks"},
            "partitioner = 'dirichlet' .*'tests.test_tasks' does not have exactly one label .*natural, iid",
        ),
        ({"dataset": "", "partitioner": "own"}, "dataset = '' .*need the list of labels"),
    ],
)
def test_a_task_refuses_settings_that_it_does_not_support(changes: Settings, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(Config.from_flat(changes))


def test_a_task_without_labels_needs_no_list_of_them() -> None:
    check(Config.from_flat({"task": "tests.test_tasks", "dataset": "", "partitioner": "own"}))
