"""Differential privacy with secure aggregation: the noise of the nodes, what the server sees, what it costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from decimal import Decimal, localcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Message
from flwr.serverapp import NeighboringRelation, RdpAccountant, SamplingMethod
from flwr.serverapp import PrivacyConfig as FlowerPrivacy
from flwr.supercore.privacy_accounting import GaussianPrivacyEvent
from scipy import stats

from clients import secure_handlers
from copra_fl.adapters.state import Layout, Update, norm
from copra_fl.aggregation.accounting import Release, epsilon, epsilon_of_participants
from copra_fl.aggregation.discrete_gaussian import (
    BASE,
    DEVIATION,
    FACTORS,
    LARGEST_NOISE,
    TAIL,
    discrete_gaussian,
    thresholds,
)
from copra_fl.aggregation.private_sums import noise_multiplier, private_scale, private_sum, private_vector
from copra_fl.config import Config, PrivacyConfig
from copra_fl.secure_aggregation import server
from copra_fl.secure_aggregation.errors import SecureAggregationError
from server import sampling
from server.errors import FederationError
from server.privacy_budget import read_ledger
from tests.support import rounds
from tests.support.federations import final_adapter, journal
from tests.support.local_grid import run_federation
from tests.support.secure import SecureRound
from tests.support.tiny import Settings
from tests.test_privacy import gaussian_epsilon
from tests.test_secure_federation import SecureGrid

PRIVACY = PrivacyConfig(secure_aggregation=True, dp_clip=0.5, dp_noise_multiplier=1.5)

# ---------------------------------------------------------------- discrete Gaussian


def test_the_table_is_the_discrete_gaussian_up_to_the_stated_share() -> None:
    """Total variation distance to the exact probabilities, with 60 digits and twice the table's range."""
    with localcontext(prec=60):
        weights = {k: (-Decimal(k * k) / (2 * BASE**2)).exp() for k in range(-2 * TAIL, 2 * TAIL + 1)}
        total = sum(weights.values())
        ends = [0, *map(int, thresholds()), 2**64]
        table = {
            k: Decimal(high - low) / 2**64
            for k, low, high in zip(range(-TAIL, TAIL + 1), ends[:-1], ends[1:], strict=True)
        }
        distance = sum(abs(weight / total - table.get(k, 0)) for k, weight in weights.items()) / 2
    assert 0 < distance < Decimal(2) ** -57


def test_base_numbers_add_up_to_a_discrete_gaussian() -> None:
    """The distribution of X_0 + 16 X_1 by convolution; the quotient with the closed form is 1 up to float64."""
    k = np.arange(-TAIL, TAIL + 1)
    base = np.exp(-(k**2) / (2 * BASE**2))
    spread = np.zeros(16 * (len(k) - 1) + 1)
    spread[::16] = base
    pmf = np.convolve(base, spread)
    y, variance = np.arange(len(pmf)) - len(pmf) // 2, BASE**2 * (1 + 16**2)
    gaussian = np.exp(-(y**2) / (2 * variance))
    inner = np.abs(y) < 6 * math.sqrt(variance)
    assert np.allclose((pmf / pmf.sum())[inner] / (gaussian / gaussian.sum())[inner], 1, rtol=0, atol=1e-12)
    assert math.isclose(DEVIATION, BASE * math.sqrt((16**12 - 1) / 255)) and FACTORS.tolist()[-1] == 16**5


@pytest.mark.parametrize("variance", [9.0, 100.0])
def test_a_discrete_gaussian_is_a_rounded_gaussian_up_to_the_stated_factor(variance: float) -> None:
    """The bound in the docstring, where it is large enough to be seen."""
    deviation = math.sqrt(variance)
    k = np.arange(int(12 * deviation) + 1)  # by symmetry
    rounded = stats.norm.sf(k - 0.5, scale=deviation) - stats.norm.sf(k + 0.5, scale=deviation)
    discrete = np.exp(-(k**2) / (2 * variance)) / math.sqrt(2 * math.pi * variance)  # up to 2 exp(-2 pi^2 variance)
    assert (rounded / discrete > math.exp(-1 / (8 * variance)) * (1 - 1e-9)).all()
    assert (rounded / discrete < np.cosh(k / (2 * variance)) * (1 + 1e-9)).all()
    assert math.cosh(12 / (2 * DEVIATION)) - 1 < 2**-45


