"""The work of a run and its cost until an accuracy, by hand; the tables, curves and sentences of a report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from copra_fl.config import Config
from copra_fl.records import ClientRecord, Evaluation, Passes, RoundRecord, Tier
from copra_fl.reporting import work
from copra_fl.reporting.figures.cost import accuracy_for_cost
from copra_fl.reporting.report import render
from copra_fl.reporting.results import Run, load_comparison
from copra_fl.reporting.statistics import summarize
from copra_fl.reporting.tables import barrier_note, early_ends, merge_gap_note, target_table, work_table
from tests.support.run_folders import write_comparison

#: client -> training examples
EXAMPLES = {0: 30, 1: 60}


def round_of(number: int, clients: list[int], accuracy: float | None, flops: float | None = 3e9) -> RoundRecord:
    """Return a round of 5 steps, 10 bytes up and 100 down, and `flops` operations of each client."""
    return RoundRecord(
        round=number,
        seconds=1,
        bytes_up=10,
        bytes_down=100,
        train_loss=1.0,
        layers=("layer.0",),
        clients=tuple(
            ClientRecord(
                client=c, examples=EXAMPLES[c], active_steps=(5,), loss=1, steps=5, seconds=1, distance=1, flops=flops
            )
            for c in clients
        ),
        missing=(),
        validation=None if accuracy is None else Evaluation(loss=1, accuracy=accuracy, examples=10),
    )


def run_of(seed: int, accuracies: list[float | None], **settings: float) -> Run:
    """Return a run with both clients in every round."""
    journal = [round_of(number, [0, 1], accuracy) for number, accuracy in enumerate(accuracies, start=1)]
    return Run(Path(f"seed{seed}"), Config().changed(seed=seed, **settings), journal, None, None)


def test_passes_are_steps_times_batch_by_examples() -> None:
    """5 steps of 3 micro-batches of 4: 60 examples a round. Client 0 has 30 and two rounds, client 1 has 60 and one."""
    journal = [round_of(1, [0, 1], None), round_of(2, [0], None)]
    config = Config().changed(batch_size=4, gradient_accumulation=3)
    assert work.passes(config, journal) == Passes(mean=2.5, lowest=1.0, highest=4.0)
    assert work.passes(config.changed(local_epochs=2), journal) == Passes(mean=3.0, lowest=2.0, highest=4.0)
    assert work.mean_steps(journal) == 7.5
    assert work.passes(config, []) is None
    assert work.passes(config.changed(engine="trainer"), journal) is None, "the script decides on the batch"


def test_work_by_depth_is_a_mean_over_clients_and_rounds() -> None:
    """Client 0 trains one layer, in both rounds; client 1 trains all three, in the second."""
    shallow = Tier(depth=1, clients=(0,), seconds=2, memory=10)
    first = round_of(1, [0], None).model_copy(update={"tiers": (shallow,)})
    deep = Tier(depth=3, clients=(1,), seconds=6, memory=30)
    second = round_of(2, [0, 1], None, flops=5e9).model_copy(
        update={"tiers": (shallow.model_copy(update={"seconds": 4, "memory": 20}), deep)}
    )
    run = Run(Path("run"), Config(), [first, second], None, None)
    assert work.work_by_depth([run]) == [(3, 1.0, 6.0, 30.0, 5e9), (1, 1.0, 3.0, 15.0, 4e9)]
    unknown = Run(
        Path("run"), Config(), [round_of(1, [0], None, flops=None).model_copy(update={"tiers": (shallow,)})], None, None
    )
    assert work.work_by_depth([unknown]) == [(1, 1.0, 2.0, 10.0, None)]
    assert work.work_by_depth([run_of(0, [None])]) == []


def test_operations_of_a_journal_that_lacks_some_are_unknown() -> None:
    assert work.flops([round_of(1, [0, 1], None), round_of(2, [0], None)]) == 9e9
    assert work.flops([round_of(1, [0, 1], None), round_of(2, [0], None, flops=None)]) is None


def test_a_curve_has_the_rounds_that_all_seeds_evaluated() -> None:
    """Round 2 of seed 1 was not evaluated, and seed 0 ended in round 3."""
    curve = work.curve([run_of(0, [0.1, 0.2, 0.3]), run_of(1, [0.3, None, 0.5, 0.6])])
    assert curve is not None
    assert curve.rounds == (1, 3)
    assert curve.accuracy == pytest.approx((0.2, 0.4))
    assert (curve.lowest, curve.highest) == ((0.1, 0.3), (0.3, 0.5))
    assert (curve.bytes_up, curve.bytes, curve.flops) == ((10, 30), (110, 330), (6e9, 18e9))
    assert work.curve([run_of(0, [None])]) is None and work.curve([]) is None


def test_the_cost_of_a_target_ends_with_the_first_evaluation_that_reaches_it() -> None:
    """Seed 0 reaches the baseline's 0.3 in round 2, then falls; seed 1 never reaches 0.6; seed 2 has no baseline."""
    goals = work.targets([run_of(0, [0.5, 0.3]), run_of(1, [0.2, 0.6])])
    assert goals == {0: 0.3, 1: 0.6}
    cost = work.cost_to_target([run_of(0, [0.1, 0.3, 0.2]), run_of(1, [0.1, 0.5]), run_of(2, [0.9])], goals)
    assert (cost.seeds, cost.targets, cost.rounds) == ((0, 1), (0.3, 0.6), (2, None))
    assert (cost.bytes_up, cost.bytes, cost.flops) == ((20, None), (220, None), (12e9, None))
    assert work.targets([run_of(0, [0.5], target_accuracy=0.4)]) == {0: 0.4}


