"""Several data sets in one federation: training, aggregation of the head's rows, metrics and reports of each."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from huggingface_hub import ModelCard
from rich.console import Console
from torch.nn import functional as F
from transformers import pipeline
from typer.testing import CliRunner

from copra_fl.adapters.state import Adapter, Update, part_of
from copra_fl.aggregation.heads import join, lend, split, without_others
from copra_fl.cli import app
from copra_fl.config import Config, ConfigError
from copra_fl.models.export import load
from copra_fl.probes.open_run import open_run
from copra_fl.reporting import report
from copra_fl.reporting.tables import dataset_tables
from copra_fl.reporting.terminal import results
from copra_fl.training.evaluation import evaluate_each, merge_gap_each
from copra_fl.training.plan import Plan, Start
from copra_fl.training.single import train_client
from tests.support.command_line import run_command
from tests.support.compatibility import check
from tests.support.federations import final_adapter, finished_run, journal
from tests.support.local_grid import run_federation
from tests.support.rounds import aggregate, make_round, random_adapter, update
from tests.support.tiny import Settings, make_texts
from tests.support.worlds import World, assert_alike, relative_error

TOPICS, MOODS = slice(0, 3), slice(3, 5)


@pytest.fixture(scope="module")
def two(tiny: Settings, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Settings with two data sets: topics (3 labels, clients 0, 1 and 2) and moods (2 labels, clients 3 and 4)."""
    folder = tmp_path_factory.mktemp("two")
    topics = make_texts(folder / "topics.csv", 300)
    rows = pd.read_csv(make_texts(folder / "source.csv", 320, seed=1))
    rows["label"] = np.where(rows["text"].str.count("sea") > rows["text"].str.count("sky"), "sea", "calm")
    rows.to_csv(folder / "moods.csv", index=False)
    held_out = {"server-validation-examples": 40, "test-examples": 30}
    return tiny | held_out | {"dataset": f"{topics}, {folder / 'moods.csv'}", "num-clients": 5, "partitioner": "iid"}


def alone(two: Settings, number: int, num_clients: int) -> Settings:
    return two | {"dataset": str(two["dataset"]).split(", ")[number], "num-clients": num_clients}


@pytest.mark.parametrize("limits", [{}, {"shots": 3, "client-examples": 5}], ids=["all", "few"])
def test_each_data_set_is_loaded_as_if_it_were_alone(two: Settings, limits: Settings) -> None:
    """Clients, held-out sets and tokens are the same; only indices are shifted."""
    two = two | limits
    joined = World(two).data
    assert joined.client_names == ["topics/0", "topics/1", "topics/2", "moods/0", "moods/1"]
    assert joined.label_names == ["topics/sand", "topics/sea", "topics/sky", "moods/calm", "moods/sea"]
    for number, clients in ((0, range(3)), (1, range(3, 5))):
        single, dataset = World(alone(two, number, len(clients))).data, joined.datasets[number]
        first, label = dataset.examples.start, dataset.labels.start
        assert dataset.clients == clients and len(single.label_names) == len(dataset.labels)
        for kind in ("train", "validation"):
            subsets = zip(getattr(single, kind), [getattr(joined, kind)[c] for c in clients], strict=True)
            for expected, indices in subsets:
                assert np.array_equal(expected + first, indices)
        for kind in ("server_validation", "test"):
            assert np.array_equal(getattr(single, kind) + first, dataset.among(getattr(joined, kind)))
        for alone_indices, indices in zip(single.train, [joined.train[c] for c in clients], strict=True):
            expected, batch = single.examples.batch(alone_indices), joined.examples.batch(indices)
            assert torch.equal(expected["input_ids"], batch["input_ids"])
            assert torch.equal(expected["labels"] + label, batch["labels"])
            assert all(batch["outputs"].nonzero()[:, 1].unique() == torch.tensor(dataset.labels))
        assert np.array_equal(single.examples.lengths, joined.examples.lengths[first : dataset.examples.stop])