def test_noise_comes_from_the_given_bytes_and_has_its_distribution() -> None:
    assert discrete_gaussian(2, bytes).tolist() == [-LARGEST_NOISE] * 2
    assert discrete_gaussian(1, lambda count: b"\xff" * count).tolist() == [LARGEST_NOISE]
    fixed = np.random.default_rng(5)
    noise = discrete_gaussian(100_000, fixed.bytes)
    assert noise.dtype == np.int64
    assert stats.kstest(noise / DEVIATION, "norm").pvalue > 1e-6
    assert stats.chisquare(np.bincount(noise % 16, minlength=16)).pvalue > 1e-6, "the last digit is uniform"
    assert (discrete_gaussian(50) != discrete_gaussian(50)).any(), "the operating system's numbers"


# ---------------------------------------------------------------- the sum of the nodes

START = {"x": torch.zeros(100, 150), "y": torch.ones(5000)}


@pytest.mark.parametrize(("num_nodes", "threshold"), [(2, 2), (5, 4), (9, 6)])
@pytest.mark.parametrize("colluding", [0, 1])
def test_the_sum_of_all_nodes_and_of_the_fewest_has_the_stated_variance(
    num_nodes: int, threshold: int, colluding: int
) -> None:
    """Chi-squared bounds at odds of 1e-7 for 20 000 values; the fewest have the wanted noise without the colluding."""
    roster = server.list_nodes("run", 1, threshold / num_nodes, SecureRound(num_nodes).offer())
    num_honest = roster.num_honest(colluding)
    assert num_honest == threshold - colluding
    scale = private_scale(PRIVACY, num_honest)
    vectors = [private_vector(START, [], 0.5, scale, num_nodes) for _ in range(num_nodes)]
    for number in (num_nodes, threshold, threshold - colluding):
        total = np.sum(vectors[:number], axis=0, dtype=np.uint64)
        noise = Layout.by_name(START).flatten(private_sum(total, START, 0, scale)).numpy()
        wanted = (1.5 * 0.5) ** 2 * number / (threshold - colluding)
        low, high = stats.chi2.ppf([1e-7, 1 - 1e-7], len(noise))
        assert low < float((noise**2).sum()) / wanted < high
        assert noise_multiplier(PRIVACY, num_honest, number) == pytest.approx(math.sqrt(wanted) / 0.5)
    assert noise_multiplier(PRIVACY, num_honest, num_honest) == 1.5


@pytest.mark.parametrize(
    ("num_nodes", "threshold", "by_colluding"),
    [
        (3, 2, {0: 2, 1: 1}),  # two lists with two signatures each share one signer
        (10, 7, {0: 7, 1: 6, 3: 4, 4: 1, 6: 1}),
        (20, 20, {0: 20, 4: 16, 5: 1}),  # the graph is made for 1/5
    ],
)
def test_shares_count_for_the_smallest_sum_that_a_lying_server_gets(
    num_nodes: int, threshold: int, by_colluding: dict[int, int]
) -> None:
    roster = server.list_nodes("run", 1, threshold / num_nodes, SecureRound(num_nodes).offer())
    assert {number: roster.num_honest(number) for number in by_colluding} == by_colluding
    reason = f"dp-colluding-nodes = {threshold} must be less than the {threshold} nodes that a sum has at least"
    with pytest.raises(SecureAggregationError, match=reason):
        roster.num_honest(threshold)


