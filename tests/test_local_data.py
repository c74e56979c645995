"""Nodes with their own data: training, rejected runs and files, and that no content of the data leaves a node."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord
from flwr.clientapp import ClientApp
from safetensors.torch import load_file

from clients import warm_cache
from clients.app import app as client_app
from copra_fl import wire
from copra_fl.config import Config, ConfigError, csv_line
from copra_fl.data.federated import FederatedData, load_data
from copra_fl.data.local import load_local_data
from copra_fl.models.build import load_processor
from copra_fl.models.export import load
from server.errors import FederationError
from tests.support.compatibility import check
from tests.support.federations import assert_equal, journal
from tests.support.local_grid import LocalGrid, run_federation
from tests.support.node_files import NAMES, RecordingGrid, find_leaks, rows_of, write
from tests.support.tiny import Settings


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    folder = tmp_path / "nodes"
    folder.mkdir()
    return [write(rows_of(site), folder / name) for site, name in enumerate(NAMES)]


def grid_of(files: list[Path], app: ClientApp = client_app) -> LocalGrid:
    """Return a grid with one node for each file."""
    return LocalGrid(len(files), app, [{"data-path": str(path)} for path in files])


def test_each_node_is_one_client_with_the_examples_of_its_file(
    own: Settings, files: list[Path], tmp_path: Path
) -> None:
    """Each has 40 examples, a tenth of them for validation; the server's own 600 examples are for evaluation only."""
    directory = run_federation(own, tmp_path / "run", grid=grid_of(files))
    row = journal(directory)[0]
    assert [(client["client"], client["examples"]) for client in row["clients"]] == [(0, 36), (1, 36), (2, 36)]
    summary = json.loads((directory / "summary.json").read_text())
    assert [client["examples"] for client in summary["clients"]] == [4, 4, 4]
    assert (summary["test"]["examples"], summary["validation"]["examples"]) == (60, 60)
    assert load(directory / "adapter", device="cpu").labels == ["sand", "sea", "sky"]


@pytest.mark.parametrize("site", range(3))
def test_a_file_of_any_format_is_read_completely(own: Settings, files: list[Path], site: int) -> None:
    config = Config.from_flat(own | {"labels": "sky,sea,sand"})
    tokenizer = load_processor(config.model)
    data = load_local_data(config, tokenizer, str(files[site]), client=1, num_clients=3)
    assert [len(part) for part in data.train + data.validation] == [0, 36, 0, 0, 4, 0]
    batch = data.examples.batch(np.concatenate([data.train[1], data.validation[1]]))
    read = sorted(zip(tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True),
                      [["sky", "sea", "sand"][label] for label in batch["labels"]], strict=True))  # fmt: skip
    rows = rows_of(site)
    known_words = [text.split(" ", 1)[1] for text in rows["note"]]  # the tokenizer does not know the unique words
    assert read == sorted(zip(known_words, rows["topic"], strict=True))


def test_a_node_validates_on_no_example_that_it_trains_on(own: Settings, tmp_path: Path) -> None:
    rows = rows_of(0)
    rows["note"] = rows["note"].to_numpy()[[0, 0, *range(2, len(rows))]]
    config = Config.from_flat(own | {"labels": "sky,sea,sand", "validation-fraction": 0.5})
    path = write(rows, tmp_path / "notes.csv")
    dropped = []
    for client in range(8):  # each shuffles the file in its own way
        data = load_local_data(config, load_processor(config.model), str(path), client, num_clients=8)
        assert not ({0, 1} & {*data.train[client]} and {0, 1} & {*data.validation[client]})
        dropped.append(data.dropped.trained)
    assert {*dropped} == {0, 1}, "the equal rows 0 and 1 are on different sides for some"


def test_limits_hold_for_a_nodes_own_file(own: Settings, files: list[Path]) -> None:
    """The first file has two labels: three examples of each, and of these six the first five."""
    config = Config.from_flat(own | {"labels": "sky,sea,sand", "shots": 3, "client-examples": 5})
    data = load_local_data(config, load_processor(config.model), str(files[0]), client=1, num_clients=3)
    assert np.bincount(data.examples.labels[data.train[1]]).max() == 3
    assert (len(data.train[1]), len(data.validation[1]), data.dropped.limited) == (5, 4, 31)


