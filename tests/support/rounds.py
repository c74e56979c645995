"""Rounds for tests of aggregation rules: two modules with d != k, a head, clients of unequal weight; dense oracles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from copra_fl.adapters.state import Adapter, Update
from copra_fl.aggregation import find_rule
from copra_fl.aggregation.grams import templates
from copra_fl.aggregation.rule import NoParameters, Outcome, Round, Score
from copra_fl.config import AggregationConfig

D, K, R, S = 7, 5, 2, 1.5
MODULES = ("layer.0.query", "layer.1.query")
GROUP_OF = {f"{module}.lora_{part}.weight": g for g, module in enumerate(MODULES) for part in "ABRS"}


def random_adapter(seed: int, rank: int = R, d: int = D, k: int = K, core: str = "") -> Adapter:
    """Return an adapter of normal numbers; with random bases it has two heads, whose scales are 1."""
    rng = torch.Generator().manual_seed(seed)
    adapter = {}
    for module in MODULES:
        adapter[f"{module}.lora_A.weight"] = torch.randn(rank, k, generator=rng)
        adapter[f"{module}.lora_B.weight"] = torch.randn(d, rank, generator=rng)
        if core:
            adapter[f"{module}.lora_R.weight"] = torch.randn(rank, rank // (1 + (core == "orthogonal")), generator=rng)
        if core == "orthogonal":
            adapter[f"{module}.lora_S.weight"] = torch.ones(2, 1)
    return adapter | {"head.weight": torch.randn(3, 4, generator=rng), "head.bias": torch.randn(3, generator=rng)}


def start(seed: int = 100, rank: int = R, **shape: int) -> Adapter:
    """Return a new adapter: B = 0."""
    adapter = random_adapter(seed, rank, **shape)
    return {name: torch.zeros_like(tensor) if ".lora_B." in name else tensor for name, tensor in adapter.items()}


def fresh() -> Adapter:
    return {name: tensor for name, tensor in start(200).items() if not name.startswith("head")}


def no_score(adapters: Sequence[Adapter]) -> list[dict[str, float]]:
    """Score all adapters alike: a flat loss landscape."""
    return [{"loss": 1.0, "accuracy": 0.5} for _ in adapters]


def update(client: int, adapter: Adapter, examples: int, active: tuple[int, ...] = (1, 1)) -> Update:
    """Return an update with the trained tensors of `adapter`, and a random Gram matrix for each B in it."""
    sent = {name: tensor for name, tensor in adapter.items() if name not in GROUP_OF or active[GROUP_OF[name]]}
    rng = torch.Generator().manual_seed(1000 + client)
    grams = {}
    for name, template in templates(sent).items():
        inputs = torch.randn(50, len(template), generator=rng)
        grams[name] = inputs.T @ inputs / len(inputs)
    return Update(client, sent, examples, active, {"loss": 1.0}, grams=grams)


def make_round(
    before: Adapter,
    updates: Sequence[Update],
    *,
    ranks: dict[int, int] | None = None,
    scaling: float = S,
    score: Score = no_score,
    fresh: Callable[[], Adapter] = fresh,
    parameters: object = NoParameters(),
    **settings: float | str,
) -> Round:
    return Round(
        before, updates, GROUP_OF, scaling, AggregationConfig(**settings), ranks or {}, fresh, score, parameters
    )


def aggregate(name: str, round_: Round, **parameters: float) -> Outcome:
    """Apply the rule called `name` with these parameters, defaults for the others."""
    rule = find_rule(name)
    return rule.aggregate(replace(round_, parameters=rule.parameters(**parameters)))


def random_round(clients: int = 3, core: str = "", **settings: float | str) -> Round:
    """Return a round in which all clients train everything, with 10, 20, 30 ... examples."""
    updates = [update(i, random_adapter(i, core=core), 10 * (i + 1)) for i in range(clients)]
    return make_round(random_adapter(99, core=core), updates, **settings)


def dense(adapter: Adapter, module: str, scaling: float = S) -> np.ndarray:
    """Return s B A, s B R A, or s sum_i B_i (R_i A_i) with a block R_i for each head, as numpy (d, k) in float64."""
    part = {p: adapter[n].double().numpy() for p in "ABR" if (n := f"{module}.lora_{p}.weight") in adapter}
    heads = part["R"].shape[0] // part["R"].shape[1] if "R" in part else 1
    columns, rows = np.split(part["B"], heads, axis=1), np.split(part["A"], heads)
    blocks = np.split(part["R"], heads) if "R" in part else [np.eye(len(part["A"]))]
    return scaling * sum(b @ r @ a for b, r, a in zip(columns, blocks, rows, strict=True))


def dense_ideal(round_: Round, module: str) -> np.ndarray:
    """Return sum_i n_i s B_i A_i / sum_i n_i."""
    examples = np.array([update.num_examples for update in round_.updates], dtype=float)
    products = [dense(round_.before | update.adapter, module, round_.scaling) for update in round_.updates]
    return np.tensordot(examples / examples.sum(), products, axes=1)


def dense_made(round_: Round, outcome: Outcome, module: str) -> np.ndarray:
    """Return the difference of the model's effective weights from the old W0, as numpy (d, k)."""
    made, residual = dense(outcome.adapter, module, round_.scaling), outcome.residual
    if f"{module}.residual" in residual:
        made = made + residual[f"{module}.residual"].double().numpy()
    if f"{module}.residual_B" in residual:
        made = made + (residual[f"{module}.residual_B"].double() @ residual[f"{module}.residual_A"].double()).numpy()
    return made


def relative(actual: np.ndarray, expected: np.ndarray) -> float:
    """Return ||actual - expected|| / ||expected||."""
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))