def test_the_private_sum_is_that_of_the_clipped_changes_and_the_noise() -> None:
    """By way of the masks, with one node missing; the oracle is float64 arithmetic over the single clients."""
    start = rounds.random_adapter(99)
    clients = [rounds.update(k, rounds.random_adapter(k), 10 + k, [(1, 1), (1, 0), (0, 0)][k % 3]) for k in range(6)]
    cohorts: list[list[Update]] = [clients[:2], clients[2:5], [], clients[5:]]
    scale, drawn = private_scale(PRIVACY, 3), list[np.ndarray]()

    def noise(count: int) -> np.ndarray:
        drawn.append(discrete_gaussian(count))
        return drawn[-1]

    vectors = {i: private_vector(start, updates, 0.5, scale, 4, noise) for i, updates in enumerate(cohorts)}
    total, summed = SecureRound(4, {3: [0]}).total(vectors)
    assert summed == [1, 2, 3]
    adapter = private_sum(total, start, 4, scale)
    expected = sum(drawn[1:]) / scale  # type: ignore[operator]
    for update in clients[2:]:
        change = {name: update.adapter.get(name, old).double() - old.double() for name, old in sorted(start.items())}
        factor = min(1, 0.5 / math.sqrt(sum(float((tensor**2).sum()) for tensor in change.values())))
        expected = expected + factor * torch.cat([tensor.flatten() for tensor in change.values()]).numpy()
    error = np.abs(Layout.by_name(start).flatten(adapter).numpy() - expected).max()
    assert 0 < error < 4 / scale < 1e-6 * 0.75, "a unit for each client"
    with pytest.raises(SecureAggregationError, match="is of 4 clients, but 6 report"):
        private_sum(total, start, 6, scale)


def test_without_noise_one_client_moves_the_sum_by_its_clip_at_most() -> None:
    stream = torch.Generator().manual_seed(3)
    huge = {name: 1e6 * torch.randn(tensor.shape, generator=stream) for name, tensor in START.items()}
    scale = private_scale(PRIVACY, 2)
    total = private_vector(
        START, [Update(0, huge, 1, (), {})], 0.5, scale, 2, lambda count: np.zeros(count, dtype=np.int64)
    )
    assert 0.5 * (1 - 1e-5) < norm(private_sum(total, START, 1, scale)) <= 0.5
    assert int((total[1:].view(np.int64).astype(object) ** 2).sum()) <= (0.5 * scale) ** 2, "in exact numbers"


def test_numbers_that_do_not_work_are_refused() -> None:
    scale = private_scale(PrivacyConfig(dp_clip=1.0, dp_noise_multiplier=1e-12), 2)
    for updates in ([rounds.update(0, START, 1)], [rounds.update(client, START, 1) for client in range(10)]):
        with pytest.raises(SecureAggregationError, match="dp-noise-multiplier is so small that dp-clip does not fit"):
            private_vector(START, updates, 1.0, scale, 2)
    with pytest.raises(SecureAggregationError, match="a client is in the round twice"):
        private_vector(START, [rounds.update(0, START, 1)] * 2, 0.5, private_scale(PRIVACY, 2), 2)
    with pytest.raises(SecureAggregationError, match="does not fit"):
        private_vector(START, [rounds.update(0, START, 1)], 1.0, math.nan, 2)


# ---------------------------------------------------------------- accounting


def test_towards_the_server_the_client_that_was_sampled_most_often_counts() -> None:
    """Client 3 was in two rounds with z = 0.8 and one with z = 2: closed form of one Gaussian mechanism."""
    charges = [([1, 3], 0.8), ([3], 0.8), ([], 0.8), ([3, 4], 2.0), ([4], 2.0)]
    expected = gaussian_epsilon((2 / 0.8**2 + 1 / 2.0**2) ** -0.5, 1, 1e-5)
    assert epsilon_of_participants(charges, 1e-5) == pytest.approx(expected, rel=2e-3)
    assert epsilon_of_participants([([], 1.0)], 1e-5) == 0.0


