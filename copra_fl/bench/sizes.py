"""The workloads of the benchmark.

    overhead   100 clients, BERT of 6 layers, 64 wide,  4 x 16 tokens    everything except arithmetic
    small      100 clients, MiniLM,                     4 x 16 tokens    small clients on a real base model
    compute      8 clients, MiniLM,                    16 x 64 tokens    arithmetic
    smoke        4 clients, BERT of 6 layers, 64 wide,  4 x 16 tokens    a test of the command

`QUICK_SIZES` are the first three with fewer clients and one split of the cores.

Every text has at least max-length tokens, so padding gives no competitor an advantage. A client has as many examples as
it trains on in a round.

A run has three phases without a pause: one round to warm up, `STEADY_ROUNDS` rounds of LoRA and `STEADY_ROUNDS` rounds
of CopRA, each phase from the same start. CopRA's savings depend on the progress of the schedule, so these few rounds
must represent a whole training: their steps are at evenly spread points of the schedule. Step i of n begins at t = i/n;
p0 and ramp are shifted so that it trains with the default schedule's probability in the middle of its interval,
p(t) = min(1, (t + 1/2n) / ramp). CopRA is therefore timed over all its steady rounds together.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers import models as tokenizer_models
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from copra_fl.config import Config, CopraConfig, Value
from copra_fl.data.federated import FederatedData, load_data
from copra_fl.files import cache_dir
from copra_fl.models.build import build_model, load_processor, model_source, resolve_config
from copra_fl.seeding import generator
from copra_fl.sources.assets import is_asset
from copra_fl.tasks.text_classification import LabeledTexts

STEADY_ROUNDS = 3
WARM_UP = "warm-up"
#: the timed phases
TRAININGS = ("lora", "copra")
NUM_LABELS = 16
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
VOCABULARY = SPECIAL + [f"w{number}" for number in range(1000)]
#: name of a data set of random tokens in memory; competitors over Flower get a file of texts instead
SYNTHETIC = "synthetic"

SHAPES: dict[str, dict[str, Any]] = {
    "bert-64": {
        "hidden_size": 64,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "intermediate_size": 256,
    },
    "minilm": {
        "hidden_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
        "intermediate_size": 1536,
    },
}


@dataclass(frozen=True)
class Size:
    """The size of a workload.

    Attributes:
        clients: number of clients.
        base: a shape of `SHAPES`; a shape that is also the name of an asset has the asset's trained weights.
        tokens: tokens of each text.
        scaling: numbers of clients at which the engine's cost per client is compared.
        schedule: measure CopRA's steps over its schedule.
        all_core_splits: try every split of the cores; otherwise only one worker per core.
    """

    name: str
    clients: int
    base: str
    batch_size: int
    tokens: int
    local_steps: int = 2
    scaling: tuple[int, ...] = ()
    schedule: bool = False
    all_core_splits: bool = True


SIZES = {
    size.name: size
    for size in (
        Size("overhead", 100, "bert-64", 4, 16, scaling=(10, 100, 1000, 3000)),
        Size("small", 100, "minilm", 4, 16),
        Size("compute", 8, "minilm", 16, 64, schedule=True),
        Size("smoke", 4, "bert-64", 4, 16, scaling=(2, 4), schedule=True),
    )
}
QUICK_SIZES = {
    "overhead": replace(SIZES["overhead"], clients=20, scaling=(10, 100), all_core_splits=False),
    "small": replace(SIZES["small"], clients=8, all_core_splits=False),
    "compute": replace(SIZES["compute"], clients=2, all_core_splits=False),
}


@dataclass(frozen=True)
class Workload:
    """A size with its base model and data set, both as names or paths."""

    size: Size
    model: str
    dataset: str

    def configs(self, dtype: str, attention: str, engine: str = "stacked") -> dict[str, Config]:
        """Return the configuration of each phase, with dtype and attention resolved. A phase evaluates two examples."""
        size, steps = self.size, STEADY_ROUNDS * self.size.local_steps
        p0 = 0.5 / steps / CopraConfig.ramp
        flat: dict[str, Value] = {
            "model": self.model,
            "dataset": self.dataset,
            "partitioner": "iid",
            "num-clients": size.clients,
            "validation-fraction": 0.0,
            "server-validation-examples": 1,
            "test-examples": 1,
            "max-length": size.tokens,
            "dtype": dtype,
            "attention": attention,
            "engine": engine,
            "batch-size": size.batch_size,
            "local-steps": size.local_steps,
            "num-rounds": STEADY_ROUNDS,
            "eval-every": STEADY_ROUNDS,
            "updates": "pooled",
            "merge-gap-clients": 0,
            "path-pairs": 0,
        }
        phases: dict[str, dict[str, Value]] = {
            WARM_UP: {"local-training": "lora", "num-rounds": 1},
            "lora": {"local-training": "lora"},
            "copra": {"local-training": "copra", "p0": p0, "ramp": CopraConfig.ramp * (1 - p0)},
        }
        return {phase: resolve_config(Config.from_flat(flat | settings)) for phase, settings in phases.items()}


def prepare(size: Size, random_base: bool, as_file: bool) -> Workload:
    """Return the workload of `size`. All its files are created or fetched in the cache now, before anything is timed.

    Competitors over Flower need the data set as a file (`as_file`). Raises AssetError if the base cannot be fetched.
    """
    model, dataset = size.base, SYNTHETIC
    if random_base or not is_asset(model):
        model = str(made_once(f"random-{size.base}", partial(write_base, shape=SHAPES[size.base])))
    if as_file:
        dataset = str(made_once(f"{size.name}-{size.clients}.jsonl", partial(write_texts, size=size)))
    workload = Workload(size, model_source(model), dataset)
    for dtype in ("auto", "float32"):  # bases in these dtypes and tokens go into the cache too
        config = workload.configs(dtype, "auto")[WARM_UP]
        build_model(config.changed(device="cpu").model, config.copra.gate_group, NUM_LABELS, config.federation.seed)
        open_data(config)
    return workload


def made_once(name: str, make: Callable[[Path], None]) -> Path:
    """Return the path of the benchmark's file or folder `name` in the cache; it is made if it does not exist."""
    path = cache_dir() / "bench" / name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"{path.stem}-{os.getpid()}{path.suffix}")
        make(unfinished)
        unfinished.rename(path)
    return path


