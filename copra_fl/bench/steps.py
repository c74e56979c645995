"""What CopRA saves of a LoRA step over its schedule: measured, counted, and in closed form.

Blocks below a client's lowest active adapter have no backward pass. With K of them (all L where no adapter is on) and
every adapter on with probability p, independently,

    E[K | p] = sum_{k=1..L} P(K >= k) = sum_{k=1..L} (1-p)^k
    E[K]     = ramp (H_{L+1} - 1)                 mean over t of the schedule with p0 = 0; H: harmonic numbers

and the share of a LoRA step that is saved is K b / F: b the backward pass through a block, F the whole LoRA step, both
counted (`flops`). The closed form leaves out the products of adapters that are off, under 1 % of a block each, and that
the lowest block has less of a backward pass to lose than the others.

Measured is our engine in one process: rounds of one local step of all clients, of a federation long enough for p to be
0, 1/8, ... 1 in some of them. Each pass takes LoRA and all these p, in an order and with masks of its own; a saving is
a ratio within its pass.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from copra_fl.adapters.state import Layout
from copra_fl.bench import workers
from copra_fl.bench.contest import Result, Show
from copra_fl.bench.flops import block_backward, encoder_of, round_masks, step_flops
from copra_fl.bench.sizes import WARM_UP, Workload, open_data
from copra_fl.bench.workers import Share
from copra_fl.config import CopraConfig
from copra_fl.copra import schedule
from copra_fl.seeding import generator

PASSES_PER_REPEAT = 3
#: p = 0, 1/8, ... 1; an even number of steps, for Simpson's rule
P_STEPS = 8
#: rounds of one step in the whole schedule: the least that put every p at the start of a round
NUM_ROUNDS = Fraction(CopraConfig.ramp).limit_denominator(100).denominator * P_STEPS


@dataclass(frozen=True)
class Point:
    """A place in the schedule; lists have one value a pass.

    Attributes:
        t, p: progress, and the probability that an adapter is on.
        expected: share of a LoRA step that is saved, in closed form.
        blocks: mean over clients of K, of the masks that were drawn.
        counted: share saved of the FLOPs, of the masks that were drawn.
        measured: share saved of the seconds.
    """

    t: float
    p: float
    expected: float
    blocks: list[float]
    counted: list[float]
    measured: list[float]


@dataclass(frozen=True)
class Savings:
    """
    Attributes:
        layers: L.
        block_share: b / F.
        expected, counted, measured: share of a LoRA step saved, mean over the whole schedule; the latter two a pass.
        lora_seconds: of a LoRA step of all clients, a pass.
    """

    division: str
    layers: int
    ramp: float
    block_share: float
    expected: float
    counted: list[float]
    measured: list[float]
    lora_seconds: list[float]
    points: list[Point]


def expected_blocks(p: float, layers: int) -> float:
    """E[K | p]."""
    return sum((1 - p) ** k for k in range(1, layers + 1))


def mean_expected_blocks(ramp: float, layers: int) -> float:
    """E[K], mean over the schedule with p0 = 0."""
    return ramp * sum(1 / k for k in range(2, layers + 2))


def blocks_below(masks: np.ndarray) -> np.ndarray:
    """(n,) K of each mask of (n, layers)."""
    return np.where(masks.any(axis=1), masks.argmax(axis=1), masks.shape[1])


def schedule_mean(values: np.ndarray, ramp: float) -> np.ndarray:
    """Mean over t of what is `values` (P_STEPS + 1, ...) at p = 0 ... 1, by Simpson's rule on the ramp."""
    weights = np.ones(P_STEPS + 1)
    weights[1:-1:2], weights[2:-1:2] = 4, 2
    return ramp * np.tensordot(weights / weights.sum(), values, axes=1) + (1 - ramp) * values[-1]


def rounds_of_points(copra: CopraConfig) -> dict[int, tuple[float, float]]:
    """Round of the federation -> its (t, p), for every p that is measured."""
    found: dict[int, tuple[float, float]] = {}
    for server_round in range(1, NUM_ROUNDS + 1):
        t = schedule.progress(copra, 0, 1, server_round, NUM_ROUNDS)
        p = schedule.probability(t, copra.p0, copra.ramp)
        if (p * P_STEPS).is_integer() and p not in (known for _, known in found.values()):
            found[server_round] = t, p
    return found


def num_runs(repeats: int) -> int:
    """How often `measure` tells what runs next."""
    return PASSES_PER_REPEAT * repeats


def measure(workload: Workload, result: Result, share: Share, repeats: int, show: Show) -> Savings:
    """What CopRA saves a step of `result`'s contestant, in `share`, whose one worker has all clients."""
    configs = result.contestant.configs(workload)
    changes = {"num_rounds": NUM_ROUNDS, "local_steps": 1, "p0": 0.0, "ramp": CopraConfig.ramp}
    lora, copra = (configs[training].changed(**changes) for training in ("lora", "copra"))
    places, ramp = rounds_of_points(copra.copra), copra.copra.ramp
    data, encoder, start = open_data(lora), encoder_of(lora), workers.start_adapter(lora)
    layout = Layout.by_name(start)
    row = layout.flatten(start).numpy()
    draws = [copra.changed(seed=number) for number in range(num_runs(repeats))]
    seconds = np.empty((len(draws), 1 + len(places)))  # LoRA first
    with workers.crew(workers.open_ours, configs[WARM_UP], layout, share) as (_, pipes):
        workers.train_round(pipes, lora, 1, row)
        for number, drawn in enumerate(draws):
            show(f"{result.contestant}, CopRA's steps, pass {number + 1}/{len(draws)}")
            rounds = [(lora, 1), *((drawn, server_round) for server_round in places)]
            for place in generator(number, "bench", "order").permutation(len(rounds)):
                config, server_round = rounds[place]
                begun = time.perf_counter()
                workers.train_round(pipes, config, server_round, row)
                seconds[number, place] = time.perf_counter() - begun
    rows, tokens = lora.training.batch_size, lora.data.max_length
    whole = step_flops(encoder, rows, tokens, [True] * encoder.layers)
    block_share = block_backward(encoder, rows, tokens) / whole

    def counted(masks: np.ndarray) -> float:
        return 1 - float(np.mean([step_flops(encoder, rows, tokens, on) for on in masks.tolist()])) / whole

    points = []
    for place, (server_round, (t, p)) in enumerate(places.items(), start=1):
        masks = [round_masks(drawn, data, server_round, encoder.layers) for drawn in draws]
        expected = expected_blocks(p, encoder.layers) * block_share
        blocks = [float(blocks_below(each).mean()) for each in masks]
        measured = 1 - seconds[:, place] / seconds[:, 0]
        points.append(Point(t, p, expected, blocks, list(map(counted, masks)), measured.tolist()))
    return Savings(
        division=str(share),
        layers=encoder.layers,
        ramp=ramp,
        block_share=block_share,
        expected=mean_expected_blocks(ramp, encoder.layers) * block_share,
        counted=schedule_mean(np.array([point.counted for point in points]), ramp).tolist(),
        measured=schedule_mean(np.array([point.measured for point in points]), ramp).tolist(),
        lora_seconds=seconds[:, 0].tolist(),
        points=points,
    )
