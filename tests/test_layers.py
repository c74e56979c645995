"""The layers of a round: the cycle by hand, the random draws by their counts."""

from __future__ import annotations

import numpy as np
import pytest

from copra_fl.config import Config, ConfigError
from copra_fl.copra.layers import by_depth, check_layers, client_depths, deep_enough, trained_layers


def layers(server_round: int, client: int = 0, num_groups: int = 6, **flat: object) -> list[int]:
    config = Config.from_flat({key.replace("_", "-"): value for key, value in flat.items()})
    return trained_layers(config, num_groups, server_round, client).tolist()


def test_by_default_all_layers_are_trained() -> None:
    assert layers(3) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("flat", "expected"),
    [
        ({"layers_per_round": 2}, [[0, 1], [2, 3], [4, 5], [0, 1]]),
        ({"layers_per_round": 4}, [[0, 1, 2, 3], [0, 1, 4, 5], [2, 3, 4, 5], [0, 1, 2, 3]]),
        ({"layers_per_round": 3, "rounds_per_layer": 2}, [[0, 1, 2], [0, 1, 2], [3, 4, 5], [3, 4, 5], [0, 1, 2]]),
        (
            {"layers_per_round": 3, "full_rounds": 2},
            [[0, 1, 2, 3, 4, 5]] * 2 + [[0, 1, 2], [3, 4, 5]] + [[0, 1, 2, 3, 4, 5]] * 2 + [[0, 1, 2]],
        ),
    ],
)
def test_the_cycle_goes_from_bottom_to_top(flat: dict[str, object], expected: list[list[int]]) -> None:
    for number, chosen in enumerate(expected, start=1):
        assert layers(number, client=number, layer_selection="cycle", **flat) == chosen


def test_random_layers_are_exactly_m_and_each_equally_likely() -> None:
    draws = [layers(server_round, client, layers_per_round=2) for server_round in range(60) for client in range(50)]
    assert all(len(set(chosen)) == 2 and chosen == sorted(chosen) for chosen in draws)
    frequencies = np.bincount(np.concatenate(draws), minlength=6) / len(draws)
    assert frequencies == pytest.approx([2 / 6] * 6, abs=0.035)
    assert len({tuple(chosen) for chosen in draws}) == 15, "6 choose 2"


def test_shared_masks_have_shared_layers() -> None:
    shared = [layers(1, client, layers_per_round=2, mask_scope="shared") for client in range(10)]
    assert shared == [shared[0]] * 10
    assert layers(2, 0, layers_per_round=2, seed=1) == layers(2, 0, layers_per_round=2, seed=1)


def test_more_layers_than_the_model_has_are_refused() -> None:
    config = Config.from_flat({"layers-per-round": 7})
    check_layers(config, 7)
    with pytest.raises(ConfigError, match="layers-per-round = 7 is more than the 6 layers of the model"):
        check_layers(config, 6)


TIERS = {"client-depths": "2,2,2,2,2,2,3,3,3,6", "depth-assignment": "drawn", "num-clients": 400, "seed": 5}


def test_a_client_trains_its_last_layers() -> None:
    for client, expected in enumerate([[5], [3, 4, 5], [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]]):
        for server_round in (1, 2):
            assert layers(server_round, client, client_depths="1,3,6,9") == expected


def test_allocated_layers_are_drawn_anew_for_each_client_and_round() -> None:
    drawn = [[layers(r, c, client_depths="1,3,6", depth_allocation="random") for c in range(3)] for r in range(40)]
    assert all([len(chosen) for chosen in clients] == [1, 3, 6] for clients in drawn)
    assert len({tuple(clients[1]) for clients in drawn}) > 8
    assert {clients[0][0] for clients in drawn} == set(range(6)), "the weakest clients reach every layer"


def test_depths_are_drawn_in_the_proportions_of_the_list() -> None:
    config = Config.from_flat(TIERS)
    tiers = by_depth(config, range(400))
    assert list(tiers) == [2, 3, 6] and sorted(sum(tiers.values(), [])) == list(range(400))
    assert [len(clients) / 400 for clients in tiers.values()] == pytest.approx([0.6, 0.3, 0.1], abs=0.06)
    assert by_depth(Config.from_flat({"num-clients": 3}), [2, 0]) == {0: [2, 0]}


def test_a_repeated_list_gives_exact_shares() -> None:
    flat = {"client-depths": "6,2,3", "depth-assignment": "repeated", "num-clients": 7}
    assert client_depths(Config.from_flat(flat)) == [6, 2, 3, 6, 2, 3, 6]


def test_min_depth_leaves_weak_clients_out() -> None:
    config = Config.from_flat(TIERS | {"min-depth": 3})
    admitted = deep_enough(config, range(400))
    assert admitted == [client for client, depth in enumerate(client_depths(config)) if depth >= 3]
    assert deep_enough(Config(), [4, 2]) == [4, 2]
    nobody = Config.from_flat(TIERS | {"min-depth": 6, "num-clients": 2})
    with pytest.raises(ConfigError, match="min-depth = 6 leaves all 2 clients out: they drew the depths"):
        check_layers(nobody, 6)
