"""The benchmark: its counts and closed forms by hand, the equality check, stored results, the command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from copra_fl.adapters.state import Adapter, Update
from copra_fl.bench import figures, workers
from copra_fl.bench.findings import machine, tables, targets
from copra_fl.bench.flops import EncoderShape, block_backward, step_flops
from copra_fl.bench.report import render
from copra_fl.bench.runner import COMPETITORS, Competitor, Disagreement, core_splits, run_all
from copra_fl.bench.sizes import QUICK_SIZES, SIZES, STEADY_ROUNDS, TRAININGS, prepare
from copra_fl.bench.steps import (
    PASSES_PER_REPEAT,
    blocks_below,
    expected_blocks,
    mean_expected_blocks,
    rounds_of_points,
    schedule_mean,
)
from copra_fl.bench.summary import left_out, summary
from copra_fl.bench.verdict import verdict
from copra_fl.bench.workers import CoreSplit, Train
from copra_fl.cli.bench import LETTERS, bench
from copra_fl.config import Config, ConfigError, CopraConfig
from copra_fl.copra import schedule
from copra_fl.data.federated import FederatedData
from copra_fl.training.plan import Plan
from tests.support.browser import check_page, needs_chromium
from tests.support.real_runs import RealRun

#: packages that a GPU machine does not need
ABSENT = ("flwr", "flwr_datasets", "ray", "datasets", "plotly")


def test_competitors_are_chosen_by_letter_and_unknown_letters_refused() -> None:
    assert "".join(competitor.letter for competitor in COMPETITORS) == LETTERS
    with pytest.raises(ConfigError, match="--competitors 'bx': x is not one of abcBCdefg"):
        bench(competitors="bx")


def test_flops_of_one_layer_by_hand() -> None:
    """n = 2 tokens, d = 2, f = 4, r = 1, 3 classes; 2 for each multiplication and addition.

    Forward: projections 4 x 2*2*2*2 = 64, feed-forward 2 x 2*2*2*4 = 64, scores and context 2 x 2*2*2*2 = 32, two
    adapters of 2*2*2*1 + 2*2*1*2 = 16, head 2*2*3 = 12. Backward: the output projection 16 and feed-forward 64 for
    their inputs, attention's three products 48, each adapter 3 of its 4 products of 8, head 2 x 12.
    """
    encoder = EncoderShape(layers=1, width=2, intermediate=4, rank=1, classes=3)
    forward, backward = 64 + 64 + 32 + 2 * 16 + 12, 16 + 64 + 48 + 2 * 24 + 24
    assert step_flops(encoder, rows=1, tokens=2, mask=[True]) == forward + backward
    assert step_flops(encoder, rows=1, tokens=2, mask=[False]) == 64 + 64 + 32 + 12 + 12


def test_flops_end_at_the_lowest_active_layer() -> None:
    encoder = EncoderShape(layers=6, width=8, intermediate=32, rank=2, classes=4)

    def flops(*active: int) -> int:
        return step_flops(encoder, 2, 4, [layer in active for layer in range(6)])

    assert flops(0) - flops(1) == flops(1) - flops(2) > 0, "one layer lower: one more layer of backward pass"
    assert flops(0, 1) - flops(0) == flops(0, 5) - flops(0) > 0, "above the lowest, only the adapter's products count"


def test_backward_pass_of_one_block_by_hand() -> None:
    """n = 2 tokens, d = 2, f = 4: gradients of inputs, linear layers 2*2*(4*2*2 + 2*2*4) = 128, attention 2 * 32."""
    for layers in (2, 3):
        assert block_backward(EncoderShape(layers, width=2, intermediate=4, rank=1, classes=3), 1, 2) == 128 + 64


@pytest.mark.parametrize("p", [0.0, 0.125, 0.6, 1.0])
def test_expected_blocks_by_enumeration(p: float) -> None:
    masks = np.array(list(product([False, True], repeat=6)))
    chances = np.where(masks, p, 1 - p).prod(axis=1)
    below = [next((layer for layer, on in enumerate(mask) if on), 6) for mask in masks]
    assert blocks_below(masks).tolist() == below
    assert expected_blocks(p, 6) == pytest.approx(chances @ below)


def test_expected_blocks_over_the_schedule() -> None:
    """For 6 layers 0.75 (1/2 + 1/3 + ... + 1/7) = 0.75 * 223 / 140, as the mean over many points of the schedule."""
    times = (np.arange(20_000) + 0.5) / 20_000
    points = [expected_blocks(schedule.probability(t, 0.0, 0.75), 6) for t in times]
    assert mean_expected_blocks(0.75, 6) == pytest.approx(0.75 * 223 / 140) == pytest.approx(np.mean(points))
    measured = np.array([expected_blocks(p, 6) for p in np.linspace(0, 1, 9)])
    assert schedule_mean(measured, 0.75) == pytest.approx(0.75 * 223 / 140, rel=1e-3), "the error of Simpson's rule"


def test_rounds_of_one_step_reach_every_p_of_the_schedule() -> None:
    points = rounds_of_points(CopraConfig("copra")).values()
    assert list(points) == [(0.75 * eighth / 8, eighth / 8) for eighth in range(9)]


def test_quick_sizes_differ_in_the_number_of_clients_alone() -> None:
    for name, quick in QUICK_SIZES.items():
        assert quick.clients < SIZES[name].clients
        full = SIZES[name]
        assert replace(quick, clients=full.clients, scaling=full.scaling, all_core_splits=True) == full


def test_quick_refuses_other_choices() -> None:
    with pytest.raises(ConfigError, match="--quick chooses sizes, competitors and repeats"):
        bench(quick=True, repeats=2)


def test_steady_rounds_represent_a_whole_copra_training() -> None:
    """Each step trains with the default schedule's probability in the middle of its interval."""
    workload = prepare(SIZES["smoke"], random_base=True, as_file=False)
    copra = workload.configs("float32", "auto")["copra"].copra
    steps = STEADY_ROUNDS * SIZES["smoke"].local_steps
    for step in range(steps):
        expected = schedule.probability((step + 0.5) / steps, CopraConfig.p0, CopraConfig.ramp)
        assert schedule.probability(step / steps, copra.p0, copra.ramp) == pytest.approx(expected)


