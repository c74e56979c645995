"""Everything a run can be told, in one place: names, defaults, types and ranges.

A run's configuration is flat TOML with kebab-case keys, because that is what Flower
passes around (``[tool.flwr.app.config]``, ``--run-config``). In code the same keys are
frozen dataclasses, one per subject. `Config.from_flat` is the only way in: it converts,
checks and names whatever is wrong, so that nothing starts on a bad configuration.
"""

from __future__ import annotations

import csv
import io
import json
import math
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any

from copra_fl.wording import unknown_name

Value = bool | int | float | str


class ConfigError(ValueError):
    """A configuration that cannot run. The message names key, value and what is allowed."""


def option(
    default: Value,
    doc: str,
    *,
    choices: tuple[str, ...] = (),
    low: float = -math.inf,
    high: float = math.inf,
    above: float = -math.inf,
) -> Any:
    """A configuration key: its default, one line for people, and what is allowed."""
    return field(default=default, metadata={"doc": doc, "choices": choices, "low": low, "high": high, "above": above})


#: partitioners that deal examples out by their labels
BY_LABEL = ("dirichlet", "pathological", "shards")


@dataclass(frozen=True)
class DataConfig:
    dataset: str = option(
        "health-tweets",
        "asset name, path of a CSV, JSONL or Parquet file or of a folder of images, or Hugging Face data set name; "
        "several, with commas: each client has one of them (docs/tasks.md); empty: the server has none, and only "
        "clients evaluate (partitioner = own)",
    )
    test_file: str = option("", "file with the test set; empty: the data set's own, else held out of the data")
    text_column: str = option("text", "column with the text")
    prompt_column: str = option("", "causal-lm: column with what the text is a response to; empty: texts stand alone")
    image_column: str = option("image", "image-classification: column with the image, or the path of its file")
    label_column: str = option("label", "column with the label")
    client_column: str = option("", "column that says whose an example is, for partitioner = natural")
    labels: str = option("", "all labels in order, as a line of CSV; empty: those that the data set has")
    partitioner: str = option(
        "dirichlet",
        "how examples go to clients; own: each node has a file of its own (docs/nodes.md), dataset is the server's",
        choices=("iid", *BY_LABEL, "natural", "own"),
    )
    alpha: float = option(0.3, "dirichlet: concentration; small is skewed", above=0)
    classes_per_client: int = option(2, "pathological, shards: classes (or shards) per client", low=1)
    num_clients: int = option(
        0, "number of clients; 0: each node is one client (natural: every value of the client column)", low=0
    )
    held_out_clients: int = option(
        0,
        "natural: clients held out whole, on whose examples (test-examples at most) the final model is tested besides; "
        "all others are of the num-clients clients",
        low=0,
    )
    empty_clients: str = option("skip", "clients left with too little data", choices=("skip", "refuse"))
    validation_fraction: float = option(0.1, "share of each client's examples kept for validation", low=0, high=0.9)
    server_validation_examples: int = option(500, "examples the server holds for validation", low=1)
    test_examples: int = option(2000, "examples held out for the test, where the data set has none of its own", low=1)
    max_length: int = option(64, "tokens per text; longer ones are cut (images have as many as the model makes)", low=4)

    @property
    def datasets(self) -> list[str]:
        """The data sets in `dataset`, as they are written there; none where it is empty."""
        return [name.strip() for name in next(csv.reader([self.dataset], skipinitialspace=True), [])]

    @property
    def label_list(self) -> list[str]:
        """The labels in `labels`; none where it is empty."""
        return next(csv.reader([self.labels], skipinitialspace=True), [])


