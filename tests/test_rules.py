"""Invariants of all aggregation rules, with PEFT as an oracle."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

from copra_fl.adapters.state import Adapter
from copra_fl.aggregation import RULES, find_rule, rules
from copra_fl.aggregation.products import aggregation_error
from copra_fl.aggregation.ranks import pad, relative_scaling, rescale
from copra_fl.aggregation.server_optimizers import SERVER_OPTIMIZERS
from copra_fl.config import Config
from tests.support.rounds import (
    MODULES,
    D,
    K,
    R,
    S,
    aggregate,
    dense,
    dense_ideal,
    dense_made,
    make_round,
    random_adapter,
    random_round,
    relative,
    start,
    update,
)

NAMES = [rule.name for rule in RULES]
EVERY = pytest.mark.parametrize("rule", NAMES)
WEIGHTING = pytest.mark.parametrize("weighting", ["examples", "activity"])
UNEQUAL = [rule.name for rule in RULES if rule.unequal_ranks]
#: parameters with which a rule leaves the adapter of a single client as it is
NEUTRAL = {"norm-clipped": {"clip_norm": 100.0}, "florist": {"threshold": 1.0}}
#: rules that start each round with a new adapter
RENEWING = ("flora", "florist")


def same(a: Adapter, b: Adapter) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@EVERY
@WEIGHTING
def test_client_order_is_irrelevant_bitwise(rule: str, weighting: str) -> None:
    """Clients train unequal numbers of steps, one of them only the first layer."""
    core, active = find_rule(rule).core, [(1, 3), (2, 0), (3, 1), (1, 1)]
    updates = [update(i, random_adapter(i, core=core), 10 * i + 3, active[i]) for i in range(4)]
    round_ = make_round(random_adapter(9, core=core), updates, weighting=weighting)
    expected = aggregate(rule, round_)
    for order in itertools.permutations(updates):
        outcome = aggregate(rule, replace(round_, updates=order))
        assert same(outcome.adapter, expected.adapter) and same(outcome.residual, expected.residual)


@EVERY
@WEIGHTING
def test_with_one_client_the_product_is_that_of_the_client(rule: str, weighting: str) -> None:
    only = random_adapter(1, core=find_rule(rule).core)
    round_ = make_round(random_adapter(9, core=find_rule(rule).core), [update(4, only, 7)], weighting=weighting)
    outcome = aggregate(rule, round_, **NEUTRAL.get(rule, {}))
    for module in MODULES:
        assert relative(dense_made(round_, outcome, module), dense(only, module)) < 1e-6
    assert torch.equal(outcome.adapter["head.weight"], only["head.weight"])


@EVERY
@WEIGHTING
def test_a_layer_that_no_client_trained_is_bitwise_unchanged(rule: str, weighting: str) -> None:
    core, before = find_rule(rule).core, random_adapter(9, core=find_rule(rule).core)
    updates = [update(i, random_adapter(i, core=core), 10 + i, active=(2, 0)) for i in range(3)]
    outcome = aggregate(rule, make_round(before, updates, weighting=weighting))
    for name, old in before.items():
        assert torch.equal(outcome.adapter[name], old) == (MODULES[1] in name or ".lora_S." in name), name
    assert not any(MODULES[1] in name for name in outcome.residual)


@EVERY
def test_a_layer_that_no_client_trained_is_unchanged_by_activity_where_whole_adapters_are_averaged(rule: str) -> None:
    """As with own starts and stale clients: the updates have the layer, in which the clients did not start alike."""
    core, before = find_rule(rule).core, random_adapter(9, core=find_rule(rule).core)
    whole = [random_adapter(i, core=core) for i in range(3)]
    updates = [replace(update(i, whole[i], 10 + i, active=(2, 0)), adapter=whole[i]) for i in range(3)]
    outcome = aggregate(rule, make_round(before, updates, weighting="activity"))
    assert all(torch.equal(outcome.adapter[name], old) for name, old in before.items() if MODULES[1] in name)
    assert not any(MODULES[1] in name for name in outcome.residual)


@EVERY
@WEIGHTING
def test_a_layer_that_one_of_five_clients_trained(rule: str, weighting: str) -> None:
    """By activity the product is that client's; a median or trimmed mean asks nobody else by examples either."""
    core, before = find_rule(rule).core, random_adapter(9, core=find_rule(rule).core)
    updates = [update(i, random_adapter(i, core=core), 10, active=(1, int(i == 2))) for i in range(5)]
    round_ = make_round(before, updates, weighting=weighting)
    outcome = aggregate(rule, round_, **NEUTRAL.get(rule, {}))
    assert all(torch.isfinite(tensor).all() for tensor in outcome.adapter.values())
    if weighting == "activity" or "median" in rule or "trimmed" in rule:
        assert relative(dense_made(round_, outcome, MODULES[1]), dense(updates[2].adapter, MODULES[1])) < 1e-6


