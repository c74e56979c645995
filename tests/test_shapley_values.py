"""Shapley values against their definition: all orders of small games, and what must hold for every game."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

from copra_fl.probes.shapley_values import Value, exact, from_orders, gini, sample, top_third
from copra_fl.seeding import generator


def table_game(players: int, seed: int) -> Value:
    """A game whose coalitions have independent random values."""
    table = generator(seed, "game").normal(size=2**players)
    return lambda coalitions: table[coalitions @ (1 << np.arange(players))]


def by_definition(value: Value, players: int) -> list[float]:
    """The mean over all orders of what a player adds to those before it, one coalition at a time."""
    totals, orders = [0.0] * players, list(permutations(range(players)))
    for order in orders:
        inside = np.zeros((1, players), dtype=bool)
        for player in order:
            before = float(value(inside)[0])
            inside[0, player] = True
            totals[player] += float(value(inside)[0]) - before
    return [total / len(orders) for total in totals]


@pytest.mark.parametrize("players", [1, 2, 3, 5])
def test_enumeration_is_the_mean_over_all_orders(players: int) -> None:
    game = table_game(players, seed=players)
    found = exact(game, players)
    assert found.values == pytest.approx(by_definition(game, players))
    assert found.efficiency_error == pytest.approx(0, abs=1e-12)
    assert not found.errors.any() and len(found.orders) == 0


def test_a_game_by_hand() -> None:
    """Gloves: one left (player 0), two right ones; a pair is worth 1. The left glove has 2/3, each right one 1/6."""
    found = exact(lambda inside: (inside[:, 0] & (inside[:, 1] | inside[:, 2])).astype(float), 3)
    assert found.values == pytest.approx([2 / 3, 1 / 6, 1 / 6])
    assert (found.nothing, found.everything) == (0.0, 1.0)


def test_an_additive_game_gives_each_its_own() -> None:
    """From one pair of orders already, and without any error."""
    worth = np.array([0.5, -2.0, 0.0, 3.25])
    game: Value = lambda inside: 7 + inside @ worth  # noqa: E731
    assert exact(game, 4).values == pytest.approx(worth)
    sampled = sample(game, 4, generator(0, "orders"), standard_error=1e-9)
    assert sampled.values == pytest.approx(worth)
    assert sampled.errors.max() < 1e-12


def test_null_and_symmetric_players() -> None:
    """1 and 2 are alike, 3 adds nothing anywhere."""
    found = exact(lambda inside: np.sqrt(inside[:, 0] + 2.0 * inside[:, 1] + 2.0 * inside[:, 2]), 4)
    assert found.values[3] == pytest.approx(0)
    assert found.values[1] == pytest.approx(found.values[2])
    assert found.values[1] > found.values[0] > 0


def test_all_orders_as_a_sample_are_exact() -> None:
    game = table_game(4, seed=1)
    found = from_orders(game, np.array(list(permutations(range(4)))))
    assert found.values == pytest.approx(exact(game, 4).values)


def test_the_estimate_is_within_its_error_of_the_exact_values() -> None:
    """12 players in pairs that need each other: chi-squared over the players, and over 20 streams."""
    weights = generator(3, "weights").normal(size=(12, 12))
    game: Value = lambda inside: np.tanh(np.einsum("ni,ij,nj->n", inside, weights, inside) / 12)  # noqa: E731
    truth = exact(game, 12).values
    scores = []
    for seed in range(20):
        found = sample(game, 12, generator(seed, "orders"), standard_error=0.02)
        assert found.errors.max() <= 0.02
        assert found.efficiency_error == pytest.approx(0, abs=1e-12)
        scores.append((found.values - truth) / found.errors)
    assert np.abs(np.mean(scores)) < 0.1
    assert 0.8 < np.sqrt(np.mean(np.square(scores))) < 1.2


def test_a_wanted_error_that_is_not_reached_is_said() -> None:
    found = sample(table_game(6, seed=0), 6, generator(0, "orders"), standard_error=1e-6, max_pairs=20)
    assert found.orders.shape == (20, 6)
    assert found.errors.max() > 1e-6


def test_coalitions_are_asked_for_together_and_once() -> None:
    asked: list[np.ndarray] = []

    def game(inside: np.ndarray) -> np.ndarray:
        asked.append(inside)
        return inside.sum(1).astype(float)

    sample(game, 3, generator(0, "orders"), standard_error=1.0)
    (coalitions,) = asked
    assert len(np.unique(coalitions, axis=0)) == len(coalitions) <= 8


def test_concentration_by_hand() -> None:
    assert top_third(np.array([4.0, 1.0, 1.0, -2.0, 1.0, 1.0])) == pytest.approx(0.6)  # 4 and 2 of 10
    assert top_third(np.array([0.0, 5.0, 0.0, 0.0])) == 1.0
    assert top_third(np.zeros(6)) == pytest.approx(1 / 3)
    assert gini(np.array([2.0, -2.0, 2.0])) == 0.0
    assert gini(np.array([0.0, 0.0, 0.0, 8.0])) == pytest.approx(0.75)  # 1 - 1/n where one has all
    assert gini(np.array([1.0, 3.0])) == pytest.approx(0.25)  # mean difference 1 over twice the mean 2
    assert gini(np.zeros(3)) == 0.0
