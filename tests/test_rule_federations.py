"""Every rule through the real apps: twice the same, resumed the same, exported, and what travels."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModel

from copra_fl.adapters.state import Adapter, difference, norm, part_of, parts
from copra_fl.aggregation import RULES, find_rule
from copra_fl.config import Config
from copra_fl.data.federated import load_data
from copra_fl.models.build import build_model, load_processor
from tests.support.federations import Stop, StoppingGrid, assert_equal, final_adapter, final_state, journal
from tests.support.local_grid import LocalGrid, run_federation
from tests.support.tiny import Settings
from tests.support.worlds import World

LOCAL_TERMS = [
    {"server-optimizer": "fedavgm"},
    {"server-optimizer": "fedadam", "server-learning-rate": 0.01},
    {"server-optimizer": "fedyogi", "server-learning-rate": 0.01},
    {"server-optimizer": "fedadagrad", "server-learning-rate": 0.01},
    {"proximal-mu": 0.1},
    {"layers-per-round": 2, "weighting": "activity", "updates": "pooled"},
    {"layers-per-round": 1, "layer-selection": "cycle", "full-rounds": 1},
    {"client-depths": "1,1,2,2,3,3", "weighting": "activity", "fraction-clients": 0.5},
    {"control-variates": True},
    {"control-variates": True, "rule": "rolora", "fraction-clients": 0.5},
    {"optimizer-state": "client", "rule": "rolora", "fraction-clients": 0.5},
    {"optimizer-state": "client", "optimizer": "sgd", "momentum": 0.9, "learning-rate": 0.1, "engine": "peft"},
    {"optimizer-state": "shared", "weighting": "activity"},
    {"off": "global"},
    {"local-training": "line", "gucci-beta": 0.3, "gucci-anchors": 2},
    {"uplink-dtype": "int8"},
    {"uplink-dtype": "int8", "start": "own", "stale-clients": 0.5, "optimizer-state": "client"},
    {"uplink-dtype": "int8", "rule": "hetlora", "client-ranks": "1,2,2,1,1,2", "lora-scaling": "rslora"},
]


def settings_of(rule: str) -> Settings:
    """CopRA where the rule takes it, else LoRA; two heads of rank 1."""
    settings = {"rule": rule, "local-training": "lora" if find_rule(rule).no_copra else "copra", "p0": 0.3}
    return settings | ({"ravan.heads": 2} if rule == "ravan" else {})


def start(flat: Settings) -> Adapter:
    return build_model(Config.from_flat(flat).model, "layer", 3, seed=0).read_adapter()


def resumes_bitwise(flat: Settings, directory: Path) -> Path:
    """A whole run, and one that is stopped within its second round and resumed on nodes that know nothing."""
    whole = run_federation(flat, directory / "whole")
    with pytest.raises(Stop):
        run_federation(flat, directory / "stopped", grid=StoppingGrid(2, 3))
    assert_equal(final_adapter(whole), final_adapter(run_federation(flat, directory / "stopped")))
    return whole


@pytest.mark.parametrize("engine", ["stacked", pytest.param("peft", marks=pytest.mark.slow)])
@pytest.mark.parametrize("rule", [rule.name for rule in RULES])
def test_every_rule_runs_twice_and_resumes_bitwise_equal(
    tiny: Settings, rule: str, engine: str, tmp_path: Path
) -> None:
    flat = tiny | settings_of(rule) | {"engine": engine}
    moved = parts(final_adapter(resumes_bitwise(flat, tmp_path)), {"A", "B", "R", "S", "head"})
    assert all(torch.isfinite(tensor).all() for tensor in moved.values())


@pytest.mark.parametrize("rule", ["flora", "florist"])
def test_new_factors_are_the_same_after_a_resume_whose_checkpoint_has_another_order(
    tiny: Settings, rule: str, tmp_path: Path
) -> None:
    """Modules of a model are in the order of its layers, those of a checkpoint in that of the alphabet."""
    resumes_bitwise(tiny | settings_of(rule) | {"target-modules": "all-linear"}, tmp_path)


@pytest.fixture(scope="module")
def plain_copra(tiny: Settings, tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    """The final adapter of CopRA without any other term."""
    flat = tiny | {"local-training": "copra", "p0": 0.3}
    return final_adapter(run_federation(flat, tmp_path_factory.mktemp("plain")))


@pytest.mark.parametrize("changes", LOCAL_TERMS, ids=str)
def test_local_terms_and_server_optimisers_resume_bitwise_equal(
    tiny: Settings, plain_copra: Adapter, changes: Settings, tmp_path: Path
) -> None:
    whole = resumes_bitwise(tiny | {"local-training": "copra", "p0": 0.3} | changes, tmp_path)
    assert norm(difference(plain_copra, final_adapter(whole))) > 1e-4, "it makes a difference"


@pytest.mark.slow
@pytest.mark.parametrize("rule", [rule.name for rule in RULES])
def test_both_engines_end_with_the_same_model(tiny: Settings, rule: str, tmp_path: Path) -> None:
    """One round of sgd, since adam's first step makes a sign of a rounding error."""
    flat = tiny | settings_of(rule) | {"num-rounds": 1, "optimizer": "sgd", "learning-rate": 0.1}
    ours, peft = (
        final_adapter(run_federation(flat | {"engine": engine}, tmp_path / engine)) for engine in ("stacked", "peft")
    )
    for name, tensor in ours.items():
        assert torch.allclose(tensor, peft[name], atol=1e-4, rtol=1e-3), name