def test_the_tables_of_a_report(tmp_path: Path) -> None:
    """150 steps of 16 in 3 rounds are 7200 examples; client 0 has 1000, client 7 has 176 with seed 0."""
    folder = write_comparison(tmp_path / "two", [0, 1])
    summary = summarize(load_comparison(folder))
    shown = work_table(summary)
    assert shown.header[:7] == [
        "method", "rounds", "steps per client", "passes over own data", "lowest client", "highest client",
        "TFLOPs of training",
    ]  # fmt: skip
    lora = dict(zip(shown.header, shown.rows[0], strict=True))
    assert (lora["rounds"], lora["TFLOPs of training"]) == ("3", "23.5")  # seed 1 lacks a client in one round
    assert summary.methods["lora"].get("passes_lowest").values[0] == pytest.approx(7200 / 1000)
    assert summary.methods["lora"].get("passes_highest").values[0] == pytest.approx(7200 / 176)
    (target,) = target_table(summary)
    assert [row[:3] for row in target.rows] == [["lora", "2 of 2", "3"], ["copra", "2 of 2", "2"]]
    assert "the validation accuracy that lora ends with, paired by seed" in target.caption
    assert [figure.title for figure in accuracy_for_cost(summary)] == [
        "Accuracy against MB up", "Accuracy against MB up and down", "Accuracy against operations",
    ]  # fmt: skip


def test_a_journal_of_an_earlier_version_is_shown_without_what_it_lacks(tmp_path: Path) -> None:
    folder = write_comparison(tmp_path / "old", [0])
    for path in folder.glob("*/journal.jsonl"):
        records = [json.loads(line) for line in path.read_text().splitlines()]
        for record in records:
            del record["ended_early"], record["aggregation_error"]["of_change"]
            for client in record["clients"]:
                del client["flops"]
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    for path in folder.glob("*/summary.json"):
        late = ("ended_early", "passes", "flops", "aggregation_error_of_change")
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k not in late}))
    comparison = load_comparison(folder)
    summary = summarize(comparison)
    header = work_table(summary).header
    assert "TFLOPs of training" not in header and "passes over own data" in header
    assert [figure.title for figure in accuracy_for_cost(summary)] == [
        "Accuracy against MB up",
        "Accuracy against MB up and down",
    ]
    assert "% of the change" not in render(comparison, summary)


def test_early_ends_are_named_with_round_and_reason(tmp_path: Path) -> None:
    folder = write_comparison(tmp_path / "two", [0, 1])
    for seed, rounds in ((0, 2), (1, 3)):
        path = folder / f"copra-seed{seed}" / "summary.json"
        ended = {"rounds": rounds, "ended_early": "no improvement in 2 evaluations"}
        path.write_text(json.dumps(json.loads(path.read_text()) | ended))
    comparison = load_comparison(folder)
    sentence = "copra ended early: seed 0 in round 2 and seed 1 in round 3 (no improvement in 2 evaluations)."
    assert early_ends(summarize(comparison)) == [sentence]
    assert sentence in render(comparison, summarize(comparison))


def test_limits_of_merge_gap_and_barrier_are_named() -> None:
    settings = {"merge-gap-clients": 3, "num-clients": 50, "fraction-clients": 0.2, "clients-per-round": 0}
    assert merge_gap_note(settings) == " The merge gap is that of 3 of the 10 clients of a round."
    assert (
        merge_gap_note(settings | {"clients-per-round": 2})
        == " The merge gap is that of 2 of the 2 clients of a round."
    )
    assert merge_gap_note(settings | {"merge-gap-clients": 0}) == merge_gap_note({}) == ""
    assert " of 5 points of a line, ends included, so it is never below 0" in barrier_note(
        {"path-pairs": 2, "path-points": 5}
    )
    assert barrier_note({"path-pairs": 0, "path-points": 5}) == ""