def test_no_held_out_example_of_a_data_set_is_trained_on_in_another_one(two: Settings, tmp_path: Path) -> None:
    """Three examples that are held out of the topics, one of each set, become examples of clients of the moods."""
    topics, moods = map(pd.read_csv, str(two["dataset"]).split(", "))
    before = World(two).data
    copied = [before.test[0], before.server_validation[0], before.validation[0][0]]
    replaced = before.train[3][:3] - len(topics)
    moods.loc[replaced, "text"] = topics["text"][copied].to_numpy()
    moods.to_csv(tmp_path / "moods.csv", index=False)
    after = World(two | {"dataset": f"{str(two['dataset']).split(', ')[0]}, {tmp_path / 'moods.csv'}"}).data
    assert after.test.tolist() == before.test[1:].tolist()
    assert after.server_validation.tolist() == before.server_validation[1:].tolist()
    assert after.validation[0].tolist() == before.validation[0][1:].tolist()
    assert (after.dropped.duplicates, after.dropped.trained) == (2, 1)
    assert all(map(np.array_equal, after.train, before.train))


def test_a_client_trains_as_in_a_federation_with_its_data_set_alone(two: Settings) -> None:
    """Oracle: one data set and a head with its rows only. The gradient of all other rows is exactly 0."""
    flat = two | {"local-steps": 10}
    world, single = World(flat), World(alone(flat, 0, 3))
    for client in range(3):
        single.starts[client] = {
            name: tensor[TOPICS] if part_of(name) == "head" else tensor for name, tensor in world.start.items()
        }
        update, expected = world.alone(client), single.alone(client)
        for name in ("head.weight", "head.bias"):
            assert torch.equal(update.adapter[name][MOODS], world.start[name][MOODS])
            update.adapter[name] = update.adapter[name][TOPICS]
            assert not torch.equal(update.adapter[name], world.start[name][TOPICS])
        assert update.metrics["flops"] > expected.metrics["flops"], "a head with more rows"
        update.metrics["flops"] = expected.metrics["flops"]
        assert_alike(update, expected, 1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optimizer": "sgd", "momentum": 0.9, "learning-rate": 0.1, "max-grad-norm": 0.05},
        {"local-epochs": 1, "gradient-accumulation": 2, "batch-size": 7, "lora-dropout": 0.2},
        {"local-training": "head", "proximal-mu": 0.1},
    ],
)
def test_both_engines_train_the_same_adapters(two: Settings, changes: Settings) -> None:
    """Clients of both data sets share each step. Oracle: plain PEFT, each client alone."""
    world = World(two | {"local-steps": 20, "num-rounds": 4} | changes)
    for trained in world.together(*range(5)):
        assert_alike(trained, world.alone(trained.client), 1e-5)


def test_metrics_use_the_labels_of_the_examples_data_set_only(two: Settings) -> None:
    """Oracle: cross-entropy and argmax over the logits of a plain forward pass, restricted to the data set's labels."""
    world = World(two)
    held_out, expected = world.data.server_validation, {}
    with torch.inference_mode():
        world.plain.write_adapter(world.start)
        for dataset, rows in zip(world.data.datasets, (TOPICS, MOODS), strict=True):
            batch = world.data.examples.batch(dataset.among(held_out))
            del batch["outputs"]
            logits, labels = world.plain(**batch)[:, rows], batch["labels"] - rows.start
            right = (logits.argmax(1) == labels).double().mean()
            expected[dataset.name] = float(F.cross_entropy(logits, labels)), float(right), len(labels)
    for model in (world.plain, world.stacked):
        first, second = evaluate_each(model, [world.start] * 2, world.data, held_out, 20)
        assert first["loss"] == pytest.approx(second["loss"]) and first["examples"] == len(held_out)
        for name, (loss, accuracy, examples) in expected.items():
            metrics = first["datasets"][name]
            assert metrics == pytest.approx({"loss": loss, "accuracy": accuracy, "examples": examples}, rel=1e-5)
        for place, metric in enumerate(("loss", "accuracy")):
            assert first[metric] == pytest.approx(np.mean([values[place] for values in expected.values()]), rel=1e-5)
    (moods,) = evaluate_each(world.plain, [world.start], world.data, world.data.among(held_out, [1]), 20)
    assert list(moods["datasets"]) == ["moods"] and moods["loss"] == moods["datasets"]["moods"]["loss"]


