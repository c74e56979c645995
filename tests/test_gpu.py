"""The same engine on GPUs, and checks without a GPU that keep this path working.

Tests marked ``gpu`` run where torch sees a CUDA device: `python -m pytest -m gpu` (docs/how-to/benchmark.md).
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model
from torch.overrides import TorchFunctionMode
from transformers import LlamaConfig

from copra_fl.bench.gpu import SMOLLM2
from copra_fl.config import Config
from copra_fl.data.federated import FederatedData, load_data
from copra_fl.models.adapted import AdaptedModel
from copra_fl.models.build import build_model, choose_device, load_processor, lora_config, resolve_config
from copra_fl.models.memory_plan import plan as plan_memory
from copra_fl.tasks import find_task
from copra_fl.tasks.causal_lm import Continuations
from copra_fl.tasks.text_classification import LabeledTexts
from copra_fl.training.batches import plan_steps
from copra_fl.training.cohort import _backward, _make_step
from copra_fl.training.engine import PeftEngine, StackedEngine
from copra_fl.training.plan import Plan, Start
from copra_fl.training.stacked import StackedModel
from copra_fl.training.stacked.step import Stack
from tests.support.real_runs import RealRun, settings
from tests.support.tiny import Settings
from tests.support.worlds import CASES, World, assert_alike

needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")]


@pytest.fixture(params=[pytest.param("cuda", marks=needs_gpu)])
def cuda(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


def test_the_automatic_device_is_the_gpu(cuda: torch.device, tiny: Settings) -> None:
    config = Config.from_flat(tiny | {"device": "auto"})
    assert choose_device("auto").type == choose_device("cuda").type == "cuda"
    assert choose_device("cpu").type == "cpu"
    assert resolve_config(config.changed(attention="auto")).model.attention == "sdpa"
    model = build_model(config.model, "layer", 3, seed=0)
    assert {parameter.device.type for parameter in model.parameters()} == {"cuda"}
    assert all(tensor.device.type == "cpu" for tensor in model.read_adapter().values())


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_stacked_training_equals_peft_in_float32(cuda: torch.device, tiny: Settings, changes: Settings) -> None:
    """Both on the GPU; dropout masks come from the same named streams of the device."""
    world = World(tiny | {"device": "cuda", "local-steps": 20, "num-rounds": 4, "alpha": 1.0} | changes)
    for update in world.together(*range(6)):
        assert_alike(update, world.alone(update.client), 1e-4)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_stacked_training_equals_peft_in_bfloat16(cuda: torch.device, tiny: Settings, attention: str) -> None:
    flat = {"device": "cuda", "dtype": "bfloat16", "attention": attention, "local-steps": 20, "num-rounds": 4}
    world = World(tiny | flat)
    for update in world.together(*range(6)):
        assert_alike(update, world.alone(update.client), 0.02)


def test_dropout_streams_do_not_depend_on_the_cohort(cuda: torch.device, tiny: Settings) -> None:
    world = World(tiny | {"device": "cuda", "lora-dropout": 0.3, "local-steps": 20})
    together = {update.client: update for update in world.together(*range(6))}
    for update in [*world.together(4), *world.together(5, 0)]:
        assert_alike(update, together[update.client], 1e-4)


def test_the_gpu_trains_what_the_cpu_trains(cuda: torch.device, tiny: Settings) -> None:
    """Without dropout, whose generators differ by device."""
    on_cpu, on_gpu = (World(tiny | {"device": device, "local-steps": 20}) for device in ("cpu", "cuda"))
    for update in on_gpu.together(*range(6)):
        assert_alike(update, on_cpu.alone(update.client), 1e-3)


def test_a_base_in_4_bits_trains(cuda: torch.device, tiny: Settings) -> None:
    """Quantized layers cannot be stacked: PEFT trains one client after the other, and the base stays in 4 bits."""
    pytest.importorskip("bitsandbytes")
    config = Config.from_flat(tiny | {"device": "cuda", "quantization": "4bit", "dtype": "bfloat16"})
    data = load_data(config, load_processor(config.model))
    engine = PeftEngine(build_model(config.model, "layer", 3, seed=0))
    start = engine.model.read_adapter()
    (update,) = engine.train(data, Plan(1, (0,), config), (0,), {0: Start(start)}, lambda number: None)
    assert any(not torch.equal(update.adapter[name], start[name]) for name in start)
    assert torch.uint8 in {parameter.dtype for parameter in engine.model.base.parameters()}


def test_the_memory_plan_covers_what_the_gpu_allocates(cuda: torch.device, tiny: Settings) -> None:
    """The plan counts the tensors that stay; temporary ones of a block come on top.

    The workspaces that cuBLAS keeps (32 MiB on Hopper) are larger than this plan, and are subtracted.
    """
    flat = {"device": "cuda", "attention": "sdpa", "local-training": "lora", "local-steps": 2, "max-length": 8}
    config = Config.from_flat(tiny | flat | {"batch-size": 64, "local-epochs": 0})
    data = load_data(config, load_processor(config.model))
    engine = StackedEngine(build_model(config.model, "layer", 3, seed=0))
    plan = Plan(1, tuple(range(6)), config)
    starts = dict.fromkeys(plan.clients, Start(engine.model.read_adapter()))

    def train() -> None:
        for clients in engine.slices(data, plan):
            engine.train(data, plan, clients, starts, lambda number: None)
        gc.collect()

    train()
    allocated = torch.cuda.memory_allocated()
    torch._C._cuda_clearCublasWorkspaces()
    workspaces = allocated - torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    train()
    planned = plan_memory(config, 3, data.examples.max_length).total
    assert 0.5 * planned < torch.cuda.max_memory_allocated() - workspaces < 2 * planned


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "share", "gpus"), [(1, 1.0, 1), (2, 0.5, 1), (3, 0.5, 2)])
def test_ray_workers_share_gpus(
    cuda: torch.device, tiny: Settings, tmp_path: Path, workers: int, share: float, gpus: int
) -> None:
    """Three workers with half a GPU each need two GPUs: no worker is spread over both."""
    pytest.importorskip("ray")
    if torch.cuda.device_count() < gpus:
        pytest.skip(f"needs {gpus} GPUs")
    flat = tiny | {"device": "auto", "num-rounds": 1}
    arguments = ["simulate", *settings(flat), "--workers", str(workers), "--gpus-per-worker", str(share)]
    RealRun([*arguments, "--output", "run"], tmp_path).finish()
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["rounds"] == 1


class BlockingCopies(TorchFunctionMode):
    """Count the copies from the CPU to another device that wait for it."""

    number = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function is torch.Tensor.to and args[0].device.type == "cpu" and result.device.type != "cpu":
            self.number += not kwargs["non_blocking"] if kwargs else 1
        return result


@pytest.mark.parametrize("name", ["text-classification", "causal-lm"])
def test_a_stacked_step_with_the_shapes_of_smollm2_runs_on_the_meta_device(name: str) -> None:
    """Shapes and devices of a whole step, without numbers: a value that is read back (`item`) would raise an error.

    So the forward and the backward pass do not wait for a GPU, and no tensor is left on the CPU by mistake. With sdpa
    Transformers itself waits once in a forward pass, to see whether the batch has padding.
    """
    clients, rows, tokens, meta = 6, 4, 16, torch.device("meta")
    flat = {"task": name, "model": "random", "dataset": "random", "num-clients": clients, "batch-size": rows,
            "local-steps": 1, "target-modules": "q_proj,v_proj", "local-training": "copra", "p0": 0.5, "off": "global",
            "dtype": "bfloat16", "attention": "eager", "max-length": tokens}  # fmt: skip
    config, number = Config.from_flat(flat), clients * rows
    task = find_task(name)
    with meta:
        base = task.model_class.from_config(LlamaConfig(**SMOLLM2), dtype=torch.bfloat16, attn_implementation="eager")
        peft = get_peft_model(base, lora_config(config.model, base))
        head = task.head(base.config.hidden_size, 3) if task.trains_head else None
    model = StackedModel(AdaptedModel(task, peft, head, "mean", "layer", meta))
    texts = (torch.arange(number * tokens, dtype=torch.int32), torch.arange(number + 1) * tokens, 0, tokens)
    examples = (
        LabeledTexts(*texts, labels=torch.arange(number) % 3)
        if task.trains_head
        else Continuations(*texts, targets_from=torch.arange(number) % 3 + 1)
    )
    train = np.split(np.arange(number), clients)
    data = FederatedData(examples=examples, label_names=list("abc"), train=train, digest="", tokens_digest="")
    plan = Plan(1, tuple(range(clients)), config)
    cohort = [plan_steps(plan, data, client, model.num_groups) for client in plan.clients]
    start_values = torch.zeros(model.layout.size, device=meta).expand(clients, -1)
    stack = Stack(model.layout, start_values.clone(), plan.trained_parts)
    with BlockingCopies() as blocking:
        chosen, step = _make_step(model, plan, stack, start_values, cohort, 0)
        losses = _backward(model, data, step, chosen, [cohort[row].batches[0] for row in chosen], 0, None, None)
    assert blocking.number == 0
    assert (losses.shape, losses.dtype, losses.device) == ((clients,), torch.float32, meta)
    assert model.num_groups == 30 and len(model.blocks) == 30
    assert step.stack.grads.device == meta and step.stack.grads.shape == (clients, model.layout.size)


BLOCKED = """
import sys
from importlib.abc import MetaPathFinder