@EVERY
@pytest.mark.parametrize("moved", [True, False])
def test_the_first_round_where_b_is_zero_stays_finite(rule: str, moved: bool) -> None:
    core = find_rule(rule).core
    before = random_adapter(9, core=core) if core else start()
    updates = [update(i, random_adapter(i, core=core) if moved else before, 10 + i) for i in range(3)]
    outcome = aggregate(rule, make_round(before, updates))
    for tensor in (outcome.adapter | outcome.residual).values():
        assert tensor.dtype == torch.float32 and torch.isfinite(tensor).all()
    if not moved and rule not in RENEWING:
        assert same(outcome.adapter, before) and not outcome.residual


@EVERY
def test_a_rule_is_pure_and_keeps_names_and_shapes(rule: str) -> None:
    round_ = random_round(core=find_rule(rule).core)
    before = {name: tensor.clone() for name, tensor in round_.before.items()}
    sent = [{name: tensor.clone() for name, tensor in update.adapter.items()} for update in round_.updates]
    outcome, again = aggregate(rule, round_), aggregate(rule, round_)
    assert same(round_.before, before)
    assert all(same(update.adapter, copy) for update, copy in zip(round_.updates, sent, strict=True))
    assert same(outcome.adapter, again.adapter) and same(outcome.residual, again.residual)
    assert list(outcome.adapter) == list(before)
    assert all(outcome.adapter[name].shape == tensor.shape for name, tensor in before.items())
    assert bool(outcome.residual) == find_rule(rule).changes_base


@EVERY
@pytest.mark.parametrize("server_round", [1, 2])
def test_parts_that_clients_do_not_train_are_bitwise_unchanged(rule: str, server_round: int) -> None:
    core, before = find_rule(rule).core, random_adapter(9, core=find_rule(rule).core)
    changes = find_rule(rule).changes(server_round) | find_rule(rule).trains(server_round)
    frozen = {name: old for name, old in before.items() if (name.partition(".lora_")[2][:1] or "head") not in changes}
    updates = [update(i, random_adapter(i, core=core) | frozen, 10 + i) for i in range(3)]
    outcome = aggregate(rule, make_round(before, updates))
    numbers = {"ffa-lora": 1, "ffa-lora-gram": 1, "rolora": 1, "rolora-gram": 1, "fed-sb": 2, "ravan": 2}
    assert len(frozen) == len(MODULES) * numbers.get(rule, 0)
    assert all(torch.equal(outcome.adapter[name], old) for name, old in frozen.items())


@pytest.mark.parametrize("rule", ["flora", "fedex-lora", "ffa-lora", "fedsvd", "rolora", "fed-sb", "ravan"])
@pytest.mark.parametrize("server_round", [1, 2])
def test_exact_rules_give_the_ideal_product(rule: str, server_round: int) -> None:
    core, before = find_rule(rule).core, random_adapter(9, core=find_rule(rule).core)
    if rule == "flora":
        before = start()
    trains = find_rule(rule).trains(server_round)
    frozen = {name: old for name, old in before.items() if (name.partition(".lora_")[2][:1] or "head") not in trains}
    updates = [update(i, random_adapter(i, core=core) | frozen, 10 * i + 3) for i in range(4)]
    round_ = make_round(before, updates)
    outcome = aggregate(rule, round_)
    assert aggregation_error(round_, outcome)["total"] < 2e-7
    for module in MODULES:
        assert relative(dense_made(round_, outcome, module), dense_ideal(round_, module)) < 1e-6


@pytest.mark.parametrize("rule", ["flexlora", "lora-fair", "fedrot-lora"])
def test_error_correcting_rules_have_a_smaller_error_than_fedavg(rule: str) -> None:
    round_ = random_round(5)
    error = aggregation_error(round_, aggregate(rule, round_))["total"]
    assert error < aggregation_error(round_, aggregate("fedavg", round_))["total"]


def test_flexlora_has_the_smallest_error_of_its_rank() -> None:
    round_ = random_round(4)
    best = aggregation_error(round_, aggregate("flexlora", round_))["total"]
    others = {rule.name for rule in RULES if not rule.changes_base and not rule.core} - {"flexlora"}
    assert all(best <= aggregation_error(round_, aggregate(rule, round_))["total"] + 1e-7 for rule in others)