def test_core_splits() -> None:
    assert core_splits(2, 100, gpu=False) == [CoreSplit(2, 1), CoreSplit(1, 2)]
    assert core_splits(16, 8, gpu=False) == [CoreSplit(8, 2), CoreSplit(1, 16)], "never more workers than clients"
    assert core_splits(1, 100, gpu=False) == [CoreSplit(1, 1)]
    assert core_splits(16, 100, gpu=True) == [CoreSplit(1, 16)]


def open_lazy(config: Config, data: FederatedData) -> Train:
    """Open the PEFT baseline, but train one step less in the last round."""
    train = workers.open_peft_baseline(config, data)

    def train_less(plan: Plan, adapter: Adapter) -> list[Update]:
        steps = plan.config.training.local_steps - (plan.server_round == STEADY_ROUNDS)
        return train(replace(plan, config=plan.config.changed(local_steps=steps)), adapter)

    return train_less


@pytest.mark.slow
def test_equality_check_refuses_a_competitor_that_trains_less() -> None:
    """The fair one passes, in the dtype and attention of (C)."""
    workload = prepare(SIZES["smoke"], random_base=True, as_file=False)
    fair = Competitor("C", "the PEFT loop", "bfloat16", "eager", partial(workers.run, workers.open_peft_baseline))
    lazy = Competitor("x", "the lazy loop", "float32", "sdpa", partial(workers.run, open_lazy))
    announced: list[str] = []
    with pytest.raises(Disagreement, match=r"\(x\) the lazy loop .* after the last round of phase lora .* differs"):
        run_all(workload, [fair, lazy], [CoreSplit(1, 1)], 1, announced.append)
    assert any("(C)" in line for line in announced) and not any("repeat" in line for line in announced)