class Absent(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("flwr", "flwr_datasets", "ray", "datasets", "plotly"):
            raise ModuleNotFoundError(f"{name} is absent", name=name)

sys.meta_path.insert(0, Absent())
from copra_fl.bench import workers
from copra_fl.cli import main

workers.MATMUL_SECONDS = 0.05
sys.argv = ["copra-fl", "bench", "--size", "gpu", "--repeats", "1", "--output", sys.argv[1]]
main()
"""


def test_the_gpu_benchmark_needs_neither_flower_nor_ray(tmp_path: Path) -> None:
    """The command at the size that it has without a GPU; it fails if the engines' adapters differ."""
    command = [sys.executable, "-c", BLOCKED, str(tmp_path / "gpu")]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    facts = json.loads((tmp_path / "gpu.json").read_text())
    for dtype in ("bfloat16", "float32"):
        ways = facts["gpu"]["dtypes"][dtype]["ways"]
        assert len(ways) >= 3 and all(len(way["seconds"]) == 1 for way in ways.values())
        assert len({way["flops"] for way in ways.values()}) == 1, "all ways train the same"
        assert [way["error"] for way in ways.values()][0] == 0
    assert "times as fast" in (tmp_path / "gpu.md").read_text()
    assert not (tmp_path / "gpu.html").exists() and "no page" in result.stderr, "the page needs plotly"
