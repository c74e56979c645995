"""Whole federations through the real apps, in this process."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel

from clients.app import app as client_app
from copra_fl import wire
from copra_fl.adapters.server_state import ServerState
from copra_fl.adapters.state import Adapter, difference, norm
from copra_fl.config import Config, ConfigError
from copra_fl.data.federated import load_data
from copra_fl.models.build import build_model, load_processor
from copra_fl.models.export import load
from copra_fl.records import Provenance, RecordError, RunSummary
from copra_fl.simulation.run_folder import check_lengthened, write_config
from copra_fl.training import batches, cohort, engine
from server.errors import FederationError
from server.evaluator import Evaluator
from tests.support.federations import (
    Stop,
    StoppingGrid,
    assert_equal,
    final_adapter,
    final_state,
    finished_run,
    journal,
)
from tests.support.local_grid import LocalGrid, run_federation
from tests.support.tiny import Settings


def test_two_runs_of_one_configuration_are_bitwise_equal(tiny: Settings, tmp_path: Path) -> None:
    first = run_federation(tiny, tmp_path / "first")
    second = run_federation(tiny, tmp_path / "second")
    assert_equal(final_adapter(first), final_adapter(second))
    other = run_federation(tiny | {"seed": 1}, tmp_path / "other")
    assert not torch.equal(final_adapter(first)["head.weight"], final_adapter(other)["head.weight"])


@pytest.mark.parametrize("changes", [{}, {"mask-scope": "shared", "lora-dropout": 0.2}, {"fraction-clients": 0.5}])
def test_grouping_clients_on_nodes_changes_nothing(tiny: Settings, changes: Settings, tmp_path: Path) -> None:
    """Bitwise if clients are trained and averaged one by one, otherwise up to rounding."""
    tiny = tiny | {"updates": "pooled"}
    alone = tiny | changes | {"updates": "individual", "engine": "peft"}
    one = run_federation(alone, tmp_path / "one", num_nodes=1)
    three = run_federation(alone, tmp_path / "three", num_nodes=3)
    assert_equal(final_adapter(one), final_adapter(three))
    for nodes in (1, 3):
        together = final_adapter(run_federation(tiny | changes, tmp_path / f"together-{nodes}", num_nodes=nodes))
        assert norm(difference(together, final_adapter(one))) < 1e-5 * norm(final_adapter(one))


@pytest.mark.parametrize(("weighting", "rule"), [("examples", "fedavg"), ("activity", "ffa-lora-gram")])
def test_pooled_updates_change_nothing_but_the_bytes(tiny: Settings, weighting: str, rule: str, tmp_path: Path) -> None:
    """One round, because training amplifies differences in the last bit. 1 of the 6 clients is inspected."""
    flat = tiny | {"num-rounds": 1, "weighting": weighting, "p0": 0.3, "merge-gap-clients": 1, "path-pairs": 0}
    flat |= {"engine": "peft", "updates": "pooled", "rule": rule}
    clients = run_federation(flat | {"updates": "individual"}, tmp_path / "clients", num_nodes=1)
    expected = final_adapter(clients)
    for nodes in (1, 3):
        pooled = run_federation(flat, tmp_path / f"pooled-{nodes}", num_nodes=nodes)
        for name, tensor in final_adapter(pooled).items():
            assert torch.allclose(tensor, expected[name], rtol=1e-6, atol=1e-7), name
        rows = [journal(directory)[0] for directory in (clients, pooled)]
        scalars = [[{k: v for k, v in c.items() if k != "seconds"} for c in row["clients"]] for row in rows]
        assert scalars[0] == scalars[1]
        for metric in ("loss", "accuracy"):
            assert rows[1]["merge_gap"][metric] == pytest.approx(rows[0]["merge_gap"][metric], abs=1e-5)
        assert rows[1]["bytes_up"] / rows[0]["bytes_up"] == pytest.approx((1 + nodes) / 6, rel=0.2)


def test_num_clients_0_makes_each_node_a_client(tiny: Settings, tmp_path: Path) -> None:
    directory = run_federation(tiny | {"num-clients": 0}, tmp_path / "run", num_nodes=3)
    assert [row["client"] for row in journal(directory)[0]["clients"]] == [0, 1, 2]


def test_natural_clients_are_the_values_of_a_column(tiny: Settings, tmp_path: Path) -> None:
    """num-clients = 0 then means all values, for any number of nodes."""
    natural = {"partitioner": "natural", "client-column": "owner", "num-clients": 0}
    directory = run_federation(tiny | natural, tmp_path / "run", num_nodes=2)
    assert [row["client"] for row in journal(directory)[0]["clients"]] == list(range(6))


def test_lora_is_copra_with_p_1_throughout(tiny: Settings, tmp_path: Path) -> None:
    lora = run_federation(tiny | {"local-training": "lora"}, tmp_path / "lora")
    copra = run_federation(tiny | {"local-training": "copra", "p0": 1.0}, tmp_path / "copra")
    assert_equal(final_adapter(lora), final_adapter(copra))


def test_head_training_leaves_the_adapter_alone(tiny: Settings, tmp_path: Path) -> None:
    directory = run_federation(tiny | {"local-training": "head"}, tmp_path / "run")
    start = build_model(Config.from_flat(tiny).model, "layer", 3, seed=0).read_adapter()
    trained = final_adapter(directory)
    assert all(torch.equal(trained[name], start[name]) for name in trained if not name.startswith("head."))
    assert not torch.equal(trained["head.weight"], start["head.weight"])


@pytest.mark.parametrize("messages", [0, 2, 3, 5])
def test_a_stopped_run_resumes_bitwise_equal(tiny: Settings, messages: int, tmp_path: Path) -> None:
    """2 nodes, so 2 training messages per round: the run stops before, between and within rounds."""
    flat = tiny | {"num-rounds": 3, "lr-schedule": "cosine"}
    whole = run_federation(flat, tmp_path / "whole")
    with pytest.raises(Stop):
        run_federation(flat, tmp_path / "stopped", grid=StoppingGrid(2, messages))
    resumed = run_federation(flat, tmp_path / "stopped")
    assert_equal(final_adapter(whole), final_adapter(resumed))
    timeless = [
        [{k: v for k, v in row.items() if k not in ("seconds", "clients")} for row in journal(directory)]
        for directory in (whole, resumed)
    ]
    assert timeless[0] == timeless[1]
    assert [row["round"] for row in journal(resumed)] == [1, 2, 3]
    provenance = Provenance.from_json((resumed / "provenance.json").read_text())
    assert (provenance.seed, provenance.start.after_round) == (0, 0)
    assert [origin.after_round for origin in provenance.resumes] == [messages // 2]


def test_a_finished_run_is_lengthened_to_what_the_longer_run_would_be(tiny: Settings, tmp_path: Path) -> None:
    lora = tiny | {"local-training": "lora", "optimizer-state": "client", "merge-gap-clients": 0, "path-pairs": 0}
    short, long = (Config.from_flat(lora | {"num-rounds": number}) for number in (1, 2))
    directory = finished_run(lora | {"num-rounds": 1}, tmp_path / "run")
    with pytest.raises(ConfigError, match="cannot resume .* with a changed configuration: num-rounds: 1 -> 2"):
        write_config(directory, long)
    with pytest.raises(ConfigError, match="num-rounds: 1 -> 2"):  # and nothing else may change
        write_config(directory, long.changed(rank=1), lengthen=True)
    write_config(directory, long, lengthen=True)
    run_federation(lora | {"num-rounds": 2}, directory)
    assert len(journal(directory)) == 2
    assert_equal(final_adapter(directory), final_adapter(run_federation(lora | {"num-rounds": 2}, tmp_path / "whole")))
    with pytest.raises(ConfigError, match="num-rounds: 2 -> 1"):
        write_config(directory, short, lengthen=True)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"lr-schedule": "cosine", "local-training": "lora"}, "lr-schedule = 'cosine'"),
        ({"local-training": "copra"}, "local-training = 'copra' with schedule-progress = 'federation'"),
        ({"engine": "trainer", "script": "train.py"}, r"the learning rate of a Trainer \(engine = 'trainer'\)"),
    ],
)
def test_a_run_whose_schedule_follows_the_whole_run_is_not_lengthened(changes: Settings, reason: str) -> None:
    with pytest.raises(ConfigError, match=f"num-rounds = 5: the run cannot be made longer, because {reason} follows"):
        check_lengthened(Config.from_flat(changes | {"num-rounds": 5}))
    check_lengthened(Config.from_flat({"local-training": "copra", "schedule-progress": "local"}))


def test_a_resume_completes_a_journal_that_misses_its_last_line(tiny: Settings, tmp_path: Path) -> None:
    """The run was killed between checkpoint and journal line, with half a line written."""
    directory = run_federation(tiny, tmp_path / "run")
    whole = (directory / "journal.jsonl").read_text()
    (directory / "journal.jsonl").write_text(whole[: whole.index("\n") + 20])
    (directory / "summary.json").unlink()
    run_federation(tiny, directory)
    assert (directory / "journal.jsonl").read_text() == whole


def test_without_a_final_test_no_test_example_is_evaluated(
    tiny: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluated: list[np.ndarray] = []
    score = Evaluator.score

    def spy(self: Evaluator, adapters: list[Adapter], residual: Adapter, indices: np.ndarray) -> Any:
        evaluated.append(indices)
        return score(self, adapters, residual, indices)

    monkeypatch.setattr(Evaluator, "score", spy)
    directory = run_federation(tiny | {"final-test": False}, tmp_path / "run")
    summary = RunSummary.from_json((directory / "summary.json").read_text())
    assert summary.test is summary.held_out is summary.base_test is None
    assert summary.validation is not None and (directory / "adapter" / "README.md").exists()
    config = Config.from_flat(tiny)
    test = load_data(config, load_processor(config.model)).test
    assert len(test) and not np.isin(np.concatenate(evaluated), test).any()


def test_the_base_is_evaluated_before_any_training_whichever_engine_trains(tiny: Settings, tmp_path: Path) -> None:
    """The plain engine evaluates in the model that the start is read from."""
    flat = tiny | {"num-rounds": 1, "learning-rate": 0.05}
    summaries = [
        RunSummary.from_json((run_federation(flat | {"engine": name}, tmp_path / name) / "summary.json").read_text())
        for name in ("stacked", "peft")
    ]
    for summary in summaries:
        assert summary.base_test and summary.base_validation and summary.test
        assert summary.base_test.loss == pytest.approx(summaries[0].base_test.loss, rel=1e-5)
        assert summary.base_validation.loss == pytest.approx(summaries[0].base_validation.loss, rel=1e-5)
        assert abs(summary.base_test.loss - summary.test.loss) > 1e-3


def test_peft_opens_the_final_adapter_and_agrees_on_the_test(tiny: Settings, tmp_path: Path) -> None:
    """By hand: plain base, PEFT's adapter, mean pooling, linear head. The accuracy equals the one in summary.json."""
    directory = run_federation(
        tiny | {"local-steps": 40, "learning-rate": 1e-2, "head-learning-rate": 1e-2}, tmp_path / "run"
    )
    base = AutoModel.from_pretrained(str(tiny["model"]))
    encoder = PeftModel.from_pretrained(base, str(directory / "adapter")).eval()
    weights = load_file(directory / "adapter" / "head.safetensors")
    head = nn.Linear(32, 3)
    head.load_state_dict(weights)
    federated = load_data(Config.from_flat(tiny), load_processor(Config.from_flat(tiny).model))
    batch = federated.examples.batch(federated.test)
    with torch.no_grad():
        hidden = encoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        mask = batch["attention_mask"][..., None]
        predicted = head((hidden * mask).sum(1) / mask.sum(1)).argmax(1)
    accuracy = float((predicted == batch["labels"]).float().mean())
    summary = RunSummary.from_json((directory / "summary.json").read_text())
    assert summary.test is not None and accuracy == pytest.approx(summary.test.accuracy, abs=1e-6)
    assert accuracy > 0.5, "chance is 1/3"
    saved = load(directory / "adapter", device="cpu")
    assert saved.labels == ["sand", "sea", "sky"]
    with torch.no_grad():
        again = saved.model(**batch).argmax(1)
    assert torch.equal(again, predicted)


