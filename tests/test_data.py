"""Files are loaded to token tensors, held-out sets and clients. Texts are unique, so tokens identify an example."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from copra_fl.config import ConfigError
from copra_fl.data.federated import FederatedData, load_data
from tests.support.real_runs import HANG_SECONDS
from tests.support.tables import CLASSES, make_config, make_rows

pytestmark = pytest.mark.usefixtures("empty_caches")

Load = Callable[..., FederatedData]


@pytest.fixture
def load_rows(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Load:
    """A function that writes a table to a CSV file and loads it."""

    def load_rows(rows: pd.DataFrame, **changes: Any) -> FederatedData:
        rows.to_csv(tmp_path / "rows.csv", index=False)
        return load_data(make_config(tmp_path / "rows.csv", **changes), tokenizer)

    return load_rows


def texts_of(data: FederatedData, indices: np.ndarray, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    examples = data.examples
    bounds = [(examples.offsets[i], examples.offsets[i + 1]) for i in indices]
    return [tokenizer.decode(examples.input_ids[start:end], skip_special_tokens=True) for start, end in bounds]


def same_split(a: FederatedData, b: FederatedData) -> bool:
    return all(map(np.array_equal, a.train + a.validation, b.train + b.validation))


def members(data: FederatedData) -> list[set[int]]:
    return [set(train) | set(validation) for train, validation in zip(data.train, data.validation, strict=True)]


def label_counts(data: FederatedData) -> np.ndarray:
    """Return (clients, labels) the numbers of training and validation examples."""
    labels, classes = data.examples.labels.numpy(), len(data.label_names)
    return np.array([np.bincount(labels[list(client)], minlength=classes) for client in members(data)])


def pool_of(data: FederatedData) -> np.ndarray:
    """Return the examples that are not held out, if no duplicates were dropped."""
    return np.setdiff1d(np.arange(len(data.examples)), np.concatenate([data.server_validation, data.test]))


def client_sizes(data: FederatedData) -> list[int]:
    return [len(client) for client in members(data)]


def global_generators() -> list[str]:
    return [str(random.getstate()), str(np.random.get_state()), str(torch.get_rng_state().tolist())]


PARTITIONERS: list[dict[str, Any]] = [
    {"partitioner": "iid"},
    {"partitioner": "dirichlet", "alpha": 0.3},
    {"partitioner": "pathological", "classes_per_client": 2},
    {"partitioner": "shards", "classes_per_client": 2},
    {"partitioner": "natural", "client_column": "owner", "num_clients": 0},
]


@pytest.mark.parametrize("split", PARTITIONERS, ids=lambda split: split["partitioner"])
def test_partitions_are_disjoint_complete_and_seeded(
    rows: pd.DataFrame, load_rows: Load, split: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    states = global_generators()
    data = load_rows(rows, **split)
    used = np.concatenate([*data.train, *data.validation, data.server_validation, data.test])
    assert len(used) == len(set(used)) == 600 - data.dropped.unassigned
    assert data.dropped.unassigned == (8 if split["partitioner"] == "shards" else 0)  # 500 in 12 shards of 41
    held = [len(validation) for validation in data.validation]
    assert held == [(len(t) + v) // 10 for t, v in zip(data.train, held, strict=True)]

    monkeypatch.setenv("COPRA_FL_CACHE", str(tmp_path / "another"))
    again, other = load_rows(rows, **split), load_rows(rows, **split, seed=1)
    assert same_split(data, again) and data.digest == again.digest
    assert not same_split(data, other) and data.digest != other.digest
    natural = split["partitioner"] == "natural"
    assert (members(data) == members(other)) == np.array_equal(label_counts(data), label_counts(other)) == natural
    assert states == global_generators()


@pytest.mark.parametrize("split", PARTITIONERS, ids=lambda split: split["partitioner"])
def test_limits_keep_the_first_training_examples_and_nothing_else_changes(
    rows: pd.DataFrame, load_rows: Load, split: dict[str, Any]
) -> None:
    """Oracle: one pass over each client's examples that counts them."""
    whole = load_rows(rows, **split)
    labels = whole.examples.labels.tolist()
    for limits in ({"client_examples": 11}, {"shots": 2}, {"client_examples": 11, "shots": 3}, {"shots": 500}):
        data, expected = load_rows(rows, **split, **limits), []
        for train in whole.train:
            kept: list[int] = []
            for example in train.tolist():
                same_label = sum(labels[other] == labels[example] for other in kept)
                if same_label < limits.get("shots", 600) and len(kept) < limits.get("client_examples", 600):
                    kept.append(example)
            expected.append(kept)
        assert [train.tolist() for train in data.train] == expected
        assert data.dropped.limited == sum(map(len, whole.train)) - sum(map(len, expected))
        assert all(map(np.array_equal, data.validation, whole.validation))
        assert np.array_equal(data.server_validation, whole.server_validation) and np.array_equal(data.test, whole.test)
        assert data.tokens_digest == whole.tokens_digest and data.digest != whole.digest


