"""The early end of a run: the rule by hand, and a run that ends, is killed before its summary, and is resumed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from copra_fl.config import Config
from copra_fl.records import RoundRecord, RunSummary
from copra_fl.tensor_files import read_tensors
from server.early_end import end_reason, reason_to_end
from tests.support.federations import StoppingGrid, assert_equal, final_adapter, journal
from tests.support.local_grid import run_federation
from tests.support.tiny import Settings


@pytest.mark.parametrize(
    ("settings", "accuracies", "reason"),
    [
        ({}, [0.5, 0.4, 0.3, 0.2], None),
        ({"patience": 2}, [], None),
        ({"patience": 2}, [0.5, 0.4], None),  # one evaluation since the best
        ({"patience": 2}, [0.5, 0.4, 0.5], "no improvement in 2 evaluations"),  # equal is not better
        ({"patience": 2}, [0.5, 0.4, 0.51], None),
        ({"patience": 1}, [0.5, 0.5], "no improvement in 1 evaluation"),
        (
            {"patience": 2},
            [0.2, 0.5, 0.3, 0.4],
            "no improvement in 2 evaluations",
        ),  # better than the last, not the best
        ({"target-accuracy": 0.5}, [0.49], None),
        ({"target-accuracy": 0.5}, [0.49, 0.5], "reached target-accuracy = 0.5"),
        ({"target-accuracy": 0.5, "patience": 1}, [0.6, 0.5], "reached target-accuracy = 0.5"),
    ],
)
def test_the_rule_by_hand(settings: Settings, accuracies: list[float], reason: str | None) -> None:
    config = Config.from_flat(settings | {"num-rounds": 9})
    assert end_reason(config, len(accuracies), accuracies) == reason
    assert end_reason(config, 9, accuracies) is None, "the last of num-rounds is no early end"


def test_a_run_that_was_made_longer_ends_where_the_longer_run_would(tiny: Settings, tmp_path: Path) -> None:
    """The accuracy falls in round 2 and rises in round 4; round 3 is evaluated as the last of the shorter run only."""
    config = Config.from_flat(tiny | {"num-rounds": 6, "patience": 1, "eval-every": 2})
    (row,) = journal(run_federation(tiny | {"num-rounds": 1}, tmp_path / "run"))

    def records(*accuracies: float | None) -> list[RoundRecord]:
        return [
            RoundRecord.model_validate(
                row | {"round": number, "validation": accuracy and row["validation"] | {"accuracy": accuracy}}
            )
            for number, accuracy in enumerate(accuracies, start=1)
        ]

    assert reason_to_end(config, records(None, 0.5, 0.4)) is None, "round 3 does not count"
    assert reason_to_end(config, records(None, 0.5, 0.4, 0.6)) is None
    assert reason_to_end(config, records(None, 0.5, 0.6, 0.5)) == "no improvement in 1 evaluation"
    assert reason_to_end(config, []) is None


def test_a_run_that_ends_early_is_the_beginning_of_the_whole_run(tiny: Settings, tmp_path: Path) -> None:
    """Also if it was killed between its last round and its summary: no client trains again."""
    flat = tiny | {"num-rounds": 4, "path-pairs": 1, "path-points": 3}
    whole = run_federation(flat, tmp_path / "whole")
    accuracies = [row["validation"]["accuracy"] for row in journal(whole)]
    target = sorted(accuracies[:3])[1]  # of the first three rounds, the middle one reaches it at the latest
    last = next(number for number, accuracy in enumerate(accuracies, start=1) if accuracy >= target)
    assert last < 4

    short = run_federation(flat | {"target-accuracy": target}, tmp_path / "short")
    assert [row["round"] for row in journal(short)] == list(range(1, last + 1))
    assert_equal(final_adapter(short), read_tensors(whole / f"checkpoints/round-{last:05d}.safetensors")[0])
    summary = RunSummary.from_json((short / "summary.json").read_text())
    assert (summary.rounds, summary.ended_early) == (last, f"reached target-accuracy = {target:g}")
    assert [row["ended_early"] for row in journal(short)] == [None] * (last - 1) + [summary.ended_early]
    assert len(summary.paths) == 1, "the lines between clients are measured in the round in which it ends"
    assert journal(whole)[-1]["ended_early"] is None

    (short / "summary.json").unlink()
    run_federation(flat | {"target-accuracy": target}, short, grid=StoppingGrid(2, messages=0))
    resumed = json.loads((short / "summary.json").read_text())
    timed = ("seconds",)
    assert {k: v for k, v in resumed.items() if k not in timed} == {
        k: v for k, v in summary.model_dump(mode="json").items() if k not in timed
    }