def test_clients_with_unequal_steps_keep_their_own_adapters(tiny: Settings, tmp_path: Path) -> None:
    """The stacked engine trains clients in order of their steps, plain PEFT in order of their numbers."""
    flat = tiny | {"local-training": "lora", "num-rounds": 1, "optimizer": "sgd", "learning-rate": 0.1}
    flat |= {"local-epochs": 1, "alpha": 0.3, "path-pairs": 0, "merge-gap-clients": 0}
    stacked, peft = (
        final_adapter(run_federation(flat | {"engine": engine}, tmp_path / engine, num_nodes=1))
        for engine in ("stacked", "peft")
    )
    assert norm(difference(stacked, peft)) < 1e-4 * norm(peft)


@pytest.mark.parametrize(
    ("rule", "frozen"),
    [("ffa-lora", ["A", "A"]), ("rolora", ["A", "B"]), ("fed-sb", ["AB", "AB"]), ("ravan", ["AB", "AB"])],
)
def test_what_a_rule_freezes_is_bitwise_unchanged(tiny: Settings, rule: str, frozen: list[str], tmp_path: Path) -> None:
    """After round 1 and after round 2; and where clients share a factor, averages miss nothing."""
    directory = run_federation(tiny | settings_of(rule), tmp_path / "run")
    states = [load_file(path) for path in sorted((directory / "checkpoints").glob("*"))]
    if not find_rule(rule).core:
        states.insert(0, start(tiny))
        for (before, after), still in zip(pairwise(states), frozen, strict=True):
            for name in parts(before, {"A", "B"}):
                assert torch.equal(before[name], after[name]) == (part_of(name) in still), name
    else:
        first, second = states
        assert_equal(parts(first, {"A", "B"}), parts(second, {"A", "B"}))
        assert norm(parts(second, {"R"})) > 0
        assert all((scales == 1).all() for scales in parts(second, {"S"}).values())
    assert all(row["aggregation_error"]["total"] < 1e-6 for row in journal(directory))


def test_the_aggregation_error_is_of_fedavg_and_not_of_exact_rules(tiny: Settings, tmp_path: Path) -> None:
    """Of the first round, which all train alike; what has the best rank r is nearer than any other of that rank."""
    errors = {}
    for rule in ("fedavg", "flexlora", "flora", "fedex-lora"):
        rows = journal(run_federation(tiny | settings_of(rule), tmp_path / rule))
        errors[rule] = rows[0]["aggregation_error"]
        assert len(errors[rule]["layers"]) == 6, "query and value of three layers"
    assert errors["fedavg"]["total"] > errors["flexlora"]["total"] > 1e-6
    assert max(errors["flora"]["total"], errors["fedex-lora"]["total"]) < 1e-6