def test_round_scope_sends_only_active_layers(tiny: Settings, tmp_path: Path) -> None:
    flat = tiny | {"updates": "individual"}
    step = run_federation(flat | {"local-training": "lora"}, tmp_path / "lora")
    rounds = run_federation(flat | {"mask-scope": "round"}, tmp_path / "round")
    rows = journal(rounds)
    assert sum(row["bytes_up"] for row in rows) < sum(row["bytes_up"] for row in journal(step))
    for row in rows:
        for client in row["clients"]:
            assert set(client["active_steps"]) <= {0, 3}, "a layer is on for all 3 steps of a round or for none"


def test_a_run_of_another_version_is_not_resumed(tiny: Settings, tmp_path: Path) -> None:
    """One sentence names the folder; nothing in it changes."""
    directory = run_federation(tiny | {"num-rounds": 1}, tmp_path / "run")
    checkpoint = directory / "checkpoints" / "round-00001.safetensors"
    state, _ = ServerState.load(checkpoint)
    state.save(checkpoint, {"row": json.dumps({"round": 1})})
    before = (directory / "journal.jsonl").read_bytes()
    (directory / "summary.json").unlink()
    with pytest.raises(
        RecordError, match="run was written by another version of copra-fl and cannot be resumed; start"
    ):
        run_federation(tiny | {"num-rounds": 2}, directory)
    assert (directory / "journal.jsonl").read_bytes() == before