def test_aggregation_of_a_split_head_by_hand() -> None:
    """Head rows 0 and 1 belong to clients 0 and 1 with 10 and 30 examples, row 2 to client 2 with 40 examples.

    Row 0: (10 * 1 + 30 * 5) / 40 = 4. Row 2: client 2 alone, 9. Adapter, over all clients: (10 * 1 + 30 * 5 + 40 * 9)
    / 80.
    """
    before = {"layer.0.query.lora_A.weight": torch.zeros(1, 2), "head.bias": torch.zeros(3)}
    updates = [update(c, {n: torch.full_like(t, v) for n, t in before.items()}, e)
               for c, v, e in ((0, 1.0, 10), (1, 5.0, 30), (2, 9.0, 40))]  # fmt: skip
    masked = [replace(u, adapter=without_others(split(u.adapter, [2, 1]), u.client // 2)) for u in updates]
    joined = join(aggregate("fedavg", make_round(split(before, [2, 1]), masked)).adapter)
    assert joined["head.bias"].tolist() == [4, 4, 9]
    assert joined["layer.0.query.lora_A.weight"].tolist() == [[6.5, 6.5]]
    without_client_2 = make_round(split(before, [2, 1]), masked[:2])
    assert join(aggregate("fedavg", without_client_2).adapter)["head.bias"].tolist() == [4, 4, 0]


@pytest.mark.parametrize("rule", ["fedavg", "zero-pad", "flora", "lora-fair", "fedrot-lora", "median", "trimmed-mean"])
def test_every_rule_aggregates_a_data_sets_rows_over_its_clients_only(rule: str) -> None:
    """Oracle: the same rule in a round with only these clients and a head with only these rows."""
    before, sizes = random_adapter(99), [1, 2]
    adapters = [random_adapter(client) for client in range(5)]
    updates = [update(client, adapter, 10 * (client + 1)) for client, adapter in enumerate(adapters)]
    numbers = [0, 0, 1, 1, 1]
    masked = [
        replace(u, adapter=without_others(split(u.adapter, sizes), n)) for u, n in zip(updates, numbers, strict=True)
    ]
    whole = join(aggregate(rule, make_round(split(before, sizes), masked)).adapter)
    for number, rows in ((0, slice(0, 1)), (1, slice(1, 3))):

        def cut(adapter: Adapter, rows: slice = rows) -> Adapter:
            return {name: t[rows] if part_of(name) == "head" else t for name, t in adapter.items()}

        members = [replace(u, adapter=cut(u.adapter)) for u, n in zip(updates, numbers, strict=True) if n == number]
        alone = aggregate(rule, make_round(cut(before), members)).adapter
        for name in ("head.weight", "head.bias"):
            assert torch.allclose(whole[name][rows], alone[name], atol=1e-6), name
    everybody = aggregate(rule, make_round(before, updates)).adapter
    assert all(torch.equal(whole[n], everybody[n]) for n in everybody if part_of(n) != "head")


def test_after_lending_rows_a_plain_average_is_the_average_of_each_data_sets_clients() -> None:
    adapters, weights = [random_adapter(client) for client in range(3)], [1.0, 3.0, 4.0]
    lent = lend(adapters, [0, 0, 1], weights, [1, 2])
    of_first = (adapters[0]["head.weight"][:1] + 3 * adapters[1]["head.weight"][:1]) / 4
    for client, rows in ((0, slice(0, 1)), (1, slice(0, 1)), (2, slice(1, 3))):
        assert torch.equal(lent[client]["head.weight"][rows], adapters[client]["head.weight"][rows])
    assert torch.allclose(lent[2]["head.weight"][:1], of_first, atol=1e-6)
    assert torch.equal(lent[0]["head.bias"][1:], adapters[2]["head.bias"][1:])
    average = sum(w * adapter["head.weight"] for w, adapter in zip(weights, lent, strict=True)) / 8
    assert torch.allclose(average[:1], of_first, atol=1e-6)
    assert torch.allclose(average[1:], adapters[2]["head.weight"][1:], atol=1e-6)
    assert all(torch.equal(lent[0][name], adapters[0][name]) for name in adapters[0] if part_of(name) != "head")
    assert lend(adapters, [None] * 3, weights, [])[0]["head.weight"] is adapters[0]["head.weight"]


def test_the_merge_gap_is_computed_on_each_data_set_over_its_clients() -> None:
    """On a: 0.5 - (0.2 + 3 * 0.4) / 4 = 0.15; on b: 0.9 - 1 = -0.1; mean 0.025."""

    def metrics(accuracy: float) -> dict[str, float]:
        return {"loss": 1.0, "accuracy": accuracy, "examples": 10}

    average = metrics(0.7) | {"datasets": {"a": metrics(0.5), "b": metrics(0.9), "without clients": metrics(0)}}
    clients = [metrics(0) | {"datasets": {name: metrics(value)}} for name, value in (("a", 0.2), ("a", 0.4), ("b", 1))]
    gap = merge_gap_each(average, clients, [1, 3, 50])
    assert {name: metric["accuracy"] for name, metric in gap["datasets"].items()} == pytest.approx(
        {"a": 0.15, "b": -0.1}
    )
    assert gap["accuracy"] == pytest.approx(0.025) and "examples" not in gap
    assert merge_gap_each(metrics(0.7), [metrics(0.5), metrics(0.6)], [1, 1]) == pytest.approx(
        {"loss": 0.0, "accuracy": 0.15}
    )


def by_hand(world: World, flat: Settings) -> Adapter:
    """Return a round of FedAvg in numpy: adapters averaged over all clients, head rows over those of their data set."""
    world.plan = Plan(1, tuple(range(5)), world.config)
    start = world.plain.read_adapter()
    updates: list[Update] = [train_client(world.plain, world.data, world.plan, c, Start(start)) for c in range(5)]
    examples = np.array([len(world.data.train[client]) for client in range(5)], float)
    made = {}
    for name, old in start.items():
        values = np.stack([u.adapter.get(name, old).double().numpy() for u in updates])
        made[name] = np.tensordot(examples / examples.sum(), values, axes=1)
        if part_of(name) == "head":
            for rows, clients in ((TOPICS, [0, 1, 2]), (MOODS, [3, 4])):
                weights = examples[clients] / examples[clients].sum()
                made[name][rows] = np.tensordot(weights, values[clients], axes=1)[rows]
    return {name: torch.from_numpy(value).float() for name, value in made.items()}


@pytest.fixture(scope="module")
def run(two: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    flat = two | {"path-pairs": 10, "weighting": "equal"}
    return finished_run(flat, tmp_path_factory.mktemp("several") / "run")


@pytest.mark.parametrize("engine", ["stacked", "peft"])
def test_a_round_equals_a_second_implementation(two: Settings, engine: str, tmp_path: Path) -> None:
    flat = two | {"num-rounds": 1, "engine": engine, "updates": "pooled", "weight-decay": 0.1}
    adapter, expected = final_adapter(run_federation(flat, tmp_path / "run")), by_hand(World(flat), flat)
    assert relative_error(adapter, expected) < 1e-5


def test_a_server_optimizer_steps_over_the_whole_head(two: Settings, tmp_path: Path) -> None:
    """FedAvgM with rate 1 and without momentum equals the average."""
    short = two | {"num-rounds": 1}
    plain = final_adapter(run_federation(short, tmp_path / "plain"))
    flat = short | {"server-optimizer": "fedavgm", "server-momentum": 0.0}
    stepped = final_adapter(run_federation(flat, tmp_path / "stepped"))
    assert all(torch.allclose(stepped[name], tensor, atol=1e-6) for name, tensor in plain.items())


def test_the_journal_has_the_metrics_of_each_data_set(run: Path, two: Settings) -> None:
    """Oracle: the adapter of the last checkpoint, evaluated here."""
    rows = journal(run)
    world, adapter = World(two), {name: t for name, t in final_adapter(run).items() if "/" not in name}
    (validation,) = evaluate_each(world.plain, [adapter], world.data, world.data.server_validation, 64)
    recorded = rows[-1]["validation"]
    for name in ("topics", "moods"):
        for metric, value in validation["datasets"][name].items():
            assert recorded["datasets"][name][metric] == pytest.approx(value, rel=1e-4)
    assert recorded["accuracy"] == pytest.approx(
        np.mean([metrics["accuracy"] for metrics in recorded["datasets"].values()])
    )
    assert set(rows[-1]["merge_gap"]["datasets"]) <= {"topics", "moods"}
    pairs = {tuple(path["clients"]) for path in rows[-1]["paths"]}
    assert len(pairs) == 10 and (2, 3) in pairs


def test_the_saved_model_names_the_data_set_of_each_label(run: Path, two: Settings) -> None:
    opened, world = load(run / "adapter", device="cpu"), World(two)
    assert opened.labels == world.data.label_names
    batch = world.data.examples.batch(world.data.datasets[1].among(world.data.test))
    adapter = {name: t for name, t in final_adapter(run).items() if "/" not in name}
    (expected,) = evaluate_each(world.plain, [adapter], world.data, world.data.among(world.data.test, [1]), 64)
    with torch.inference_mode():
        logits = opened.model(**opened.processor(["sea1 sea2 sky3"], return_tensors="pt"))
        predicted = opened.model(**batch).argmax(1)
    assert logits.shape == (1, 5) and torch.isfinite(logits).all()
    assert float((predicted == batch["labels"]).double().mean()) == pytest.approx(expected["accuracy"])


def test_predictions_and_merged_models_have_the_labels_of_one_data_set(
    run: Path, two: Settings, tmp_path: Path
) -> None:
    """Accuracy and loss on the test examples of the moods are those of the run's summary."""
    moods = pd.read_csv(str(two["dataset"]).split(", ")[1])
    dataset = World(two).data.datasets[1]
    rows = moods.iloc[dataset.among(World(two).data.test) - dataset.examples.start]
    rows.to_csv(tmp_path / "rows.csv", index=False)
    files = ("--data", tmp_path / "rows.csv", "--to", tmp_path / "out.csv")
    run_command("predict", run, "--dataset", "moods", *files)
    written = pd.read_csv(tmp_path / "out.csv")
    measured = json.loads((run / "summary.json").read_text())["test"]["datasets"]["moods"]
    assert (written["predicted"] == rows["label"].to_numpy()).mean() == pytest.approx(measured["accuracy"])
    probabilities = written[["probability calm", "probability sea"]].to_numpy()
    of_label = probabilities[np.arange(len(rows)), (rows["label"] == "sea").astype(int)]
    assert -np.log(of_label).mean() == pytest.approx(measured["loss"], rel=1e-4)

    run_command("export", run, "--to", tmp_path / "whole")
    card = ModelCard.load(tmp_path / "whole" / "README.md")
    assert "several data sets (topics, moods)" in card.text
    assert [result.dataset_name for result in card.data.eval_results] == ["topics", "moods"]
    assert card.data.eval_results[1].metric_value == round(measured["accuracy"], 4)
    assert f"| test set, moods | accuracy {measured['accuracy']:.4f}, " in card.text
    run_command("export", tmp_path / "whole", "--dataset", "moods", "--to", tmp_path / "alone")
    run_command("export", tmp_path / "whole", "--dataset", "moods", "--merge", "--to", tmp_path / "merged")
    run_command("predict", tmp_path / "alone", *files)
    assert np.allclose(pd.read_csv(tmp_path / "out.csv")["probability sea"], probabilities[:, 1], atol=1e-5)
    classify = pipeline("text-classification", str(tmp_path / "merged"), trust_remote_code=True)
    answers = classify(rows["text"].tolist(), truncation=True)
    assert [answer["label"] for answer in answers] == written["predicted"].tolist()
    assert np.allclose([answer["score"] for answer in answers], probabilities.max(1), atol=1e-5)


def test_a_model_of_several_data_sets_asks_for_one_of_them(run: Path, tmp_path: Path) -> None:
    """An adapter of an earlier version names no data sets and gives all labels."""
    pd.DataFrame({"text": ["sea1"]}).to_csv(tmp_path / "rows.csv", index=False)
    predict = ("predict", "--data", tmp_path / "rows.csv", "--to", tmp_path / "out.csv")
    for arguments in (predict, ("export", "--merge", "--to", tmp_path / "merged")):
        message = run_command(*arguments, run, code=2).message
        assert message.endswith("labels of several data sets; choose one with --dataset: topics, moods")
        message = run_command(*arguments, run, "--dataset", "mood", code=2).message
        assert "unknown data set 'mood'. Did you mean 'moods'?" in message
    old = shutil.copytree(run / "adapter", tmp_path / "old")
    description = json.loads((old / "task.json").read_text())
    assert description.pop("datasets") == {"topics": 3, "moods": 2}
    (old / "task.json").write_text(json.dumps(description))
    run_command(*predict, old)
    assert {f"probability {name}" for name in ("topics/sand", "moods/calm")} <= set(pd.read_csv(tmp_path / "out.csv"))
    assert "does not name several data sets" in run_command(*predict, old, "--dataset", "moods", code=2).message


def test_the_report_and_the_table_show_each_data_set(run: Path) -> None:
    """A data set's row has its own test accuracy and loss; the mean over both is the run's test accuracy."""
    summary, console = report.write(run), Console(width=100, record=True)
    test = json.loads((run / "summary.json").read_text())["test"]
    mean = summary.methods["copra"].get("test_accuracy").mean
    assert mean == pytest.approx(np.mean([d["accuracy"] for d in test["datasets"].values()]))
    (by_dataset,) = dataset_tables(summary)
    rows = by_dataset.rows
    assert [row[:2] for row in rows] == [["topics", "copra"], ["moods", "copra"]]
    for row in rows:
        metrics = test["datasets"][row[0]]
        assert row[2:] == [f"{100 * metrics['accuracy']:.1f}", f"{metrics['loss']:.3f}"]
    console.print(results(summary))
    shown = console.export_text()
    assert "topics" in shown and rows[1][3] in shown
    page = (run / "report.html").read_text()
    assert "Accuracy by round on moods" in page and "Each data set by itself" in page


def test_merging_clients_of_several_data_sets(run: Path) -> None:
    """A client is evaluated on its own data set, a merge on both; FedAvg of the round is one of the merges."""
    result = CliRunner().invoke(app, ["probe", "merge", str(run), "--split", "test"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    facts, opened = json.loads((run / "probe-merge.json").read_text()), open_run(run)
    assert [row["name"] for row in facts["before"]][2:4] == ["client 2 (topics/2)", "client 3 (moods/0)"]
    assert [list(row["datasets"]) for row in facts["before"]] == [["topics"]] * 3 + [["moods"]] * 2
    trained = opened.clients(2)
    (alone,) = opened.score([trained[3]], "test", datasets=[1])
    assert facts["before"][3]["accuracy"] == pytest.approx(alone["datasets"]["moods"]["accuracy"])
    (federated,) = opened.score([opened.adapter], "test")
    average = facts["merged"][0]
    for name, metrics in federated["datasets"].items():
        assert average["datasets"][name]["loss"] == pytest.approx(metrics["loss"], rel=1e-4)
    means = []
    for clients in ([0, 1, 2], [3, 4]):
        means.append(np.mean([facts["before"][client]["accuracy"] for client in clients]))
    assert facts["mean_accuracy_before"] == pytest.approx(np.mean(means))
    assert average["gap"] == pytest.approx(average["accuracy"] - np.mean(means))
    assert "moods, %" in (run / "probe-merge.html").read_text()


def test_lines_between_clients_of_several_data_sets(run: Path) -> None:
    """Clients of different data sets are compared on both, with each other's rows of the head; others on their own."""
    arguments = ["probe", "connectivity", str(run), "--clients", "1,2,3", "--points", "3"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    facts, opened = json.loads((run / "probe-connectivity.json").read_text()), open_run(run)
    trained = opened.clients(2, only=[1, 2, 3])
    within, across = (facts["paths"]["product"][place] for place in (0, 2))
    assert across["pair"] == ["client 2 (topics/2)", "client 3 (moods/0)"]
    ends = opened.score([trained[1], trained[2]], datasets=[0])
    assert within["accuracy"][::2] == pytest.approx([metrics["accuracy"] for metrics in ends])
    (end,) = opened.score([trained[2]], datasets=[0])
    borrowed = {n: torch.cat([trained[2][n][TOPICS], trained[3][n][MOODS]]) for n in ("head.weight", "head.bias")}
    (other,) = opened.score([trained[2] | borrowed], datasets=[1])
    assert across["loss"][0] == pytest.approx((end["loss"] + other["loss"]) / 2, rel=1e-4)


REFUSED = [
    ({"partitioner": "own"}, "partitioner = 'own'"),
    ({"labels": "a,b"}, "labels = 'a,b'"),
    ({"test-file": "test.csv"}, "test-file = 'test.csv'"),
    ({"partitioner": "natural", "client-column": "owner", "held-out-clients": 1}, "held-out-clients = 1"),
    ({"num-clients": 1}, "num-clients = 1: each data set needs at least one client"),
    ({"num-clients": 0}, "num-clients = 0: each data set needs at least one client"),
    ({"task": "causal-lm", "partitioner": "iid"}, "does not have exactly one label per example"),
    ({"rule": "fedsa-lora", "local-training": "lora"}, "no global model"),
    ({"rule": "connectivity"}, "all validation data"),
    ({"control-variates": True}, "control-variates"),
    ({"dp-clip": 1.0, "weighting": "equal"}, "dp-clip = 1"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_does_not_combine_is_refused_by_name(two: Settings, changes: Settings, message: str) -> None:
    config = Config.from_flat(two | changes)
    with pytest.raises(ConfigError, match=f"several data sets.*{message}"):
        check(config)


def test_data_sets_must_have_different_names(two: Settings) -> None:
    with pytest.raises(ConfigError, match="must have different names, not notes, notes"):
        World(two | {"dataset": "a/notes.csv,b/notes.csv"})
    with pytest.raises(ConfigError, match="has an empty name"):
        Config.from_flat(two | {"dataset": "a.csv,,b.csv"})


def test_an_error_in_one_data_set_names_it(two: Settings) -> None:
    with pytest.raises(ConfigError, match=r"dataset '.*moods.csv': test-examples = 200 .* of 320 examples"):
        World(two | {"test-examples": 200, "server-validation-examples": 1, "dataset": ", ".join(
            reversed(str(two["dataset"]).split(", ")))})  # fmt: skip