@pytest.mark.parametrize("rule", ["flora", "fedex-lora", "fed-sb", "flexlora"])
def test_stock_peft_opens_the_final_model_with_the_same_accuracy(tiny: Settings, rule: str, tmp_path: Path) -> None:
    """By hand: plain base, PEFT's adapter (beside it, then merged), mean pooling, linear head."""
    rates = {"local-training": "lora", "local-steps": 60, "learning-rate": 1e-2, "head-learning-rate": 1e-2}
    directory = run_federation(tiny | settings_of(rule) | rates, tmp_path / "run")
    test = json.loads((directory / "summary.json").read_text())["test"]
    head = load_file(directory / "adapter" / "head.safetensors")
    federated = load_data(Config.from_flat(tiny), load_processor(Config.from_flat(tiny).model))
    batch = federated.examples.batch(federated.test)
    mask = batch["attention_mask"]
    adapted = PeftModel.from_pretrained(AutoModel.from_pretrained(str(tiny["model"])), str(directory / "adapter"))
    for merge in (False, True):
        encoder = adapted.merge_and_unload() if merge else adapted
        with torch.no_grad():
            hidden = encoder.eval()(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state
            features = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
            logits = F.linear(features, head["weight"], head["bias"])
        assert float((logits.argmax(1) == batch["labels"]).float().mean()) == pytest.approx(test["accuracy"])
        assert float(F.cross_entropy(logits, batch["labels"])) == pytest.approx(test["loss"], rel=1e-4)
    assert test["accuracy"] > 0.5


def test_fedsa_keeps_b_and_head_with_each_client_and_has_no_global_model(tiny: Settings, tmp_path: Path) -> None:
    directory = run_federation(tiny | settings_of("fedsa-lora") | {"local-steps": 20}, tmp_path / "run")
    summary = json.loads((directory / "summary.json").read_text())
    assert summary["personal"] and summary["test"] is None and summary["validation"] is None
    assert not (directory / "adapter").exists()
    assert [client["client"] for client in summary["clients"]] == list(range(6))
    before, after = start(tiny), final_state(directory).adapter
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name]) == (part_of(name) != "A"), name
    alone = run_federation(tiny | {"local-training": "lora", "local-steps": 20}, tmp_path / "alone")
    rows = [journal(folder)[-1] for folder in (directory, alone)]
    assert rows[0]["bytes_up"] < 0.6 * rows[1]["bytes_up"], "half of the factors, and no head"


def test_nodes_get_only_what_has_changed(tiny: Settings, tmp_path: Path) -> None:
    """Two nodes; the first message brings everything, later ones what the last round has changed."""
    width, rank, modules, head = 32, 2, 6, 3 * 32 + 3
    factor = 4 * modules * rank * width
    for rule, wanted in (("ffa-lora", factor + 4 * head), ("rolora", factor + 4 * head), ("fedsa-lora", factor)):
        rows = journal(run_federation(tiny | settings_of(rule), tmp_path / rule))
        assert rows[0]["bytes_down"] == pytest.approx(2 * (2 * factor + 4 * head), abs=2 * 300)
        assert rows[1]["bytes_down"] == pytest.approx(2 * wanted, abs=2 * 300), rule


@pytest.mark.parametrize("selection", ["random", "cycle"])
def test_only_the_layers_of_the_round_travel(tiny: Settings, selection: str, tmp_path: Path) -> None:
    """1 of 3 layers: a third of the adapter and the head go up, and down if all clients train the same layer."""
    flat = tiny | {"local-training": "lora", "weighting": "activity", "num-rounds": 3}
    flat |= {"layers-per-round": 1, "layer-selection": selection}
    directory = run_federation(flat, tmp_path / "run")
    rows, (layer, head) = journal(directory), (4 * 2 * 2 * 2 * 32, 4 * (3 * 32 + 3))
    trained = [[tuple(client["active_steps"]) for client in row["clients"]] for row in rows]
    for row in rows:
        assert row["bytes_up"] == pytest.approx(6 * (layer + head), abs=6 * 300), "6 clients"
    assert rows[0]["bytes_down"] == pytest.approx(2 * (3 * layer + head), abs=2 * 300), "2 nodes"
    if selection == "cycle":
        assert trained == [[(3, 0, 0)] * 6, [(0, 3, 0)] * 6, [(0, 0, 3)] * 6]
        for row in rows[1:]:
            assert row["bytes_down"] == pytest.approx(2 * (layer + head), abs=2 * 300)
    else:
        assert all(sorted(steps) == [0, 0, 3] for steps in trained[0] + trained[1])
        assert len(set(trained[0])) > 1 and trained[0] != trained[1]


