"""Size ``gpu``: many small clients of a language model on one device, together and one by one with plain PEFT.

The base has the shapes of SmolLM2-135M and random weights, so nothing is downloaded. Without a CUDA device the model
and the clients are tiny (`SMOKE`): that run shows that the path works, and says nothing about a GPU.

Both ways train the same clients on the same base in the same dtype and attention: `PeftEngine` one after the other, and
`StackedEngine` with several limits of tokens per step. No time counts unless the adapters of both agree. This module
needs torch, Transformers and PEFT, and neither flwr nor ray.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from copra_fl.adapters.state import Update, difference, norm
from copra_fl.bench import workers
from copra_fl.bench.findings import BenchFacts, machine
from copra_fl.bench.runner import Disagreement
from copra_fl.bench.sizes import SYNTHETIC, made_once
from copra_fl.config import Config
from copra_fl.data.federated import FederatedData
from copra_fl.models.build import build_model, choose_device, resolve_config
from copra_fl.models.memory_plan import plan as plan_memory
from copra_fl.reporting.data_table import NO_VALUE, DataTable
from copra_fl.seeding import generator
from copra_fl.tasks.causal_lm import Continuations
from copra_fl.training.engine import Engine, PeftEngine, StackedEngine, train_all
from copra_fl.training.plan import Plan, Start

#: config.json of SmolLM2-135M
SMOLLM2: dict[str, Any] = {
    "vocab_size": 49_152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0},
    "tie_word_embeddings": True,
}
ONE_BY_ONE = "PEFT, one by one"
#: dtype -> largest difference of the adapters from PEFT's, relative to the change in training. Adam turns the rounding
#: error of a tiny gradient into a whole step. One step less out of two differs by a half.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.3}


@dataclass(frozen=True)
class GpuSize:
    """The clients and their model.

    Attributes:
        model: name of the base.
        shape: settings of its LlamaConfig.
        tokens: tokens of each example.
        clients_per_step: numbers of clients that the stacked engine trains together.
    """

    model: str
    shape: dict[str, Any]
    clients: int
    batch_size: int
    tokens: int
    local_steps: int
    clients_per_step: tuple[int, ...]

    @property
    def tokens_per_round(self) -> int:
        return self.clients * self.local_steps * self.batch_size * self.tokens


SMOKE_SHAPE = SMOLLM2 | {"vocab_size": 512, "hidden_size": 36, "intermediate_size": 96, "num_hidden_layers": 2}
GPU = GpuSize("smollm2-135m", SMOLLM2, 128, 4, 64, 2, (8, 32, 128))
SMOKE = GpuSize("smollm2-tiny", SMOKE_SHAPE, 4, 2, 16, 1, (2, 4))


def measure(repeats: int, announce: Callable[[str], None]) -> BenchFacts:
    """Time both ways in bfloat16 and float32; return the results by dtype.

    Raises Disagreement if their adapters differ.
    """
    device = choose_device("auto")
    size = GPU if device.type == "cuda" else SMOKE
    source = made_once(f"random-{size.model}", partial(write_base, shape=size.shape))
    by_dtype = {
        dtype: measure_dtype(size, make_config(size, source, dtype), repeats, announce)
        for dtype in ("bfloat16", "float32")
    }
    name = torch.cuda.get_device_name() if device.type == "cuda" else "no CUDA device"
    return {"device": name, "size": asdict(size), "dtypes": by_dtype}


def measure_dtype(size: GpuSize, config: Config, repeats: int, announce: Callable[[str], None]) -> BenchFacts:
    """Return the rate of matrix products in the dtype of `config`, and the results of each way to train by its name."""
    dtype = config.model.dtype
    model = build_model(config.model, config.copra.gate_group, 0, config.federation.seed)
    start, data, stacked = Start(model.read_adapter()), make_data(size), StackedEngine(model)
    ways: dict[str, tuple[Engine, Config]] = {ONE_BY_ONE: (PeftEngine(model), config.changed(engine="peft"))}
    for clients in size.clients_per_step:
        limited = config.changed(step_tokens=clients * size.batch_size * size.tokens)
        ways[f"copra-fl, {clients} clients a step"] = stacked, limited
    results: BenchFacts = {}
    reference: list[Update] = []
    for name, (engine, settings) in ways.items():
        announce(f"{name}, {dtype}, check")
        try:
            trained, _, peak = train_round(engine, settings, data, start)
        except torch.cuda.OutOfMemoryError:
            results[name] = None
            continue
        reference = reference or trained
        results[name] = {
            "error": check(name, dtype, trained, reference, start),
            "flops": sum(update.metrics["flops"] for update in trained),
            "peak_memory": peak,
            "planned_memory": plan_memory(settings, 0, size.tokens).total,
            "seconds": [],
        }
    for repeat in range(1, repeats + 1):
        for name in (name for name, result in results.items() if result):
            announce(f"{name}, {dtype}, repeat {repeat}/{repeats}")
            _, seconds, _ = train_round(*ways[name], data, start)
            results[name]["seconds"].append(seconds)
    rate = workers.measure_matmul_rate(torch.get_num_threads(), dtype, config.model.device)
    return {"attention": config.model.attention, "matmul_rate": rate, "ways": results}


def train_round(engine: Engine, config: Config, data: FederatedData, start: Start) -> tuple[list[Update], float, int]:
    """Train all clients for one round; return their updates, the seconds, and the peak memory of the GPU in bytes."""
    on_gpu = engine.device.type == "cuda"
    if on_gpu:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    plan = Plan(1, tuple(range(config.data.num_clients)), config)
    starts = dict.fromkeys(plan.clients, start)
    begin = time.perf_counter()
    updates = train_all(engine, data, plan, starts)
    seconds = time.perf_counter() - begin  # the updates are on the CPU, so the GPU has finished
    peak = torch.cuda.max_memory_allocated() if on_gpu else 0
    return updates, seconds, peak


def check(name: str, dtype: str, trained: list[Update], reference: list[Update], start: Start) -> float:
    """Return ||adapters - reference|| / ||reference - start|| over all clients.

    Raises Disagreement if it is above `TOLERANCE`.
    """
    pairs = list(zip(trained, reference, strict=True))
    errors = [norm(difference(update.adapter, other.adapter)) for update, other in pairs]
    changes = [norm(difference(other.adapter, start.adapter)) for _, other in pairs]
    error = float(np.linalg.norm(errors) / np.linalg.norm(changes))
    if not error <= TOLERANCE[dtype]:
        raise Disagreement(
            f"size gpu: {name} does not train what plain PEFT trains, so no time counts: its adapters differ by "
            f"{error:.2g} of the change in training; {TOLERANCE[dtype]:g} is allowed in {dtype}"
        )
    return error


def make_config(size: GpuSize, source: Path, dtype: str) -> Config:
    """Return the configuration of the clients: plain LoRA on the query and value projections."""
    flat = {
        "task": "causal-lm",
        "model": str(source),
        "dataset": SYNTHETIC,
        "partitioner": "iid",
        "num-clients": size.clients,
        "max-length": size.tokens,
        "target-modules": "q_proj,v_proj",
        "local-training": "lora",
        "batch-size": size.batch_size,
        "local-steps": size.local_steps,
        "dtype": dtype,
    }
    return resolve_config(Config.from_flat(flat))


def make_data(size: GpuSize) -> FederatedData:
    """Return random tokens, as many examples for each client as it trains on; the second half of each is the target."""
    number = size.clients * size.batch_size * size.local_steps
    tokens = generator(0, "bench", "gpu").integers(3, size.shape["vocab_size"], number * size.tokens, np.int32)
    examples = Continuations(
        input_ids=torch.from_numpy(tokens),
        offsets=torch.arange(number + 1) * size.tokens,
        pad_id=2,
        max_length=size.tokens,
        targets_from=torch.full((number,), size.tokens // 2),
    )
    train = np.split(np.arange(number), size.clients)
    return FederatedData(examples=examples, label_names=[], train=train, digest=SYNTHETIC, tokens_digest=SYNTHETIC)


def write_base(directory: Path, shape: dict[str, Any]) -> None:
    """Write a Llama of `shape` with random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(directory)