@pytest.fixture
def client_3_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def plan_steps(plan, federated, client, num_groups):
        if client == 3:
            raise OSError("disk gone")
        return batches.plan_steps(plan, federated, client, num_groups)

    monkeypatch.setattr(cohort, "plan_steps", plan_steps)


def test_clients_without_validation_data_are_left_out_at_the_end(tiny: Settings, tmp_path: Path) -> None:
    directory = run_federation(tiny | {"validation-fraction": 0.0}, tmp_path / "run")
    assert json.loads((directory / "summary.json").read_text())["clients"] == []


def test_a_strict_run_stops_with_the_clients_traceback(tiny: Settings, client_3_fails: None, tmp_path: Path) -> None:
    with pytest.raises(FederationError, match="client 3 failed in round 1(.|\n)*Traceback(.|\n)*disk gone"):
        run_federation(tiny, tmp_path / "run", num_nodes=1)


def test_a_tolerant_run_continues_and_names_the_missing_client(
    tiny: Settings, client_3_fails: None, tmp_path: Path
) -> None:
    flat = tiny | {"failures": "tolerant", "min-replies": 5}
    directory = run_federation(flat, tmp_path / "run", num_nodes=1)
    row = journal(directory)[0]
    assert [(missing["client"], missing["reason"].rpartition(" | ")[2]) for missing in row["missing"]] == [
        (3, "OSError: disk gone")
    ]
    assert [client["client"] for client in row["clients"]] == [0, 1, 2, 4, 5]
    with pytest.raises(FederationError, match="5 valid replies, min-replies = 6.*3: OSError: disk gone"):
        run_federation(flat | {"min-replies": 6}, tmp_path / "more", num_nodes=1)