def test_a_layer_is_averaged_over_the_clients_that_trained_it(tiny: Settings, tmp_path: Path) -> None:
    """Round 1 moves every layer by what its own clients moved it; the clients' mean by hand, from their updates."""
    flat = tiny | {"local-training": "lora", "num-rounds": 1, "layers-per-round": 1, "engine": "peft"}
    world = World(flat, server_round=1)
    world.starts = dict.fromkeys(range(6), world.plain.read_adapter())
    updates = [world.alone(client) for client in range(6)]
    after = final_adapter(run_federation(flat | {"weighting": "activity"}, tmp_path / "run"))
    for name, old in world.plain.read_adapter().items():
        sent = [(update.num_examples, update.adapter[name]) for update in updates if name in update.adapter]
        total = sum(examples for examples, _ in sent)
        terms = [examples / total * tensor.double() for examples, tensor in sent] or [old.double()]
        assert torch.allclose(after[name].double(), torch.stack(terms).sum(0), atol=1e-7), name


def test_the_journal_has_seconds_and_memory_of_each_depth(tiny: Settings, tmp_path: Path) -> None:
    """Client 0, of depth 1, is left out; clients of smaller depth send less and keep less for the backward pass."""
    flat = tiny | {"local-training": "lora", "weighting": "activity", "num-rounds": 1, "max-length": 8}
    depths = {"client-depths": "1,2,2,2,2,3", "min-depth": 2}
    directory = run_federation(flat | depths, tmp_path / "run", num_nodes=1)
    (row,), (layer, head) = journal(directory), (4 * 2 * 2 * 2 * 32, 4 * (3 * 32 + 3))
    assert [(tier["depth"], tier["clients"]) for tier in row["tiers"]] == [(2, [1, 2, 3, 4]), (3, [5])]
    assert [client["active_steps"] for client in row["clients"]] == [[0, 3, 3]] * 4 + [[3, 3, 3]]
    assert row["bytes_up"] == pytest.approx((4 * 2 + 3) * layer + 5 * head, abs=5 * 300)
    weak, strong = row["tiers"]
    assert 0 < weak["memory"] < 0.8 * strong["memory"]
    assert weak["seconds"] == pytest.approx(sum(client["seconds"] for client in row["clients"][:4]) / 4)


class ForgetfulGrid(LocalGrid):
    """The second node forgets what it holds before round 2, as a new machine under an old name would."""

    def answer(self, message):
        plan = message.content.config_records.get("plan", {})
        if message.metadata.message_type == "train" and plan["server-round"] == 2:
            self.contexts[101].state.clear()
        return super().answer(message)


def test_a_node_that_has_forgotten_says_so_and_gets_everything_next_time(tiny: Settings, tmp_path: Path) -> None:
    flat = tiny | settings_of("fedex-lora") | {"num-rounds": 3, "failures": "tolerant"}
    rows = journal(run_federation(flat, tmp_path / "run", grid=ForgetfulGrid(2)))
    assert [len(row["clients"]) for row in rows] == [6, 3, 6]
    assert "no longer has the global adapter of round 0 in its cache" in rows[1]["missing"][0]["reason"]


@pytest.mark.parametrize(
    "rule",
    [  # trimmed-mean-product differs from median-product in the mean alone
        rule.name for rule in RULES if rule.unequal_ranks and rule.name != "trimmed-mean-product"
    ],
)
def test_clients_of_unequal_rank(tiny: Settings, rule: str, tmp_path: Path) -> None:
    """Ranks 1 to 4: no client sends more than its own, and the exact rule stays exact."""
    ranks = {"rank": 4, "client-ranks": "1,2,3,4,1,1", "lora-scaling": "rslora"}
    flat = tiny | settings_of(rule) | ranks | {"local-training": "lora"}
    whole = resumes_bitwise(flat, tmp_path)
    alone = run_federation(flat | {"engine": "peft"}, tmp_path / "alone", num_nodes=1)
    equal = run_federation(tiny | settings_of(rule) | {"rank": 4, "local-training": "lora"}, tmp_path / "equal")
    up, full = (journal(folder)[0]["bytes_up"] for folder in (whole, equal))
    bytes_a_rank = 4 * 6 * 2 * 32
    assert full - up == pytest.approx(bytes_a_rank * (6 * 4 - 12), rel=0.01)
    ends = [json.loads((folder / "summary.json").read_text())["clients"] for folder in (whole, alone)]
    losses = [[client["loss"] for client in clients] for clients in ends]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4), (
        "a node whose own clients have a small rank evaluates the whole adapter too"
    )
    if rule == "flora":
        assert journal(whole)[-1]["aggregation_error"]["total"] < 1e-6