@pytest.mark.slow
def test_command_needs_neither_flower_nor_ray(tmp_path: Path) -> None:
    for name in ABSENT:
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('{name} must not be imported')")
    command = "import os; os.cpu_count = lambda: 1; from copra_fl.cli import main; main()"
    arguments = ["bench", "--engine-only", "--random-base", "--size", "smoke", "--repeats", "1", "--output", "results"]
    arguments.append("--json")
    paths = [str(tmp_path), str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "COLUMNS": "120"}
    result = subprocess.run(
        [sys.executable, "-c", command, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert "smoke: 4 clients, bert-64, 4 x 16 tokens, 2 local steps" in result.stderr
    assert "no page: plotly must not be imported" in result.stderr and not (tmp_path / "results.html").exists()
    facts = json.loads((tmp_path / "results.json").read_text())
    competitors = facts["sizes"]["smoke"]["competitors"]
    assert list(competitors) == ["c", "C", "f", "g"]
    for competitor in competitors.values():
        for training in TRAININGS:
            measured = competitor["trainings"][training]
            assert len(measured["clients_per_second"]) == 1 and measured["clients_per_second"][0] > 0
            assert 0 < measured["share_of_matmul_rate"][0] < 1
    assert competitors["f"]["trainings"]["copra"]["flops"] < competitors["f"]["trainings"]["lora"]["flops"]
    assert competitors["c"]["peak_memory"]["1 x 1"] > 100e6, "at least Python with torch"
    assert list(facts["sizes"]["smoke"]["scaling"]["seconds_per_client"]) == ["2", "4"]
    assert json.loads(result.stdout) == summary(facts)
    assert_schedule(facts["sizes"]["smoke"]["schedule"])
    markdown = (tmp_path / "results.md").read_text()
    assert markdown.count("\n## ") == 7
    captions = " ".join(markdown.split())  # lines break at other words where times have more digits
    assert captions.count(f"{machine(facts)}.") == 6, "in the caption of every table with numbers"


def assert_schedule(savings: dict) -> None:
    """Check the measured schedule: p = 1 saves nothing, p = 0 the whole backward pass through the blocks."""
    points = savings["points"]
    assert [point["p"] for point in points] == [eighth / 8 for eighth in range(9)]
    assert points[0]["blocks"] == [6.0] * PASSES_PER_REPEAT and points[-1]["blocks"] == [0.0] * PASSES_PER_REPEAT
    assert points[-1]["counted"] == [0.0] * PASSES_PER_REPEAT
    assert points[0]["counted"][0] == pytest.approx(points[0]["expected"], rel=0.1)
    assert points[0]["expected"] == pytest.approx(6 * savings["block_share"])
    for point in points:
        assert len(point["measured"]) == len(savings["lora_seconds"]) == PASSES_PER_REPEAT
        for blocks, counted in zip(point["blocks"], point["counted"], strict=True):
            assert counted == pytest.approx(blocks * savings["block_share"], abs=0.06), (
                "inactive adapters save a little"
            )


def facts_of(**clients_per_second: tuple[float, float]) -> dict:
    """Return facts of the compute size with each competitor's rates for LoRA and for CopRA."""
    competitors = {
        letter: {
            "name": letter, "dtype": "float32", "attention": "sdpa", "core_split": "1 x 1",
            "first_round_seconds": [1.0], "seconds_to_first_round": [1.0], "peak_memory": {"1 x 1": 10**9},
            "memory_per_extra_worker": None,
            "trainings": {
                training: {
                    "clients_per_second": [rate, 0.5 * rate, 2 * rate], "cpu_seconds_per_round": [1.0],
                    "share_of_matmul_rate": [0.7], "bytes_down_per_round": 0, "bytes_up_per_round": 0, "error": 0.0,
                }
                for training, rate in zip(TRAININGS, rates, strict=True)
            },
        }
        for letter, rates in clients_per_second.items()
    }  # fmt: skip
    size = SIZES["compute"]
    machine = {"processor": "Fast CPU", "cores": 2, "system": "Linux"}
    run = {"command": "copra-fl bench", "date": "2026-01-02", "machine": machine, "versions": {}, "repeats": 3}
    return run | {"sizes": {"compute": {"size": vars(size), "competitors": competitors}}}


def test_targets_are_compared_with_medians() -> None:
    verdicts = tables(facts_of(c=(10, 10), f=(11, 11), g=(20, 24)))[-1]
    assert [row[1:] for row in verdicts.rows] == [
        [">= 2", "2.00", "met"],
        [">= 2.3", "2.40", "met"],
        [">= 1.1", "1.10", "met"],
        [">= 1.2", "1.10", "NOT met"],
        [">= 1.1", "1.20", "met"],
        [">= 80%", "70%", "NOT met"],
        [">= 60%", "70%", "met"],
    ]


def test_gains_are_split_into_number_format_and_engine_by_hand() -> None:
    """The loop: 10 clients/s, in our dtype 15; ours 30: 3 times as many, 1.5 by the dtype and 2 by the engine."""
    facts = facts_of(c=(10, 12), C=(15, 12), g=(30, 36))
    gains = next(table for table in tables(facts) if "gain" in str(table.title))
    assert gains.rows == [
        ["(g) / (c)", "lora", "3.00", "1.50", "2.00"],
        ["(g) / (c)", "copra", "3.00", "1.00", "3.00"],
    ]


def test_verdict_says_how_fast_where_time_went_and_what_would_be_faster() -> None:
    sentences = " ".join(verdict(facts_of(c=(10, 12), C=(15, 12), g=(30, 36)))["compute"])
    assert "30 clients a second with LoRA, 36 with CopRA, in process" in sentences
    assert (
        "3.00 times as fast as c (c): 1.50 by number format and attention, 2.00 by training clients together"
        in sentences
    )
    assert "would take 70% of the time" in sentences
    assert "Faster would be: more cores or a GPU, since arithmetic takes most of the time" in sentences
    assert sentences.endswith("CopRA, 1.20 times as fast as LoRA.")
    slow_format = verdict(facts_of(f=(20, 12), g=(10, 10)))["compute"]
    assert "dtype = 'float32', in which the engine is 2.00 times as fast" in slow_format[-1]
    assert not verdict(facts_of(c=(10, 12))), "none of our engines was measured"


def test_summary_is_of_medians_and_has_every_name() -> None:
    medians = summary(facts_of(c=(10, 12), g=(20, 24)))
    names = [
        "naive",
        "tuned",
        "loop",
        "tuned_our_dtype",
        "loop_our_dtype",
        "node",
        "cohort",
        "engine_float32",
        "engine",
    ]
    not_measured = dict.fromkeys(names)
    assert medians["machine"] == "Fast CPU, 2 cores"
    assert medians["compute"] == {
        "lora": not_measured | {"loop": 10, "engine": 20},
        "copra": not_measured | {"loop": 12, "engine": 24},
    }
    assert medians["overhead"] == medians["small"] == not_measured
    assert medians["matmul_share"]["compute"] == not_measured | {"loop": 0.7, "engine": 0.7}
    assert medians["memory"]["compute"]["peak"] == not_measured | {"loop": 10**9, "engine": 10**9}
    assert medians["memory"]["overhead"] == {"peak": not_measured, "extra_worker": not_measured, "extra_client": None}


def test_parts_left_out_are_listed_and_get_no_verdict() -> None:
    facts = facts_of(**dict.fromkeys(LETTERS, (10, 10)))
    assert list(left_out(facts)) == ["Not measured: size overhead, small.", "3 of 5 repeats."]
    facts = facts_of(c=(10, 10), g=(20, 24))
    facts["sizes"]["compute"]["size"] = vars(QUICK_SIZES["compute"])
    sentences = " ".join(left_out(facts))
    assert "Without (a) Flower + Ray, reload per message, (b)" in sentences and "(c)" not in sentences
    assert "No verdict on targets, because of fewer clients: compute with 2 of 8 clients." in sentences
    assert "Only one split of the cores was tried, which may not be the fastest: compute." in sentences
    assert not targets(facts).rows


def with_schedule(facts: dict) -> dict:
    """Add scaling and a schedule to `facts`, as the command stores them."""
    points = [
        {"t": 0.75 * p, "p": p, "expected": 0.5 - 0.5 * p, "blocks": [6 - 6 * p, 6 - 6 * p],
         "counted": [0.5 - 0.5 * p, 0.5 - 0.5 * p], "measured": [0.4 - 0.4 * p, 0.5 - 0.5 * p]}
        for p in (0.0, 0.5, 1.0)
    ]  # fmt: skip
    facts["sizes"]["compute"] |= {
        "schedule": {
            "core_split": "1 x 2", "layers": 6, "ramp": 0.75, "block_share": 0.085, "expected": 0.1,
            "counted": [0.1, 0.1], "measured": [0.09, 0.11], "lora_seconds": [1.0, 1.1], "points": points,
        },
        "scaling": {
            "seconds_per_client": {"10": [0.01, 0.02], "100": [0.008, 0.009]},
            "peak_memory": {"10": 10**9, "100": 2 * 10**9}, "memory_per_extra_client": 1e7, "adapter_bytes": 460_000,
        },
    }  # fmt: skip
    return facts


def test_charts_show_the_stored_numbers() -> None:
    facts = with_schedule(facts_of(c=(10, 12), g=(20, 24)))
    (speed,) = figures.speed(facts, "compute")
    lora, copra = speed.chart.data
    assert lora.x == (10, 20) and copra.x == (12, 24)
    assert lora.error_x.array == (10, 20) and lora.error_x.arrayminus == (5, 10), "from half to twice the median"
    (against_loop,) = figures.ratios(facts, "compute")
    bars, targets_of = against_loop.chart.data[:2], against_loop.chart.data[2:]
    assert [bar.x for bar in bars] == [(2.0,), (2.0,)] and [target.x for target in targets_of] == [(2.0,), (2.3,)]
    (saved,) = figures.schedule(facts, "compute")
    closed, counted, measured = saved.chart.data
    assert closed.y[0] == pytest.approx(100 * 6 * 0.085) and closed.y[-1] == 0
    assert counted.y == (50, 25, 0) and measured.y == (45, 22.5, 0) and measured.x == (0, 0.375, 0.75)


def test_page_names_the_machine_in_every_caption() -> None:
    facts = with_schedule(facts_of(b=(1, 1), c=(10, 12), f=(15, 15), g=(20, 24)))
    page = render([facts])
    assert "5 of 9 targets met." in page
    num_figures, num_tables = page.count("<figcaption"), 5 + 1
    assert num_figures == 8
    assert page.count("Fast CPU, 2 cores.") == num_figures + num_tables


@needs_chromium
def test_page_of_stored_results_opens_in_a_browser(tmp_path: Path) -> None:
    """The results in the repository, together with one that has all parts."""
    stored = sorted((Path(__file__).parent.parent / "experiments" / "results").glob("bench-*.json"))
    (tmp_path / "all.json").write_text(json.dumps(with_schedule(facts_of(b=(1, 1), c=(10, 12), g=(20, 24)))))
    bench(page=[tmp_path / "all.json", *stored])
    check_page(tmp_path / "all.html", (tmp_path / "all.html").read_text().count("<figcaption"))


def test_page_of_another_json_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(ConfigError, match="summary.json is not a result file of copra-fl bench"):
        bench(page=[tmp_path / "summary.json"])


@pytest.mark.slow
def test_quick_lists_what_it_leaves_out(tmp_path: Path) -> None:
    started = time.time()
    out, _ = RealRun(["bench", "--quick", "--json", "--output", "results"], tmp_path).finish()
    print(f"the quick benchmark took {time.time() - started:.0f} s; it should be less than 180 s on 2 idle cores")
    medians = json.loads(out)
    assert medians["compute"]["copra"]["loop_our_dtype"] > 0 and medians["compute"]["copra"]["cohort"] is None
    assert "1 of 5 repeats." in medians["left_out"]
    assert (tmp_path / "results.html").exists()


@pytest.mark.slow
def test_all_competitors_over_real_flower_and_ray(tmp_path: Path) -> None:
    arguments = ["bench", "--size", "smoke", "--random-base", "--repeats", "1", "--output", "results"]
    RealRun(arguments, tmp_path).finish()
    facts = json.loads((tmp_path / "results.json").read_text())["sizes"]["smoke"]
    assert list(facts["competitors"]) == list(LETTERS)
    for letter in "abBde":
        training = facts["competitors"][letter]["trainings"]["lora"]
        assert training["bytes_down_per_round"] > 0 and training["cpu_seconds_per_round"][0] > 0
    sent = {letter: facts["competitors"][letter]["trainings"]["lora"]["bytes_up_per_round"] for letter in "be"}
    assert sent["e"] < sent["b"], "a node sends one pooled update for all its clients"
    assert len(facts["simulate_first_round"]) == 1