def test_an_error_of_several_clients_together_is_in_the_log_of_the_node(
    tiny: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Each of them alone can be trained, so the run goes on and its records have no error."""

    def train_cohort(model, data, plan, clients, *arguments):
        if len(clients) > 1:
            raise MemoryError("no room for a cohort")
        return cohort.train_cohort(model, data, plan, clients, *arguments)

    monkeypatch.setattr(engine, "train_cohort", train_cohort)
    with caplog.at_level("WARNING", logger="flwr"):
        directory = run_federation(tiny | {"num-rounds": 1}, tmp_path / "run", num_nodes=1)
    assert journal(directory)[0]["missing"] == []
    assert "clients 0, 1, 2, 3, 4, 5 failed together and are tried one by one" in caplog.text
    assert "MemoryError: no room for a cohort" in caplog.text


def test_min_replies_counts_updates_and_not_the_evaluations_of_few_clients(tiny: Settings, tmp_path: Path) -> None:
    flat = tiny | {"failures": "tolerant", "min-replies": 4, "client-eval-clients": 2}
    directory = run_federation(flat, tmp_path / "run")
    assert len(json.loads((directory / "summary.json").read_text())["clients"]) == 2


def test_a_failed_client_keeps_its_own_reason_when_its_node_has_no_other(
    tiny: Settings, client_3_fails: None, tmp_path: Path
) -> None:
    """6 nodes with one client each; with control variates the node of client 3 has nothing to send at all."""
    flat = tiny | {"failures": "tolerant", "control-variates": True, "num-rounds": 1}
    (missing,) = journal(run_federation(flat, tmp_path / "run", num_nodes=6))[0]["missing"]
    assert missing["client"] == 3 and missing["reason"].rpartition(" | ")[2] == "OSError: disk gone"


def test_a_client_that_diverges_does_not_spoil_the_pooled_update(
    tiny: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def train_cohort(*arguments):
        updates = cohort.train_cohort(*arguments)
        bad = {"head.bias": torch.full((3,), torch.nan)}
        return [replace(u, adapter=u.adapter | bad) if u.client == 3 else u for u in updates]

    monkeypatch.setattr(engine, "train_cohort", train_cohort)
    flat = tiny | {"failures": "tolerant", "merge-gap-clients": 0, "path-pairs": 0, "updates": "pooled"}
    row = journal(run_federation(flat, tmp_path / "run", num_nodes=1))[0]
    assert [client["client"] for client in row["clients"]] == [0, 1, 2, 4, 5]
    (missing,) = row["missing"]
    assert "client 3: head.bias has values that are not finite" in missing["reason"]


@pytest.mark.parametrize(("uplink", "share", "error"), [("float16", 1 / 2, 1e-3), ("int8", 1 / 4, 1e-2)])
def test_rounded_uplinks_end_close_to_float32(
    tiny: Settings, uplink: str, share: float, error: float, tmp_path: Path
) -> None:
    """4 rounds of SGD, because Adam's first step would turn a rounding difference into one of sign."""
    flat = tiny | {"num-rounds": 4, "rank": 16, "target-modules": "all-linear", "updates": "individual"}
    flat |= {"optimizer": "sgd", "learning-rate": 0.3, "head-learning-rate": 0.3}
    plain = run_federation(flat, tmp_path / "plain")
    rounded = run_federation(flat | {"uplink-dtype": uplink}, tmp_path / "rounded")
    start = build_model(Config.from_flat(tiny | {"rank": 16, "target-modules": "all-linear"}).model, "layer", 3, seed=0)
    moved = norm(difference(final_adapter(plain), start.read_adapter()))
    assert 0 < norm(difference(final_adapter(plain), final_adapter(rounded))) < error * moved
    up = [sum(row["bytes_up"] for row in journal(directory)) for directory in (rounded, plain)]
    assert up[0] / up[1] == pytest.approx(share, rel=0.1)


def test_quantization_errors_stay_with_their_client_and_run(tiny: Settings, tmp_path: Path) -> None:
    """Both runs use the same nodes, with one state and one disk; the second run equals one that runs alone."""
    flat = tiny | {"uplink-dtype": "int8"}
    grid = LocalGrid(2)
    run_federation(flat, tmp_path / "first", grid=grid)
    second = run_federation(flat | {"seed": 1}, tmp_path / "second", grid=grid)
    alone = run_federation(flat | {"seed": 1}, tmp_path / "alone")
    assert_equal(final_adapter(second), final_adapter(alone))


@pytest.mark.parametrize(("rule", "kept"), [("fedavg", True), ("flexlora", False)])
def test_quantization_errors_are_kept_where_factors_keep_their_meaning(
    tiny: Settings, rule: str, kept: bool, tmp_path: Path
) -> None:
    directory = run_federation(tiny | {"uplink-dtype": "int8", "rule": rule}, tmp_path / "run")
    assert bool(final_state(directory).last_rounds) == kept


def test_a_client_that_no_node_can_host_is_an_error_in_strict(tiny: Settings, tmp_path: Path) -> None:
    """3 partitions, of which the last is not connected."""
    for changes in ({"num-clients": 0}, {"uplink-dtype": "int8"}):
        grid = LocalGrid(3)
        del grid.contexts[102]
        homeless = [2] if "num-clients" in changes else [2, 5]
        with pytest.raises(
            FederationError, match=rf"no connected node can host the clients {re.escape(str(homeless))}"
        ):
            run_federation(tiny | changes, tmp_path / "run", grid=grid)
    grid = LocalGrid(3)
    del grid.contexts[102]
    assert len(journal(run_federation(tiny, tmp_path / "any", grid=grid))[0]["clients"]) == 6


def test_two_nodes_with_the_same_partition_id_are_rejected(tiny: Settings, tmp_path: Path) -> None:
    grid = LocalGrid(2)
    grid.contexts[101].node_config["partition-id"] = 0
    with pytest.raises(FederationError, match=r"node 101 \(partition-id 0\) has the same partition-id as node 100"):
        run_federation(tiny, tmp_path / "run", grid=grid)


def test_a_node_with_other_sources_is_rejected(tiny: Settings, tmp_path: Path) -> None:
    app = ClientApp()

    @app.query()
    def handshake(message: Message, context: Context) -> Message:
        honest = wire.unpack_handshake(client_app(message, context).content)
        return Message(wire.pack_handshake(replace(honest, digest="0" * 64)), reply_to=message)

    with pytest.raises(FederationError, match=r"node 100 \(partition-id 0\) runs other sources"):
        run_federation(tiny, tmp_path / "run", grid=LocalGrid(1, app))


def test_a_failing_node_is_named(tiny: Settings, tmp_path: Path) -> None:
    app = ClientApp()
    with pytest.raises(FederationError, match="node 100 failed at the handshake"):
        run_federation(tiny, tmp_path / "run", grid=LocalGrid(1, app))