def write_base(directory: Path, shape: dict[str, Any]) -> None:
    """Write a BERT of `shape` with random weights, and a tokenizer of `VOCABULARY`."""
    words = Tokenizer(tokenizer_models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=words, **names).save_pretrained(str(directory))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertModel(BertConfig(vocab_size=len(VOCABULARY), **shape)).save_pretrained(str(directory))


def write_texts(path: Path, size: Size) -> None:
    """Write a file of random texts, each with as many words as max-length has tokens, and two more to hold out."""
    rng = generator(0, "bench", "texts")
    with path.open("w", encoding="utf-8") as file:
        for number in range(size.clients * size.batch_size * size.local_steps + 2):
            words = " ".join(rng.choice(VOCABULARY[len(SPECIAL) :], size.tokens))
            file.write(json.dumps({"text": words, "label": number % NUM_LABELS}) + "\n")


def open_data(config: Config) -> FederatedData:
    """Return the clients' examples: from the token cache, or random ones."""
    if config.data.dataset == SYNTHETIC:
        return synthetic(config)
    return load_data(config, load_processor(config.model))


def synthetic(config: Config) -> FederatedData:
    """Return random tokens and labels: the same number for each client, none held out."""
    clients, tokens = config.data.num_clients, config.data.max_length
    examples_per_client = config.training.batch_size * config.training.local_steps
    number, rng = clients * examples_per_client, generator(0, "bench", "tokens")
    examples = LabeledTexts(
        input_ids=torch.from_numpy(rng.integers(len(SPECIAL), len(VOCABULARY), number * tokens, np.int32)),
        offsets=torch.arange(number + 1) * tokens,
        labels=torch.from_numpy(rng.integers(0, NUM_LABELS, number)),
        pad_id=0,
        max_length=tokens,
    )
    return FederatedData(
        examples=examples,
        label_names=[str(label) for label in range(NUM_LABELS)],
        client_names=[str(client) for client in range(clients)],
        train=np.split(np.arange(number), clients),
        validation=[np.zeros(0, int)] * clients,
        digest=SYNTHETIC,
        tokens_digest=SYNTHETIC,
    )
