"""The share of a LoRA step that CopRA saves over its schedule: measured, counted, and in closed form.

Blocks below a client's lowest active adapter have no backward pass. Let K be their number (all L if no adapter is
active), with every adapter active with probability p, independently. Then

    E[K | p] = sum_{k=1..L} P(K >= k) = sum_{k=1..L} (1-p)^k
    E[K]     = ramp (H_{L+1} - 1)                 mean over t of the schedule with p0 = 0; H: harmonic numbers

and the saved share of a LoRA step is K b / F, where b is the backward pass through a block and F the whole LoRA step,
both counted (`flops`). The closed form ignores the products of inactive adapters, under 1 % of a block each, and that
the lowest block has a shorter backward pass than the others.

The measurement uses our engine in one process: rounds of one local step of all clients, in a federation that is long
enough for p to be 0, 1/8, ... 1 in some rounds. Each pass measures LoRA and all these p, in its own random order and
with its own masks; a saving is a ratio within a pass.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from copra_fl.adapters.state import Layout
from copra_fl.bench import workers
from copra_fl.bench.flops import block_backward, encoder_shape, round_masks, step_flops
from copra_fl.bench.runner import Announce, CompetitorResult
from copra_fl.bench.sizes import WARM_UP, Workload, open_data
from copra_fl.bench.workers import CoreSplit
from copra_fl.config import CopraConfig
from copra_fl.copra import schedule
from copra_fl.seeding import generator

PASSES_PER_REPEAT = 3
#: p = 0, 1/8, ... 1; an even number of steps, for Simpson's rule
P_STEPS = 8
#: rounds of one step in the whole schedule: the smallest number that has every p at the start of a round
NUM_ROUNDS = Fraction(CopraConfig.ramp).limit_denominator(100).denominator * P_STEPS


@dataclass(frozen=True)
class SchedulePoint:
    """One point of the schedule; lists have one value per pass.

    Attributes:
        t, p: progress, and the probability that an adapter is active.
        expected: saved share of a LoRA step, in closed form.
        blocks: mean of K over clients, for the drawn masks.
        counted: saved share of the FLOPs, for the drawn masks.
        measured: saved share of the seconds.
    """

    t: float
    p: float
    expected: float
    blocks: list[float]
    counted: list[float]
    measured: list[float]


@dataclass(frozen=True)
class Savings:
    """The savings of CopRA over its schedule; lists have one value per pass.

    Attributes:
        core_split: the workers and threads of the measurement.
        layers: L.
        block_share: b / F.
        expected, counted, measured: saved share of a LoRA step, mean over the whole schedule.
        lora_seconds: seconds of a LoRA step of all clients.
    """

    core_split: str
    layers: int
    ramp: float
    block_share: float
    expected: float
    counted: list[float]
    measured: list[float]
    lora_seconds: list[float]
    points: list[SchedulePoint]


def expected_blocks(p: float, layers: int) -> float:
    """Return E[K | p]."""
    return sum((1 - p) ** k for k in range(1, layers + 1))


def mean_expected_blocks(ramp: float, layers: int) -> float:
    """Return E[K], the mean over the schedule with p0 = 0."""
    return ramp * sum(1 / k for k in range(2, layers + 2))


def blocks_below(masks: np.ndarray) -> np.ndarray:
    """Return (n,) K of each of the (n, layers) masks."""
    return np.where(masks.any(axis=1), masks.argmax(axis=1), masks.shape[1])


def schedule_mean(values: np.ndarray, ramp: float) -> np.ndarray:
    """Return the mean over t of (P_STEPS + 1, ...) `values` at p = 0 ... 1, by Simpson's rule on the ramp."""
    weights = np.ones(P_STEPS + 1)
    weights[1:-1:2], weights[2:-1:2] = 4, 2
    return ramp * np.tensordot(weights / weights.sum(), values, axes=1) + (1 - ramp) * values[-1]


def rounds_of_points(copra: CopraConfig) -> dict[int, tuple[float, float]]:
    """Return the round of every p that is measured, with its (t, p)."""
    points: dict[int, tuple[float, float]] = {}
    for server_round in range(1, NUM_ROUNDS + 1):
        t = schedule.progress(copra, 0, 1, server_round, NUM_ROUNDS)
        p = schedule.probability(t, copra.p0, copra.ramp)
        if (p * P_STEPS).is_integer() and p not in (measured_p for _, measured_p in points.values()):
            points[server_round] = t, p
    return points


def num_runs(repeats: int) -> int:
    """Return the number of passes that `measure` announces."""
    return PASSES_PER_REPEAT * repeats


def measure(
    workload: Workload, result: CompetitorResult, split: CoreSplit, repeats: int, announce: Announce
) -> Savings:
    """Measure the savings of `result`'s competitor with `split`, whose only worker trains all clients."""
    configs = result.competitor.configs(workload)
    changes = {"num_rounds": NUM_ROUNDS, "local_steps": 1, "p0": 0.0, "ramp": CopraConfig.ramp}
    lora, copra = (configs[training].changed(**changes) for training in ("lora", "copra"))
    points_by_round, ramp = rounds_of_points(copra.copra), copra.copra.ramp
    data, encoder, start = open_data(lora), encoder_shape(lora), workers.start_adapter(lora)
    layout = Layout.by_name(start)
    row = layout.flatten(start).numpy()
    draws = [copra.changed(seed=number) for number in range(num_runs(repeats))]
    seconds = np.empty((len(draws), 1 + len(points_by_round)))  # LoRA first
    with workers.worker_pool(workers.open_copra_fl, configs[WARM_UP], layout, split) as (_, pipes):
        workers.train_round(pipes, lora, 1, row)
        for number, drawn in enumerate(draws):
            announce(f"{result.competitor}, CopRA's steps, pass {number + 1}/{len(draws)}")
            rounds = [(lora, 1), *((drawn, server_round) for server_round in points_by_round)]
            for place in generator(number, "bench", "order").permutation(len(rounds)):
                config, server_round = rounds[place]
                begin = time.perf_counter()
                workers.train_round(pipes, config, server_round, row)
                seconds[number, place] = time.perf_counter() - begin
    rows, tokens = lora.training.batch_size, lora.data.max_length
    whole = step_flops(encoder, rows, tokens, [True] * encoder.layers)
    block_share = block_backward(encoder, rows, tokens) / whole

    def counted(masks: np.ndarray) -> float:
        return 1 - float(np.mean([step_flops(encoder, rows, tokens, mask) for mask in masks.tolist()])) / whole

    points = []
    for place, (server_round, (t, p)) in enumerate(points_by_round.items(), start=1):
        masks = [round_masks(drawn, data, server_round, encoder.layers) for drawn in draws]
        expected = expected_blocks(p, encoder.layers) * block_share
        blocks = [float(blocks_below(drawn).mean()) for drawn in masks]
        measured = 1 - seconds[:, place] / seconds[:, 0]
        points.append(SchedulePoint(t, p, expected, blocks, list(map(counted, masks)), measured.tolist()))
    return Savings(
        core_split=str(split),
        layers=encoder.layers,
        ramp=ramp,
        block_share=block_share,
        expected=mean_expected_blocks(ramp, encoder.layers) * block_share,
        counted=schedule_mean(np.array([point.counted for point in points]), ramp).tolist(),
        measured=schedule_mean(np.array([point.measured for point in points]), ramp).tolist(),
        lora_seconds=seconds[:, 0].tolist(),
        points=points,
    )