def test_unassigned_examples_are_counted(rows: pd.DataFrame, load_rows: Load) -> None:
    """Shards: 500 examples in 6 x 7 = 42 shards of 11 leave 38. Pathological: 2 clients with 1 of 4 classes each."""
    shards = load_rows(rows, partitioner="shards", classes_per_client=7)
    assert client_sizes(shards) == [77] * 6 and shards.dropped.unassigned == 38
    two = load_rows(rows, partitioner="pathological", classes_per_client=1, num_clients=2)
    air, fire, sea, soil = np.bincount(two.examples.labels[pool_of(two)])
    assert label_counts(two).tolist() == [[air, 0, 0, 0], [0, fire, 0, 0]] and two.dropped.unassigned == sea + soil


def test_iid_clients_have_similar_label_distributions(load_rows: Load) -> None:
    counts = label_counts(load_rows(make_rows(4000), partitioner="iid", num_clients=4))
    assert counts.sum(1).tolist() == [975] * 4
    # A share of 1/4 in 975 draws has a standard deviation of 0.014.
    assert np.abs(counts / counts.sum(1, keepdims=True) - 0.25).max() < 0.05


def test_small_alpha_is_more_skewed_than_large(rows: pd.DataFrame, load_rows: Load) -> None:
    def largest_share(alpha: float) -> float:
        counts = label_counts(load_rows(rows, alpha=alpha))
        return float((counts.max(0) / counts.sum(0)).mean())

    assert largest_share(0.05) > 0.7
    assert largest_share(1000.0) == pytest.approx(1 / 6, abs=0.05)


def test_pathological_clients_have_exactly_classes_per_client_labels(rows: pd.DataFrame, load_rows: Load) -> None:
    for classes in (1, 2, 4):
        data = load_rows(rows, partitioner="pathological", classes_per_client=classes)
        assert (label_counts(data) > 0).sum(1).tolist() == [classes] * 6


def test_natural_clients_are_the_values_of_the_column_in_order(
    rows: pd.DataFrame, load_rows: Load, tokenizer: PreTrainedTokenizerFast
) -> None:
    owner = dict(zip(rows["text"], rows["owner"], strict=True))
    data = load_rows(rows, partitioner="natural", client_column="owner", num_clients=0)
    assert data.client_names == [str(value) for value in range(12)]
    for client, indices in enumerate(data.train):
        assert {owner[text] for text in texts_of(data, indices, tokenizer)} == {client}

    sizes = Counter(owner[text] for text in texts_of(data, pool_of(data), tokenizer))
    largest = load_rows(rows, partitioner="natural", client_column="owner", num_clients=3)
    assert largest.client_names == [str(value) for value in sorted(dict(sizes.most_common(3)))]
    assert largest.dropped.unassigned == 500 - sum(dict(sizes.most_common(3)).values())
    assert client_sizes(largest) == [sizes[int(name)] for name in largest.client_names]