@pytest.mark.parametrize(("sampled", "z", "number"), [(60, 1.0, 20), (3, 0.8, 100), (1000, 4.0, 30)])
def test_epsilon_is_below_that_of_flowers_accountant(sampled: int, z: float, number: int) -> None:
    """Another composition (Renyi divergences) of the same events is an upper bound, and not far above."""
    settings: dict[str, Any] = {
        "target_delta": 1e-5, "population_size": 1000, "sampling_method": SamplingMethod.POISSON,
        "neighboring_relation": NeighboringRelation.ADD_OR_REMOVE_ONE,
    }  # fmt: skip
    accountant = RdpAccountant(FlowerPrivacy(**settings))
    accountant.compose(GaussianPrivacyEvent(noise_multiplier=z, sample_size=sampled, population_size=1000), number)
    bound = accountant.get_epsilon(1e-5)
    spent = epsilon([Release(sampled / 1000, z)] * number, 1e-5)
    assert 0.3 * bound < spent < bound


def test_a_private_round_waits_for_everybody_who_was_sampled() -> None:
    private = Config.from_flat({"dp-clip": 1.0, "weighting": "equal", "num-clients": 9, "clients-per-round": 3})
    assert sampling.num_wanted(private, 9, 5) == 5
    assert sampling.num_wanted(private.changed(dp_clip=0.0), 9, 5) == 3


# ---------------------------------------------------------------- whole runs


class LyingGrid(SecureGrid):
    """Adds a scale to the training messages, as they had until 0.1.0, which would make the noise far too small."""

    def answer(self, message: Message) -> Message:
        if message.metadata.message_type == "train":
            message.content["secure-scale"] = ConfigRecord({"scale": 2.0**60})
        return super().answer(message)


@pytest.fixture
def private(tiny: Settings) -> Settings:
    """Six clients on three nodes."""
    return tiny | {
        "secure-aggregation": True, "dp-clip": 0.02, "dp-noise-multiplier": 0.8, "weighting": "equal", "num-rounds": 1,
        "clients-per-round": 3, "local-steps": 1, "client-eval-examples": 4, "updates": "pooled", "path-pairs": 0,
        "merge-gap-clients": 0, "max-update-ratio": 0.0,
    }  # fmt: skip


def sample_two(count: int) -> np.ndarray:
    """Draw numbers with which clients 0 and 1 of six are sampled."""
    return np.array([0.1, 0.2] + [0.9] * (count - 2))


