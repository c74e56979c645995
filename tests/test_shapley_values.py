"""Shapley values against their definition, by hand for small games, and their axioms."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

from copra_fl.probes.shapley_values import CharacteristicFunction, exact, from_orders, gini, sample, top_third
from copra_fl.seeding import generator


def table_game(players: int, seed: int) -> CharacteristicFunction:
    """Return a game whose coalitions have independent random values."""
    table = generator(seed, "game").normal(size=2**players)
    return lambda coalitions: table[coalitions @ (1 << np.arange(players))]


def by_definition(value: CharacteristicFunction, players: int) -> list[float]:
    """Return the mean over all orders of each player's contribution, computed one coalition at a time."""
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
    solved = exact(game, players)
    assert solved.values == pytest.approx(by_definition(game, players))
    assert solved.efficiency_error == pytest.approx(0, abs=1e-12)
    assert not solved.errors.any() and len(solved.orders) == 0


def test_a_game_by_hand() -> None:
    """Gloves: player 0 has a left one, 1 and 2 a right one each; a pair has value 1. Values: 2/3, 1/6, 1/6."""
    solved = exact(lambda inside: (inside[:, 0] & (inside[:, 1] | inside[:, 2])).astype(float), 3)
    assert solved.values == pytest.approx([2 / 3, 1 / 6, 1 / 6])
    assert (solved.empty, solved.grand) == (0.0, 1.0)


def test_an_additive_game_gives_each_player_its_summand() -> None:
    """Already from one pair of orders, and without any error."""
    summands = np.array([0.5, -2.0, 0.0, 3.25])
    game: CharacteristicFunction = lambda inside: 7 + inside @ summands  # noqa: E731
    assert exact(game, 4).values == pytest.approx(summands)
    sampled = sample(game, 4, generator(0, "orders"), standard_error=1e-9)
    assert sampled.values == pytest.approx(summands)
    assert sampled.errors.max() < 1e-12


def test_null_and_symmetric_players() -> None:
    """Players 1 and 2 are symmetric, player 3 adds nothing to any coalition."""
    solved = exact(lambda inside: np.sqrt(inside[:, 0] + 2.0 * inside[:, 1] + 2.0 * inside[:, 2]), 4)
    assert solved.values[3] == pytest.approx(0)
    assert solved.values[1] == pytest.approx(solved.values[2])
    assert solved.values[1] > solved.values[0] > 0


def test_all_orders_as_a_sample_are_exact() -> None:
    game = table_game(4, seed=1)
    solved = from_orders(game, np.array(list(permutations(range(4)))))
    assert solved.values == pytest.approx(exact(game, 4).values)


def test_estimates_deviate_from_exact_values_by_their_standard_errors() -> None:
    """12 players with pairwise interactions: over 20 streams, deviation over error is about standard normal."""
    weights = generator(3, "weights").normal(size=(12, 12))
    game: CharacteristicFunction = lambda inside: np.tanh(np.einsum("ni,ij,nj->n", inside, weights, inside) / 12)  # noqa: E731
    expected = exact(game, 12).values
    scores = []
    for seed in range(20):
        solved = sample(game, 12, generator(seed, "orders"), standard_error=0.02)
        assert solved.errors.max() <= 0.02
        assert solved.efficiency_error == pytest.approx(0, abs=1e-12)
        scores.append((solved.values - expected) / solved.errors)
    assert np.abs(np.mean(scores)) < 0.1
    assert 0.8 < np.sqrt(np.mean(np.square(scores))) < 1.2


def test_sampling_stops_at_the_largest_number_of_pairs() -> None:
    solved = sample(table_game(6, seed=0), 6, generator(0, "orders"), standard_error=1e-6, max_pairs=20)
    assert solved.orders.shape == (20, 6)
    assert solved.errors.max() > 1e-6


def test_all_coalitions_are_evaluated_in_one_call_and_once() -> None:
    calls: list[np.ndarray] = []

    def game(inside: np.ndarray) -> np.ndarray:
        calls.append(inside)
        return inside.sum(1).astype(float)

    sample(game, 3, generator(0, "orders"), standard_error=1.0)
    (coalitions,) = calls
    assert len(np.unique(coalitions, axis=0)) == len(coalitions) <= 8


def test_concentration_by_hand() -> None:
    assert top_third(np.array([4.0, 1.0, 1.0, -2.0, 1.0, 1.0])) == pytest.approx(0.6)  # 4 and 2 of 10
    assert top_third(np.array([0.0, 5.0, 0.0, 0.0])) == 1.0
    assert top_third(np.zeros(6)) == pytest.approx(1 / 3)
    assert gini(np.array([2.0, -2.0, 2.0])) == 0.0
    assert gini(np.array([0.0, 0.0, 0.0, 8.0])) == pytest.approx(0.75)  # 1 - 1/n where one has all
    assert gini(np.array([1.0, 3.0])) == pytest.approx(0.25)  # mean difference 1 over twice the mean 2
    assert gini(np.zeros(3)) == 0.0