def test_held_out_clients_are_held_out_whole(
    rows: pd.DataFrame, load_rows: Load, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Of the 5 largest of 12 owners, 2 are held out, the same for every seed; the other 7 owners are not used."""
    owner = dict(zip(rows["text"], rows["owner"].astype(str), strict=True))
    rows.loc[0, "text"] = next(
        text for text in rows["text"] if owner[text] == "10"
    )  # a row of owner 0, which is not chosen
    natural = {"partitioner": "natural", "client_column": "owner", "num_clients": 3, "held_out_clients": 2}
    data = load_rows(rows, **natural)

    def owners(*parts: np.ndarray) -> set[str]:
        return {owner[text] for text in texts_of(data, np.concatenate(parts), tokenizer)}

    largest = [name for name, _ in Counter(owner.values()).most_common(5)]
    assert sorted(data.client_names + data.held_out_names) == sorted(largest)
    assert owners(*data.train, *data.validation) == owners(data.test, data.server_validation) == set(data.client_names)
    assert owners(data.held_out) == set(data.held_out_names)
    sizes = Counter(owner.values())
    assert len(data.held_out) == min(60, sum(sizes[name] for name in data.held_out_names))
    assert (len(data.test), len(data.server_validation), data.dropped.unassigned) == (60, 40, 0)
    assert sum(client_sizes(data)) == sum(sizes[name] for name in data.client_names) - 100
    other = load_rows(rows, **natural, seed=3)
    assert (other.held_out_names, list(other.test)) == (data.held_out_names, list(data.test))
    everyone = load_rows(rows, **natural | {"num_clients": 0})
    assert len(everyone.client_names) == 10 and len(everyone.held_out_names) == 2


def test_held_out_examples_that_a_client_also_has_are_dropped(
    rows: pd.DataFrame, load_rows: Load, tokenizer: PreTrainedTokenizerFast
) -> None:
    natural = {"partitioner": "natural", "client_column": "owner", "num_clients": 3, "held_out_clients": 2}
    before = load_rows(rows, **natural)
    (copied,) = texts_of(before, before.held_out[:1], tokenizer)
    (replaced,) = texts_of(before, before.train[0][:1], tokenizer)
    rows.loc[rows["text"] == replaced, "text"] = copied
    after = load_rows(rows, **natural)
    assert len(after.held_out) == len(before.held_out) - 1 and after.dropped.duplicates == 1
    assert copied not in texts_of(after, after.held_out, tokenizer)


def test_held_out_sets_depend_on_the_data_alone(rows: pd.DataFrame, load_rows: Load) -> None:
    data = load_rows(rows)
    for changes in ({"seed": 7}, {"partitioner": "iid"}, {"num_clients": 3}, {"validation_fraction": 0.5}):
        other = load_rows(rows, **changes)
        assert np.array_equal(data.test, other.test)
        assert np.array_equal(data.server_validation, other.server_validation)
    assert (len(data.test), len(data.server_validation)) == (60, 40)


def test_duplicates_are_dropped_from_the_held_out_sets(
    rows: pd.DataFrame, load_rows: Load, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Rows 2k and 2k + 1 get the same text: if they are in different sets, one is dropped."""
    data = load_rows(rows)
    place = ["test" if i in data.test else "validation" if i in data.server_validation else "pool" for i in range(600)]
    rows.loc[1::2, "text"] = rows.loc[0::2, "text"].to_numpy()
    expected = sum(place[first] != place[first + 1] for first in range(0, 600, 2))

    planted = load_rows(rows)
    assert sum(client_sizes(planted)) + planted.dropped.trained == 500
    assert planted.dropped.duplicates == expected > 50
    assert len(planted.test) + len(planted.server_validation) == 100 - expected
    held = [set(texts_of(planted, indices, tokenizer)) for indices in (planted.test, planted.server_validation)]
    pool = set(texts_of(planted, np.concatenate(planted.train + planted.validation), tokenizer))
    assert not held[0] & held[1] and not held[0] & pool and not held[1] & pool


def test_no_client_validates_on_an_example_that_a_client_trains_on(
    rows: pd.DataFrame, load_rows: Load, tokenizer: PreTrainedTokenizerFast
) -> None:
    rows.loc[1::2, "text"] = rows.loc[0::2, "text"].to_numpy()
    loose = {"validation_fraction": 0.3, "client_examples": 20}
    data = load_rows(rows, **loose)
    trained = set(texts_of(data, np.concatenate(data.train), tokenizer))
    validation = [text for subset in data.validation for text in texts_of(data, subset, tokenizer)]
    assert len(validation) > 60 and not trained & set(validation)
    rows["text"] = [f"{text} {number}" for number, text in enumerate(rows["text"])]
    unique = load_rows(rows, **loose)
    assert unique.dropped.trained == 0
    left_out = sum(map(len, unique.validation)) - len(validation)
    assert data.dropped.trained == left_out > 5, "texts of clients that are cut off by client-examples do not count"


def test_near_duplicates_are_dropped_if_asked_for(
    rows: pd.DataFrame, load_rows: Load, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Three test texts get a near-duplicate in the pool, and a fourth one that differs in a word."""
    before = load_rows(rows)
    tests, pooled = (texts_of(before, indices[:4], tokenizer) for indices in (before.test, before.train[0]))
    edited = [tests[0].upper(), f"#{tests[1]}!?", f"{tests[2].replace(' ', ', ')} https://t.co/A1", f"{tests[3]} 7"]
    rows["text"] = rows["text"].replace(dict(zip(pooled, edited, strict=True)))
    exact, near = load_rows(rows), load_rows(rows, duplicates="near")
    assert np.array_equal(exact.test, before.test) and exact.dropped.duplicates == 0
    assert near.test.tolist() == before.test[3:].tolist() and near.dropped.duplicates == 3
    assert all(map(np.array_equal, exact.train, near.train))


def test_a_test_file_is_the_test_set_without_examples_of_the_training_data(
    rows: pd.DataFrame, load_rows: Load, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    test = pd.concat([make_rows(640)[600:], rows[:7]])
    test.drop(columns="owner").to_json(tmp_path / "test.jsonl", orient="records", lines=True)
    data = load_rows(rows, test_file=str(tmp_path / "test.jsonl"), partitioner="natural", client_column="owner")
    assert sorted(texts_of(data, data.test, tokenizer)) == sorted(test["text"][:40])
    assert data.dropped.duplicates == 7
    assert len(data.server_validation) == 40
    assert sum(client_sizes(data)) + data.dropped.unassigned == 600 - 40


def test_batches_equal_the_output_of_the_tokenizer(
    rows: pd.DataFrame, load_rows: Load, tokenizer: PreTrainedTokenizerFast
) -> None:
    data = load_rows(rows, max_length=9)
    label = dict(zip(rows["text"], rows["label"], strict=True))
    full = load_rows(rows)
    for indices in (data.test[:16], data.train[0], data.train[1][5:], data.test[:1]):
        texts = texts_of(full, indices, tokenizer)
        expected = tokenizer(texts, truncation=True, max_length=9, padding="longest", return_tensors="pt")
        batch = data.examples.batch(indices)
        assert batch.keys() == {"input_ids", "attention_mask", "labels"}
        assert torch.equal(batch["input_ids"], expected["input_ids"])
        assert torch.equal(batch["attention_mask"], expected["attention_mask"])
        assert [data.label_names[k] for k in batch["labels"]] == [label[text] for text in texts]
        assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
        assert data.examples.lengths[indices].tolist() == expected["attention_mask"].sum(1).tolist()


class Refusing(PreTrainedTokenizerFast):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("asked to tokenize")


def test_the_second_load_does_not_tokenize(
    rows: pd.DataFrame, load_rows: Load, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    first = load_rows(rows)
    tokenizer(["air"], truncation=True, max_length=5, padding="max_length")  # the tokenizer keeps these settings
    refusing = Refusing(tokenizer_object=tokenizer.backend_tokenizer, pad_token="[PAD]")
    again = load_data(make_config(tmp_path / "rows.csv"), refusing)
    assert same_split(first, again) and torch.equal(first.examples.input_ids, again.examples.input_ids)
    load_data(make_config(tmp_path / "rows.csv", seed=5, partitioner="iid"), refusing)
    for changes in ({"max_length": 5}, {"test_examples": 50}, {"server_validation_examples": 50}):
        with pytest.raises(AssertionError, match="asked to tokenize"):
            load_data(make_config(tmp_path / "rows.csv", **changes), refusing)
    rows[:-1].to_csv(tmp_path / "rows.csv", index=False)
    with pytest.raises(AssertionError, match="asked to tokenize"):
        load_data(make_config(tmp_path / "rows.csv"), refusing)


WORKER = """
import hashlib, json, sys
from transformers import PreTrainedTokenizerFast
from copra_fl.config import Config
from copra_fl.data.federated import load_data

class Counting(PreTrainedTokenizerFast):
    calls = 0
    def __call__(self, *args, **kwargs):
        Counting.calls += 1
        return super().__call__(*args, **kwargs)

print("ready", flush=True)
sys.stdin.readline()
data = load_data(Config.from_flat(json.loads(sys.argv[2])), Counting.from_pretrained(sys.argv[1]))
heavy = sorted({"pandas", "datasets", "flwr_datasets"} & set(sys.modules))
split = hashlib.sha256(b"".join(indices.tobytes() for indices in data.train)).hexdigest()
print(json.dumps({"digest": data.digest, "split": split, "calls": Counting.calls, "heavy": heavy}))
"""


def test_two_processes_share_the_work(rows: pd.DataFrame, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Of two that start on an empty cache at once, one tokenizes and the other waits. A third only reads."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    rows.to_csv(tmp_path / "rows.csv", index=False)
    settings = json.dumps(make_config(tmp_path / "rows.csv").to_flat())
    command = [sys.executable, "-c", WORKER, str(tmp_path / "tokenizer"), settings]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    workers = [
        subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for worker in workers:
        assert worker.stdout is not None and worker.stdout.readline() == "ready\n"
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("go\n")
        worker.stdin.flush()
    results = [json.loads(worker.communicate(timeout=HANG_SECONDS)[0]) for worker in workers]
    third = subprocess.run(command, env=environment, input="go\n", stdout=subprocess.PIPE, text=True, check=True)
    results.append(json.loads(third.stdout.splitlines()[-1]))
    assert sorted(result["calls"] for result in results[:2]) == [0, 2]  # 600 texts, 512 in a call
    assert results[2]["calls"] == 0 and results[2]["heavy"] == []
    assert len({result["digest"] for result in results}) == len({result["split"] for result in results}) == 1
    made = {path.suffix for path in (tmp_path / "cache").glob("*/*") if path.parent.name != "kept"}
    assert made == {".safetensors", ".lock"}


def test_formats_give_equal_results(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Labels are numbers with gaps, which pandas turns into floats where a format lets it."""
    rows = make_rows()
    rows["label"] = rows.index % 11
    rows["label"] = rows["label"].astype("Int64").mask(rows.index % 50 == 3)
    rows.loc[5, "text"] = "NA"
    rows.to_csv(tmp_path / "rows.csv", index=False)
    rows.to_json(tmp_path / "rows.jsonl", orient="records", lines=True)
    rows.to_parquet(tmp_path / "rows.parquet")
    rows.astype({"label": "float64"}).to_parquet(tmp_path / "floats.parquet")
    changes = {"partitioner": "natural", "client_column": "owner", "num_clients": 4}
    names = ("rows.csv", "rows.jsonl", "rows.parquet", "floats.parquet")
    first, *others = [load_data(make_config(tmp_path / name, **changes), tokenizer) for name in names]
    assert first.label_names == [str(label) for label in range(11)]
    assert first.dropped.empty == 12
    for other in others:
        assert same_split(first, other)
        assert torch.equal(first.examples.input_ids, other.examples.input_ids)
        assert torch.equal(first.examples.labels, other.examples.labels)
        assert (first.label_names, first.client_names) == (other.label_names, other.client_names)
        assert first.dropped.empty == other.dropped.empty
    assert not (tmp_path / "hf-cache").exists()


def test_rows_without_text_label_or_client_are_dropped_and_counted(rows: pd.DataFrame, load_rows: Load) -> None:
    rows = rows.astype({"owner": "object"})
    rows.loc[[0, 1], "text"] = [None, "  "]
    rows.loc[[1, 2], "label"] = None
    rows.loc[3, "owner"] = None
    assert load_rows(rows).dropped.empty == 3
    data = load_rows(rows, client_column="owner")
    assert data.dropped.empty == 4 and len(data.examples) == 596


def test_clients_without_examples_are_skipped_or_refused(rows: pd.DataFrame, load_rows: Load) -> None:
    data = load_rows(rows, alpha=0.01, num_clients=12)
    assert data.skipped == [client for client in range(12) if not len(data.train[client])] != []
    assert len(data.train) == len(data.validation) == len(data.client_names) == 12
    with pytest.raises(ConfigError, match=f"no training examples: {', '.join(map(str, data.skipped))}$"):
        load_rows(rows, alpha=0.01, num_clients=12, empty_clients="refuse")


def test_a_client_with_one_example_trains_on_it(rows: pd.DataFrame, load_rows: Load) -> None:
    data = load_rows(rows, partitioner="iid", num_clients=500, validation_fraction=0.9)
    assert [len(train) for train in data.train] == [1] * 500
    assert [len(validation) for validation in data.validation] == [0] * 500


def test_a_hub_data_set_has_its_label_names_and_test_set(
    rows: pd.DataFrame, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder in the hub's layout, opened by the same library call. GLUE hides test labels by -1."""
    names = ["soil", "sea", "fire", "air"]
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
    test = make_rows(640)[600:]

    def write(folder: str, split: str, table: pd.DataFrame, labels: list[int]) -> None:
        (tmp_path / "owner" / folder).mkdir(parents=True, exist_ok=True)
        part = datasets.Dataset.from_dict({"text": table["text"].tolist(), "label": labels}, features)
        part.to_parquet(tmp_path / "owner" / folder / f"{split}.parquet")

    for folder, test_labels in (("open", [names.index(label) for label in test["label"]]), ("hidden", [-1] * 40)):
        write(folder, "train", rows, [names.index(label) for label in rows["label"]])
        write(folder, "test", test, test_labels)
    monkeypatch.chdir(tmp_path)
    opened = load_data(make_config("owner/open"), tokenizer)
    assert opened.label_names == list(CLASSES)
    assert texts_of(opened, opened.test, tokenizer) == test["text"].tolist()
    assert [CLASSES[k] for k in opened.examples.labels[opened.test]] == test["label"].tolist()
    hidden = load_data(make_config("owner/hidden"), tokenizer)
    assert len(hidden.test) == 60 and hidden.test.max() < 600