@dataclass(frozen=True)
class ModelConfig:
    task: str = option(
        "text-classification",
        "what is learnt (docs/tasks.md); a dotted name is a module of your own, as in hospital.tagging",
    )
    model: str = option("minilm", "asset name, path or Hugging Face name of a Transformers model")
    model_sha256: str = option(
        "", "SHA-256 of the base's weights, as sha256sum prints it of one file; empty: of what the server has"
    )
    pooling: str = option("mean", "what the head sees", choices=("mean", "cls", "pooler"))
    target_modules: str = option("query,value", "linear modules that get an adapter, comma-separated, or all-linear")
    rank: int = option(8, "LoRA rank r", low=1)
    lora_alpha: float = option(16.0, "LoRA alpha", above=0)
    lora_scaling: str = option(
        "standard",
        "what adapters are scaled by; standard: alpha / r, rslora: alpha / sqrt(r), constant: alpha",
        choices=("standard", "rslora", "constant"),
    )
    lora_dropout: float = option(0.0, "dropout on the adapters' input", low=0, high=0.99)
    dtype: str = option(
        "auto",
        "dtype of the frozen base; auto: bfloat16 where the device computes fast in it, else float32",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    quantization: str = option(
        "none",
        "4bit: the frozen base's linear layers are kept in NF4 by bitsandbytes, which must be installed; they compute "
        "in dtype (QLoRA)",
        choices=("none", "4bit"),
    )
    attention: str = option(
        "auto", "attention of the base; auto: what trains fastest on the device", choices=("auto", "eager", "sdpa")
    )
    gradient_checkpointing: bool = option(
        False,
        "blocks store their inputs alone for the backward pass, and are computed again in it: less memory, slower",
    )
    device: str = option("auto", "auto: CUDA where there is one", choices=("auto", "cpu", "cuda"))

    def scaling(self, rank: int) -> float:
        """The factor s in W0 + s B A of an adapter of this rank."""
        return self.lora_alpha / {"standard": rank, "rslora": math.sqrt(rank), "constant": 1.0}[self.lora_scaling]


@dataclass(frozen=True)
class CopraConfig:
    local_training: str = option(
        "copra", "what clients train; head: the task head alone, on the bare base", choices=("copra", "lora", "head")
    )
    p0: float = option(0.0, "probability that a layer is on at the start", low=0, high=1)
    p1: float = option(1.0, "probability that a layer is on from the end of the ramp on", above=0, high=1)
    ramp: float = option(0.75, "share of training over which p0 rises to p1", above=0, high=1)
    min_active: int = option(0, "layers that are on at least, in every step", low=0, high=1)
    gate_group: str = option("layer", "what is switched as one", choices=("layer", "module"))
    schedule_progress: str = option("federation", "what the schedule runs over", choices=("federation", "local"))
    mask_scope: str = option("step", "how long, and for whom, a mask holds", choices=("step", "shared", "round"))
    rescale: bool = option(False, "divide active adapters by their probability")


@dataclass(frozen=True)
class TrainingConfig:
    optimizer: str = option("adamw", "local optimiser", choices=("adamw", "sgd"))
    learning_rate: float = option(2e-3, "learning rate of the adapters", above=0)
    head_learning_rate: float = option(2e-3, "learning rate of the task head", above=0)
    lr_schedule: str = option("constant", "over the whole federation", choices=("constant", "cosine"))
    weight_decay: float = option(0.0, "decoupled in adamw, L2 in sgd", low=0)
    momentum: float = option(0.0, "sgd only", low=0, high=1)
    batch_size: int = option(16, "examples per micro-batch", low=1)
    gradient_accumulation: int = option(1, "micro-batches per optimiser step", low=1)
    local_steps: int = option(10, "optimiser steps per client and round", low=1)
    local_epochs: int = option(0, "epochs per client and round; 0: use local-steps", low=0)
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm; 0: never", low=0)
    bucket_batches: int = option(
        1, "batches that are made together, each of texts of like length; 1: as shuffled", low=1
    )
    engine: str = option(
        "stacked",
        "stacked: a cohort's clients step together, where the model allows it; peft: one by one",
        choices=("stacked", "peft"),
    )
    step_tokens: int = option(4096, "stacked: tokens in one step of all its clients, at most (bounds memory)", low=1)
    max_memory_gb: float = option(
        0.0, "GB a worker may take in training, kept by fewer step-tokens; 0: no limit", low=0
    )
    hidden_state_cache_mb: int = option(
        0, "MB per worker for hidden states below the lowest active adapter; 0: none", low=0
    )


@dataclass(frozen=True)
class FederationConfig:
    seed: int = option(0, "root of every random stream", low=0)
    num_rounds: int = option(3, "rounds", low=1)
    fraction_clients: float = option(1.0, "share of the clients sampled each round", above=0, high=1)
    clients_per_round: int = option(0, "number of clients sampled each round; 0: use fraction-clients", low=0)
    updates: str = option(
        "individual",
        "individual: every client's adapter comes to the server; pooled: a node sends its clients' average, where the "
        "rule is linear (less traffic, but the aggregation error is not known)",
        choices=("individual", "pooled"),
    )
    uplink_dtype: str = option(
        "float32",
        "how adapters travel to the server; below float32 each client's own difference travels, in int8 with what "
        "rounding lost of the one before",
        choices=("float32", "float16", "int8"),
    )
    failures: str = option("strict", "stop at the first failed client, or go on", choices=("strict", "tolerant"))
    min_replies: int = option(1, "tolerant: good replies a round needs", low=1)
    over_sample: float = option(
        0.0, "tolerant: share of clients sampled on top; a round ends with as many as were wanted", low=0, high=1
    )
    max_update_norm: float = option(
        0.0, "longest change of a client's tensors that is accepted (the journal has each distance); 0: any", low=0
    )
    round_timeout_s: float = option(3600.0, "seconds to wait for a round's replies", above=0)
    min_nodes: int = option(1, "nodes that must be there before a run begins", low=1)
    node_timeout_s: float = option(120.0, "seconds to wait for the nodes at the start", above=0)


@dataclass(frozen=True)
class AggregationConfig:
    rule: str = option("fedavg", "how updates become the next global adapter (docs/aggregation.md lists all)")
    weighting: str = option("examples", "what a client's layer weighs", choices=("examples", "activity", "equal"))
    client_ranks: str = option("", "ranks of the clients' adapters, comma-separated, none above rank; empty: all rank")
    rank_assignment: str = option(
        "listed",
        "client-ranks; listed: one a client, drawn: each client draws one of them",
        choices=("listed", "drawn"),
    )
    proximal_mu: float = option(0.0, "FedProx: weight of mu/2 |theta - global|^2 in the local loss", low=0)
    control_variates: bool = option(False, "SCAFFOLD: correct local gradients by what clients differ in")
    server_optimizer: str = option(
        "none",
        "what takes the average as a step from the old global adapter",
        choices=("none", "fedavgm", "fedadam", "fedyogi", "fedadagrad"),
    )
    server_learning_rate: float = option(1.0, "server-optimizer: its learning rate", above=0)
    server_momentum: float = option(0.9, "server-optimizer: decay of the first moment", low=0, high=0.999)
    server_beta2: float = option(0.99, "fedadam, fedyogi: decay of the second moment", low=0, high=0.9999)
    server_tau: float = option(1e-3, "fedadam, fedyogi, fedadagrad: how adaptive, small is much", above=0)
    fair_lambda: float = option(0.01, "lora-fair: weight of the correction's norm", above=0)
    trim_fraction: float = option(0.2, "trimmed-mean: share of the clients dropped at each end", low=0, high=0.49)
    clip_norm: float = option(0.0, "norm-clipped: longest change of an update; 0: the median of the round's", low=0)
    connectivity_bound: float = option(
        0.05, "connectivity: barrier in loss from which on a client is not taken to be connected", low=0
    )


@dataclass(frozen=True)
class PrivacyConfig:
    dp_clip: float = option(
        0.0, "differential privacy: norm that each client's change is clipped to (docs/nodes.md); 0: off", low=0
    )
    dp_noise_multiplier: float = option(1.0, "deviation of the noise on the sum of changes, in dp-clip", above=0)
    dp_delta: float = option(1e-5, "delta that epsilon is given at", above=0, high=0.5)
    dp_budget: float = option(0.0, "largest epsilon that a run may spend; 0: any", low=0)


@dataclass(frozen=True)
class EvaluationConfig:
    eval_every: int = option(1, "rounds between evaluations on the server's validation data", low=1)
    eval_batch_size: int = option(64, "examples per batch", low=1)
    client_eval_examples: int = option(200, "validation examples each client uses at the end, at most", low=1)
    merge_gap_clients: int = option(4, "clients whose own adapters are evaluated for the merge gap; 0: none", low=0)
    path_pairs: int = option(2, "pairs of clients whose connecting line is evaluated in the last round", low=0)
    path_points: int = option(11, "points on each line, ends included", low=3)
    path_examples: int = option(200, "validation examples used on the lines", low=1)


@dataclass(frozen=True)
class Config:
    """One run's configuration. Build it with `from_flat` or `from_toml`."""

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    copra: CopraConfig = CopraConfig()
    training: TrainingConfig = TrainingConfig()
    federation: FederationConfig = FederationConfig()
    aggregation: AggregationConfig = AggregationConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @classmethod
    def from_flat(cls, flat: Mapping[str, Any]) -> Config:
        """Defaults changed by `flat` (kebab-case key to value).

        Raises ConfigError naming every unknown key, wrong type and value out of range.
        """
        sections: dict[str, dict[str, Value]] = {section.name: {} for section in fields(cls)}
        problems = []
        for key, value in flat.items():
            if key not in KEYS:
                problems.append(unknown_name("configuration key", key, KEYS))
                continue
            section, spec = KEYS[key]
            try:
                sections[section][spec.name] = _checked(key, value, spec)
            except ConfigError as error:
                problems.append(str(error))
        if problems:
            raise ConfigError("\n".join(problems))
        config = cls(**{name: _section_type(name)(**values) for name, values in sections.items()})
        config._check_combinations()
        return config

    @classmethod
    def from_toml(cls, path: Path) -> Config:
        """A run folder's ``config.toml``. Raises ConfigError as `from_flat` does."""
        return cls.from_flat(read_toml(path))

    def to_flat(self) -> dict[str, Value]:
        """Every key with its value: the inverse of `from_flat`."""
        return {key: getattr(getattr(self, section), spec.name) for key, (section, spec) in KEYS.items()}

    def to_toml(self) -> str:
        return "".join(f"{key} = {toml_value(value)}\n" for key, value in self.to_flat().items())

    def changed(self, **flat: Value) -> Config:
        """This configuration with the given keys (snake_case) replaced and checked."""
        return Config.from_flat(self.to_flat() | {kebab(key): value for key, value in flat.items()})

    def differences(self, other: Config) -> list[str]:
        """The keys whose values differ, as ``key: this -> other``."""
        theirs = other.to_flat()
        return [f"{key}: {value!r} -> {theirs[key]!r}" for key, value in self.to_flat().items() if theirs[key] != value]

    def _check_combinations(self) -> None:
        if self.data.partitioner == "natural" and not self.data.client_column:
            raise ConfigError("partitioner = 'natural' needs client-column: the column that says whose an example is")
        if self.data.held_out_clients and self.data.partitioner != "natural":
            raise ConfigError(
                f"held-out-clients = {self.data.held_out_clients} needs partitioner = 'natural', not "
                f"{self.data.partitioner!r}: clients must be there before examples are dealt out"
            )
        if self.copra.p0 > self.copra.p1:
            raise ConfigError(f"p0 = {self.copra.p0} is more than p1 = {self.copra.p1}: it rises, or stays")
        if self.federation.over_sample and self.federation.failures == "strict":
            raise ConfigError(
                f"over-sample = {self.federation.over_sample:g} leaves the slowest clients out, which failures = "
                "'strict' does not allow; failures = 'tolerant' does"
            )
        if not self.data.dataset and self.data.partitioner != "own":
            raise ConfigError("dataset = '' (the server has no data) needs partitioner = 'own'")
        if self.privacy.dp_clip:
            self._check_privacy()
        if len(set(labels := self.data.label_list)) < len(labels) or len(labels) == 1:
            raise ConfigError(f"labels = {self.data.labels!r} must be two or more, each of them once")
        num_clients, sampled = self.data.num_clients, self.federation.clients_per_round
        if num_clients and sampled > num_clients:
            raise ConfigError(f"clients-per-round = {sampled} is more than num-clients = {num_clients}")

    def _check_privacy(self) -> None:
        """One client more or less may move the sum of changes by dp-clip, and by no more."""
        aggregation, clip = self.aggregation, f"dp-clip = {self.privacy.dp_clip:g}"
        if aggregation.weighting != "equal":
            raise ConfigError(f"{clip} needs weighting = 'equal': one client must count as much as another")
        if aggregation.control_variates:
            raise ConfigError(f"{clip} does not combine with control-variates, which travel without clip and noise")
        if self.federation.over_sample:
            raise ConfigError(
                f"{clip} does not combine with over-sample = {self.federation.over_sample:g}: where one client is "
                "missing another would take its place"
            )


def kebab(name: str) -> str:
    return name.replace("_", "-")


def _section_type(name: str) -> Any:
    return type(next(section.default for section in fields(Config) if section.name == name))


#: key in TOML -> (section of `Config`, dataclass field)
KEYS: dict[str, tuple[str, Field[Any]]] = {
    kebab(spec.name): (section.name, spec) for section in fields(Config) for spec in fields(_section_type(section.name))
}


def _checked(key: str, value: Any, spec: Field[Any]) -> Value:
    wanted, given = type(spec.default), type(value)
    if (wanted, given) == (float, int):  # TOML and Flower write 1 for 1.0
        value, given = float(value), float
    if given is not wanted:
        names = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
        raise ConfigError(f"{key} = {value!r} is not {names[wanted]}")
    rules = spec.metadata
    if rules["choices"] and value not in rules["choices"]:
        raise ConfigError(f"{key} = {value!r} is not one of {', '.join(rules['choices'])}")
    if wanted in (int, float) and not (
        math.isfinite(value) and rules["low"] <= value <= rules["high"] and value > rules["above"]
    ):
        limits = [f"more than {rules['above']:g}"] if rules["above"] > -math.inf else []
        limits += [f"at least {rules['low']:g}"] if rules["low"] > -math.inf else []
        limits += [f"at most {rules['high']:g}"] if rules["high"] < math.inf else []
        raise ConfigError(f"{key} = {value!r} must be {' and '.join(limits or ['finite'])}")
    return value


def csv_line(names: Iterable[str]) -> str:
    """`names` as a line of CSV, which `DataConfig.label_list` and `DataConfig.datasets` read."""
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow(names)
    return line.getvalue()


def toml_value(value: Value) -> str:
    """`value` as TOML writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)  # a JSON string is a TOML basic string
    return repr(value)


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file as a dict. Raises ConfigError where there is none or it is not TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None


def parse_override(text: str) -> tuple[str, Value]:
    """``key=value`` from the command line; a value that is not TOML is taken as a text.

    >>> parse_override("learning-rate=1e-3"), parse_override("model=minilm")
    (('learning-rate', 0.001), ('model', 'minilm'))
    """
    key, equals, raw = text.partition("=")
    if not equals:
        raise ConfigError(f"--set {text!r} is not of the form KEY=VALUE")
    try:
        value = tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        value = raw
    return key.strip(), value