@pytest.mark.parametrize("rule", UNEQUAL)
@pytest.mark.parametrize("scaling", ["standard", "rslora", "sfed", "constant"])
def test_unequal_ranks_are_averaged_at_the_scaling_of_the_server(rule: str, scaling: str) -> None:
    """Clients of rank 1 and 2 train W0 + s_i B_i A_i; the server's factors are for s = s_2."""
    config = Config().changed(rank=2, lora_alpha=3.0, lora_scaling=scaling, scaling_clients=4)
    adapters = {i: random_adapter(i, rank=rank) for i, rank in enumerate((1, 2))}
    up = {i: pad(rescale(adapter, relative_scaling(config, i + 1)), 2) for i, adapter in adapters.items()}
    s = config.model.scaling(2)
    updates = [update(i, adapter, 10 + 20 * i) for i, adapter in up.items()]
    round_ = make_round(start(), updates, ranks={0: 1, 1: 2}, scaling=s)
    for module in MODULES:
        expected = sum(
            (10 + 20 * i) / 40 * dense(adapter, module, config.model.scaling(i + 1)) for i, adapter in adapters.items()
        )
        assert relative(dense_ideal(round_, module), expected) < 1e-6
        naive = replace(round_, updates=[update(i, pad(a, 2), 10 + 20 * i) for i, a in adapters.items()])
        assert (relative(dense_ideal(naive, module), expected) < 1e-6) == (scaling == "constant")
    outcome = aggregate(rule, round_)
    error = aggregation_error(round_, outcome)["total"]
    assert error < 2e-7 if rule == "flora" else error < 1


@pytest.mark.parametrize("rule", UNEQUAL)
def test_rows_past_all_ranks_of_the_round_stay_trainable(rule: str) -> None:
    """Two clients of rank 1 and a global rank of 3 (their sum has rank 2): no row ends with A = B = 0."""
    updates = [update(i, pad(random_adapter(i, rank=1), 3), 10 + i) for i in range(2)]
    before = start(rank=3)
    round_ = make_round(before, updates, ranks={0: 1, 1: 1}, fresh=lambda: start(5, rank=3))
    outcome = aggregate(rule, round_)
    for module in MODULES:
        a = outcome.adapter[f"{module}.lora_A.weight"]
        assert a.any(dim=1).all()
        if rule not in RENEWING:
            assert torch.equal(a[2], before[f"{module}.lora_A.weight"][2])
            assert not outcome.adapter[f"{module}.lora_B.weight"][:, 2].any()


@pytest.mark.parametrize(
    ("rule", "combination", "weights"),
    [
        ("flora", "cat", (0.25, 0.75)),
        ("flexlora", "svd", (0.25, 0.75)),
        ("fedavg", "linear", (0.25**2, 0.75**2)),  # PEFT gives each factor the square root
    ],
)
def test_peft_agrees(rule: str, combination: str, weights: tuple[float, float]) -> None:
    """`add_weighted_adapter` of a real PEFT model with d = 7 and k = 5."""
    model = get_peft_model(
        torch.nn.ModuleDict({"query": torch.nn.Linear(K, D)}),
        LoraConfig(r=R, lora_alpha=S * R, target_modules=["query"]),
        adapter_name="0",
    )
    model.add_adapter("1", LoraConfig(r=R, lora_alpha=S * R, target_modules=["query"]))
    clients = [random_adapter(i) for i in range(2)]
    for i, adapter in enumerate(clients):
        module = {f"base_model.model.query.lora_{p}.weight": adapter[f"{MODULES[0]}.lora_{p}.weight"] for p in "AB"}
        assert not set_peft_model_state_dict(model, module, adapter_name=str(i)).unexpected_keys
    model.add_weighted_adapter(
        ["0", "1"], list(weights), "merged", combination_type=combination, svd_rank=R if combination == "svd" else None
    )
    merged = model.base_model.model["query"].get_delta_weight("merged").detach().double().numpy()
    round_ = make_round(start(), [update(i, adapter, 10 + 20 * i) for i, adapter in enumerate(clients)])
    assert relative(dense_made(round_, aggregate(rule, round_), MODULES[0]), merged) < 1e-6


def test_every_rule_has_its_own_file_with_source_and_traffic() -> None:
    files = {path.stem.replace("_", "-"): path.read_text() for path in Path(rules.__file__).parent.glob("[!_]*.py")}
    assert sorted(files) == sorted(NAMES)
    for name, text in files.items():
        docstring = text.split('"""')[1]
        assert "arXiv" in docstring or "(ours)" in docstring, name
        assert "Traffic" in docstring, name


def test_the_docs_have_a_row_for_every_rule_and_server_optimizer() -> None:
    text = (Path(__file__).parent.parent / "docs" / "explanations" / "aggregation.md").read_text(encoding="utf-8")
    states = ("fresh", "client", "shared")  # of the local optimizer
    rows = {line.split("`")[1]: line for line in text.splitlines() if line.startswith("| `")}
    assert rows.keys() == {*NAMES, *SERVER_OPTIMIZERS, *states}
    for rule in RULES:
        *_, kept, unequal, copra, _ = (cell.strip() for cell in rows[rule.name].split("|"))
        assert (kept, unequal, copra) == tuple(
            "yes" if is_so else "no" for is_so in (not rule.changes_base, rule.unequal_ranks, not rule.no_copra)
        ), rule.name
