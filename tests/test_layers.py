"""The layers of a round: the cycle by hand, the random draws by their counts."""

from __future__ import annotations

import numpy as np
import pytest

from copra_fl.config import Config, ConfigError
from copra_fl.copra.layers import check_layers, trained_layers


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