def test_labels_are_one_line_of_csv() -> None:
    names = ["a, b", 'said "c"', "d"]
    assert Config.from_flat({"labels": csv_line(names)}).data.label_list == names
    assert Config.from_flat({"labels": "sea, sky"}).data.label_list == ["sea", "sky"]
    assert Config().data.label_list == []


def test_white_space_around_labels_does_not_count(own: Settings, tmp_path: Path) -> None:
    rows = rows_of(0)
    spaced = rows.assign(
        topic=[("", " ", "\n")[row % 3] + topic + " " * (row % 2) for row, topic in rows["topic"].items()]
    )
    config = Config.from_flat(own | {"labels": 'sky," sea ",sand '})
    tokenizer = load_processor(config.model)
    plain, padded = (
        load_local_data(config, tokenizer, str(write(table, tmp_path / name)), client=0, num_clients=1)
        for table, name in ((rows, "plain.csv"), (spaced, "spaced.csv"))
    )
    assert padded.label_names == ["sky", "sea", "sand"]
    assert torch.equal(padded.examples.labels, plain.examples.labels)

    server = pd.read_csv(str(own["dataset"]))
    write(server.assign(topic=server["topic"] + pd.Series(["", " "] * (len(server) // 2))), tmp_path / "server.csv")
    config = Config.from_flat(own | {"dataset": str(tmp_path / "server.csv")})
    assert load_data(config, tokenizer).label_names == ["sand", "sea", "sky"]


def test_the_configured_labels_keep_their_order(own: Settings, files: list[Path], tmp_path: Path) -> None:
    directory = run_federation(own | {"labels": "sky,sea,lake,sand"}, tmp_path / "run", grid=grid_of(files))
    assert load(directory / "adapter", device="cpu").labels == ["sky", "sea", "lake", "sand"]


def test_a_server_without_data_lets_clients_evaluate(own: Settings, files: list[Path], tmp_path: Path) -> None:
    """Validation is the mean over all clients' examples; expected values by hand from the clients' final evaluations.

    The adapters equal those of a server with data, because the server's data affects only the evaluation.
    """
    flat = own | {"dataset": "", "labels": "sand,sea,sky", "validation-fraction": 0.3}
    files[1] = write(rows_of(1, 60), files[1])
    directory = run_federation(flat, tmp_path / "run", grid=grid_of(files))
    summary = json.loads((directory / "summary.json").read_text())
    clients = summary["clients"]
    assert [client["examples"] for client in clients] == [12, 18, 12]
    num_correct = sum(client["examples"] * client["accuracy"] for client in clients)
    assert summary["validation"]["accuracy"] == pytest.approx(num_correct / 42)
    assert summary["validation"]["examples"] == 42
    assert (summary["test"], summary["merge_gap"], summary["paths"]) == (None, None, [])
    assert all(row["validation"]["loss"] > 0 for row in journal(directory))
    with_data = run_federation(flat | {"dataset": own["dataset"]}, tmp_path / "data", grid=grid_of(files))
    assert_equal(*(load_file(run / "adapter" / "head.safetensors") for run in (directory, with_data)))
    ended = run_federation(flat | {"target-accuracy": 1e-9}, tmp_path / "ended", grid=grid_of(files))
    (row,) = journal(ended)
    assert row["ended_early"] == "reached target-accuracy = 1e-09", "any accuracy of the clients reaches it"


def test_without_server_data_a_state_whose_losses_are_not_finite_is_refused_and_the_run_goes_on(
    own: Settings, files: list[Path], tmp_path: Path
) -> None:
    class SpoiledGrid(LocalGrid):
        """In round 2 all values of all updates are huge."""

        def answer(self, message: Message) -> Message:
            reply = super().answer(message)
            is_train = message.metadata.message_type == "train"
            if is_train and message.content["plan"]["server-round"] == 2:
                values = wire.unpack_arrays(reply.content, "adapters")["values"]
                reply.content["adapters"] = ArrayRecord(torch_state_dict={"values": torch.full_like(values, 1e20)})
            return reply

    flat = own | {"dataset": "", "labels": "sand,sea,sky", "num-rounds": 3, "max-update-norm": 0.0}
    grids = [SpoiledGrid(3, client_app, [{"data-path": str(path)} for path in files]) for _ in range(2)]
    directory = run_federation(flat | {"failures": "tolerant"}, tmp_path / "run", grid=grids[0])
    first, second, third = journal(directory)
    assert second["notes"]["refused"].startswith("round 2 is refused: the new global adapter has a validation loss of ")
    assert second["validation"] == first["validation"] and not second["clients"]
    assert len(third["clients"]) == 3
    with pytest.raises(FederationError, match="round 2 is refused: the new global adapter has a validation loss of"):
        run_federation(flat, tmp_path / "strict", grid=grids[1])


def test_what_needs_server_data_is_rejected_without_it(own: Settings) -> None:
    with pytest.raises(ConfigError, match="dataset = '' .*task = 'text-classification' need the list of labels"):
        check(Config.from_flat(own | {"dataset": ""}))
    with pytest.raises(ConfigError, match="dataset = '' .* needs partitioner = 'own'"):
        Config.from_flat({"dataset": "", "labels": "a,b"})
    for rule in ("connectivity", "fed-sb"):
        config = Config.from_flat(own | {"dataset": "", "labels": "a,b", "rule": rule, "local-training": "lora"})
        with pytest.raises(ConfigError, match=f"rule = '{rule}' does not combine with dataset = ''"):
            check(config)


def test_no_content_of_the_files_is_in_any_message_or_in_the_run_folder(
    own: Settings, files: list[Path], tmp_path: Path
) -> None:
    grid = RecordingGrid(files)
    directory = run_federation(own, tmp_path / "run", grid=grid)
    assert [m.metadata.message_type for m in grid.messages] == ["query"] * 6 + ["train"] * 12 + ["evaluate"] * 6
    assert find_leaks(grid, Config.from_flat(own), files) == []
    run_folder = b"".join(path.read_bytes() for path in directory.rglob("*") if path.is_file())
    assert not any(secret in run_folder for secret in [b"patient", *(path.stem.encode() for path in files)])


def leak_text(data: FederatedData, path: str) -> Any:
    return ConfigRecord({"text": rows_of(0)["note"][3]})


def leak_name(data: FederatedData, path: str) -> Any:
    return ConfigRecord({"path": path})


def leak_tokens(data: FederatedData, path: str) -> Any:
    return MetricRecord({"tokens": data.examples.input_ids[:200].tolist()})


def leak_bytes(data: FederatedData, path: str) -> Any:
    return ConfigRecord({"tokens": data.examples.input_ids[:200].numpy().tobytes()})


@pytest.mark.parametrize("leak", [leak_text, leak_name, leak_tokens, leak_bytes])
def test_a_leak_is_found(
    own: Settings, files: list[Path], leak: Callable[[FederatedData, str], Any], tmp_path: Path
) -> None:
    """This shows that the test above can fail."""
    leaky = ClientApp()

    @leaky.query()
    def handshake(message: Message, context: Context) -> Message:
        reply, path = client_app(message, context), str(context.node_config["data-path"])
        config = wire.unpack_config(message.content)
        data = load_local_data(config, load_processor(config.model), path, client=0, num_clients=3)
        reply.content["more"] = leak(data, path)
        return reply

    leaky.train()(lambda message, context: client_app(message, context))
    leaky.evaluate()(lambda message, context: client_app(message, context))
    grid = RecordingGrid(files, leaky)
    run_federation(own | {"num-rounds": 1}, tmp_path / "run", grid=grid)
    assert find_leaks(grid, Config.from_flat(own), files)


BAD_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "gone": (Path.unlink, "data-path: there is no such file"),
    "empty": (lambda p: p.write_text(""), "its file has no examples"),
    "header-only": (lambda p: p.write_text("note,topic\n"), "its file has no examples"),
    "no-csv": (lambda p: p.write_bytes(b"note,topic\n\xff\xfepatient1x1,sea\n"), "cannot be read as CSV in UTF-8"),
    "columns": (
        lambda p: write(rows_of(1).rename(columns={"note": "patient9x9"}), p),
        "text-column = 'note' is not a column of its file",
    ),
    "blank": (
        lambda p: write(rows_of(1).assign(note=" "), p),
        "its file has no example with all of 'note', 'topic'",
    ),
    "labels": (
        lambda p: write(pd.concat([rows_of(1), rows_of(1, 2).assign(topic="patient7x7")]), p),
        "2 of 42 examples have a label that is none of sand, sea, sky",
    ),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_an_unusable_file_is_rejected_at_the_handshake_and_not_quoted(
    own: Settings, files: list[Path], kind: str, tmp_path: Path
) -> None:
    damage, reason = BAD_FILES[kind]
    files[1] = write(rows_of(1), files[1].with_suffix(".csv"))
    damage(files[1])
    grid = RecordingGrid(files)
    with pytest.raises(FederationError, match=rf"^node 101 \(partition-id 1\) rejected the run: .*{reason}$"):
        run_federation(own, tmp_path / "run", grid=grid)
    assert {message.metadata.message_type for message in grid.messages} == {"query"}
    assert b"patient" not in grid.seen and b"ward" not in grid.seen


def test_a_file_of_unknown_format_is_not_quoted(own: Settings, files: list[Path], tmp_path: Path) -> None:
    files[0] = files[0].rename(files[0].with_suffix(".patient1x1"))
    with pytest.raises(
        FederationError,
        match=r"the format of its file is not supported; supported formats are .csv, .json, .jsonl, .parquet, .tsv$",
    ):
        run_federation(own, tmp_path / "run", grid=grid_of(files))


def test_a_node_rejects_a_run_that_does_not_fit_its_data(own: Settings, files: list[Path], tmp_path: Path) -> None:
    with pytest.raises(FederationError, match=r"node 100 \(partition-id 0\) rejected the run: .*has no data-path"):
        run_federation(own, tmp_path / "none", num_nodes=2)
    with pytest.raises(FederationError, match=r"rejected the run: it has its own data .*partitioner = 'iid'"):
        run_federation(own | {"partitioner": "iid"}, tmp_path / "other", grid=grid_of(files))
    with pytest.raises(FederationError, match=r"counts 3 clients, but num-clients = 4"):
        run_federation(own | {"num-clients": 4}, tmp_path / "four", grid=grid_of(files))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"partition-id": 3}, "its node config has .*partition-id=0"),
        ({"num-partitions": "x"}, "its node config has .*partition-id=0"),
        ({"policy_path": "/policy.toml"}, "has an unknown key 'policy_path'. Did you mean 'policy-path'"),
    ],
)
def test_a_wrong_node_config_is_rejected_with_an_example(
    own: Settings, files: list[Path], changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    grid = grid_of(files)
    grid.contexts[102].node_config.update(changes)
    with pytest.raises(FederationError, match=f"node 102 failed at the handshake: .*{reason}"):
        run_federation(own, tmp_path / "run", grid=grid)


def test_an_error_in_training_is_reported_by_type_and_place_only(
    own: Settings, files: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The message of an error can quote a text; its type and place are enough to find it in the node's log."""

    def client_steps(*arguments: object) -> None:
        raise ValueError("cannot read patient1x7 sea3")

    monkeypatch.setattr("copra_fl.training.cohort.plan_steps", client_steps)
    grid = RecordingGrid(files)
    with pytest.raises(
        FederationError, match=r"client 0 failed in round 1.*: ValueError at test_local_data.py:\d+ < coh"
    ):
        run_federation(own, tmp_path / "run", grid=grid)
    assert b"patient" not in grid.seen


def test_a_file_that_changes_during_a_run_is_noticed(own: Settings, files: list[Path], tmp_path: Path) -> None:
    """Each message has a new process, as in a deployment; the file grows after the handshake."""

    class GrowingGrid(LocalGrid):
        def answer(self, message: Message) -> Message:
            warm_cache.open_own_data.cache_clear()
            reply = super().answer(message)
            if message.metadata.message_type == "query" and message.metadata.dst_node_id == 100:
                write(rows_of(0, 60), files[0])
            return reply

    grid = GrowingGrid(3, node_configs=[{"data-path": str(path)} for path in files])
    with pytest.raises(FederationError, match="client 0 claims 54 examples; at the start it had 36"):
        run_federation(own, tmp_path / "run", grid=grid)