def test_a_run_publishes_the_noisy_sum_and_the_server_sees_no_other(
    private: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of six clients are in the round; the third node adds noise only. The scale in the messages is wrong."""
    vectors: list[np.ndarray] = []
    plain: list[np.ndarray] = []
    starts: list[dict[str, torch.Tensor]] = []

    def recorded(start: dict[str, torch.Tensor], updates: Sequence[Update], *others: Any) -> np.ndarray:
        starts.append(start)
        zeros = private_vector(start, updates, *others, lambda count: np.zeros(count, dtype=np.int64))
        plain.extend([zeros[1:].view(np.int64) / others[1]] if updates else [])
        vectors.append(private_vector(start, updates, *others))
        return vectors[-1]

    monkeypatch.setattr(secure_handlers, "private_vector", recorded)
    monkeypatch.setattr(sampling, "uniforms", sample_two)
    grid = LyingGrid(3)
    directory = run_federation(private, tmp_path / "run", grid=grid)
    (row,) = journal(directory)
    assert [client["client"] for client in row["clients"]] == [0, 1] and len(vectors) == 3 and len(plain) == 2
    assert row["notes"]["secure_aggregation"] == {
        "nodes": [0, 1, 2], "dropped": [], "refused": [], "noise_multiplier": pytest.approx(0.8 * math.sqrt(3)),
    }  # fmt: skip

    total = np.sum([vector[1:] for vector in vectors], axis=0, dtype=np.uint64).view(np.int64)
    change = total / private_scale(Config.from_flat(private).privacy, 1) / 3
    published = Layout.by_name(starts[0]).flatten(final_adapter(directory)).double().numpy()
    before = Layout.by_name(starts[0]).flatten(starts[0]).double().numpy()
    assert np.abs(published - before - change).max() < 1e-7
    apart = change * 3 - sum(plain)
    low, high = stats.chi2.ppf([1e-7, 1 - 1e-7], len(apart))
    assert low < (apart**2).sum() / (0.8**2 * 3 * 0.02**2) < high, "three shares, of which one would do"

    received = b"".join(
        array.data for reply in grid.received for record in reply.content.array_records.values()
        for array in record.values()
    ) + repr([reply.content for reply in grid.received]).encode()  # fmt: skip
    assert any("masked" in reply.content.array_records for reply in grid.received)
    for secret in (*plain, *(vector[1:] for vector in vectors)):
        moved = secret[np.abs(secret) > 0]
        for kind in (moved.dtype, np.float32):
            text = moved.astype(kind).tobytes()
            pieces = [text[place : place + 16] for place in range(0, len(text) - 16, 16)]
            assert len(pieces) > 20 and not any(piece in received for piece in pieces)

    reported = [dict(reply.content.metric_records[f"metrics-{client}"]) for reply in grid.received
                for client in (0, 1) if "masked" in reply.content and f"metrics-{client}" in reply.content]  # fmt: skip
    assert [set(metrics) for metrics in reported] == [{"num-examples", "active-steps", "steps", "seconds"}] * 2
    assert row["train_loss"] is None and {client["loss"] for client in row["clients"]} == {None}
    assert row["privacy"]["epsilon"] == pytest.approx(epsilon([Release(0.5, 0.8)], 1e-5))
    assert row["privacy"]["server_epsilon"] == pytest.approx(gaussian_epsilon(0.8, 1, 1e-5), rel=2e-3)
    (line,) = read_ledger(directory / "privacy.jsonl")
    assert line.clients == (0, 1) and line.server_epsilon == row["privacy"]["server_epsilon"]


def test_a_round_is_charged_when_the_server_can_read_its_sum(
    private: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fails before anybody has revealed a share, then after that, and is then done; nobody is sampled there."""
    flat, ledger = private | {"failures": "tolerant"}, tmp_path / "run" / "privacy.jsonl"
    drawn: list[np.ndarray] = []
    real = secure_handlers.private_vector
    monkeypatch.setattr(secure_handlers, "private_vector", lambda *args: drawn.append(vector := real(*args)) or vector)
    monkeypatch.setattr(sampling, "uniforms", np.ones)
    for step, reason, num_lines in (
        ("query.survivors", "1 of 3 nodes have signed the list of survivors; 2 are needed", 0),
        ("query.unmask", "1 shares of the seed of node 0 have been revealed; 2 are needed", 1),
    ):
        with pytest.raises(FederationError, match=reason):
            run_federation(flat, tmp_path / "run", grid=SecureGrid(3, {step: [0, 1]}))
        assert (len(read_ledger(ledger)) if ledger.exists() else 0) == num_lines
    monkeypatch.setattr(sampling, "uniforms", sample_two)
    (row,) = journal(run_federation(flat, tmp_path / "run", grid=SecureGrid(3)))
    assert [line.clients for line in read_ledger(ledger)] == [(), (0, 1)]
    assert row["privacy"]["epsilon"] == pytest.approx(epsilon([Release(0.5, 0.8)] * 2, 1e-5))
    assert row["privacy"]["server_epsilon"] == pytest.approx(gaussian_epsilon(0.8, 1, 1e-5), rel=2e-3)
    assert len({vector[1:].tobytes() for vector in drawn}) == len(drawn) == 9, "new noise in every vector"