def tables(facts: BenchFacts) -> list[DataTable]:
    """Return the table of this size; empty without it."""
    measured: BenchFacts = facts.get("gpu", {})
    if not measured:
        return []
    size = GpuSize(**measured["size"])
    rows = [
        [dtype, name, *_cells(size, of_dtype, name)]
        for dtype, of_dtype in measured["dtypes"].items()
        for name in of_dtype["ways"]
    ]
    caption = (
        f"{measured['device']}. Medians of {facts['repeats']} repeats. Of the matmul rate (MFU): estimated operations "
        "of the training (copra_fl/models/flops.py), divided by those of large matrix products in the same time and "
        f"dtype. Times as fast: as {ONE_BY_ONE} in the same dtype and attention. Plan: the memory plan before a run. "
        f"Error: difference of the adapters from PEFT's, relative to the change in training. {machine(facts)}."
    )
    header = ["dtype", "training", "tokens/s", "of matmul rate", "times as fast", "peak GB", "plan GB", "error"]
    title = (
        f"gpu: {size.clients} clients, {size.model} with random weights, {size.batch_size} x {size.tokens} tokens, "
        f"{size.local_steps} local steps"
    )
    return [DataTable(header, rows, caption, title)]


def _cells(size: GpuSize, of_dtype: BenchFacts, name: str) -> list[str]:
    result = of_dtype["ways"][name]
    if result is None:
        return ["out of memory", *[NO_VALUE] * 5]
    seconds = median(result["seconds"])
    one_by_one = of_dtype["ways"][ONE_BY_ONE]
    return [
        f"{size.tokens_per_round / seconds:,.0f}",
        f"{result['flops'] / seconds / of_dtype['matmul_rate']:.1%}",
        f"{median(one_by_one['seconds']) / seconds:.2f}" if one_by_one else NO_VALUE,
        f"{result['peak_memory'] / 1e9:.2f}",
        f"{result['planned_memory'] / 1e9:.2f}",
        f"{result['error']:.1e}",
    ]
