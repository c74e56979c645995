"""All configuration keys: names, defaults, types, ranges.

A run's configuration is flat TOML with kebab-case keys, because that is what Flower passes around
(``[tool.flwr.app.config]``, ``--run-config``). In code the same keys are frozen dataclasses, one per section.
`Config.from_flat` is the only way in: it converts, checks and names every wrong value. Whether settings combine with
each other, with the rule and with the task is checked by `copra_fl.aggregation.compatibility`.

A rule declares its own parameters in its own file. Their keys are dotted, RULE.KEY (``trimmed-mean.trim-fraction``).
This module does not import the rules, so it keeps such keys as they are given, and
`aggregation.compatibility.parameters_of` checks them.
"""

from __future__ import annotations

import csv
import difflib
import io
import json
import math
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, cast

Value = bool | int | float | str

#: partitioners that split examples by their labels
BY_LABEL = ("dirichlet", "pathological", "shards")

#: form of a rule parameter's key, RULE.KEY
RULE_PARAMETER = re.compile(r"[a-z0-9-]+\.[a-z0-9-]+")


class ConfigError(ValueError):
    """A configuration that cannot run. The message names the key, the value and what is allowed."""


@dataclass(frozen=True)
class Key:
    """A configuration key.

    Attributes:
        name: the key in TOML, ``learning-rate`` or ``trimmed-mean.trim-fraction``.
        owner: the section of `Config`, or the rule, that the key belongs to.
        attribute: the field of the owner's dataclass that stores the value.
        default: the default; its type is the type of all values.
        doc: the meaning, in one line for users.
        choices: the allowed values; empty: any value of the type.
        low: smallest allowed number.
        high: largest allowed number.
        above: numbers must be greater than this.
    """

    name: str
    owner: str
    attribute: str
    default: Value
    doc: str
    choices: tuple[str, ...] = ()
    low: float = -math.inf
    high: float = math.inf
    above: float = -math.inf

    @property
    def type_name(self) -> str:
        """The type of the values, as a phrase for messages."""
        return {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}[type(self.default)]

    @property
    def limits(self) -> str:
        """The allowed range of numbers as a phrase; empty if every finite number is allowed."""
        limits = [f"more than {self.above:g}"] if self.above > -math.inf else []
        limits += [f"at least {self.low:g}"] if self.low > -math.inf else []
        limits += [f"at most {self.high:g}"] if self.high < math.inf else []
        return " and ".join(limits)

    @property
    def allowed(self) -> str:
        """The allowed values as a phrase."""
        if self.choices:
            return " | ".join(self.choices)
        return f"{self.type_name}, {self.limits}" if self.limits else self.type_name

    def check(self, value: Any) -> Value:
        """Return `value`, as a float where the key has floats. Raises ConfigError for a value that is not allowed."""
        if (type(self.default), type(value)) == (float, int):  # TOML and Flower write 1 for 1.0
            value = float(value)
        if type(value) is not type(self.default):
            raise ConfigError(f"{self.name} = {value!r} must be {self.type_name}")
        if self.choices and value not in self.choices:
            raise ConfigError(f"{self.name} = {value!r} must be one of {', '.join(self.choices)}")
        if isinstance(value, int | float) and not (
            math.isfinite(value) and self.low <= value <= self.high and value > self.above
        ):
            raise ConfigError(f"{self.name} = {value!r} must be {self.limits or 'finite'}")
        return value


def option(
    default: Value,
    doc: str,
    *,
    choices: tuple[str, ...] = (),
    low: float = -math.inf,
    high: float = math.inf,
    above: float = -math.inf,
) -> Any:
    """Declare a field of a section, or of a rule's parameters, as a configuration key. For the arguments see `Key`."""
    return field(default=default, metadata={"doc": doc, "choices": choices, "low": low, "high": high, "above": above})


def keys_of(owner: str, options: type, prefix: str = "") -> dict[str, Key]:
    """Return the keys, by name, that the fields of the dataclass `options` declare."""
    keys = [Key(prefix + kebab(f.name), owner, f.name, cast(Value, f.default), **f.metadata) for f in fields(options)]
    return {key.name: key for key in keys}


def values_by_owner(given: Mapping[str, Any], keys: Mapping[str, Key], kind: str) -> dict[str, dict[str, Value]]:
    """Return owner -> attribute -> value of the keys in `given`, checked; `kind` is the name for one of `keys`.

    Raises ConfigError that lists every unknown key and every value that is not allowed, one per line.
    """
    values: dict[str, dict[str, Value]] = {}
    problems = []
    for name, value in given.items():
        if name not in keys:
            problems.append(unknown_key(kind, name, keys))
            continue
        key = keys[name]
        try:
            values.setdefault(key.owner, {})[key.attribute] = key.check(value)
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))
    return values


def unknown_key(kind: str, name: str, keys: Iterable[str]) -> str:
    """Return the error message for a key that is not one of `keys`, with the closest of them."""
    close = difflib.get_close_matches(name, keys, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"unknown {kind} {name!r}.{hint} `copra-fl config` lists all keys"


def kebab(name: str) -> str:
    """Return the TOML spelling of a Python name: ``learning-rate`` of ``learning_rate``."""
    return name.replace("_", "-")


@dataclass(frozen=True)
class DataConfig:
    """Examples and their split over clients."""

    dataset: str = option(
        "health-tweets",
        "asset name, path of a CSV, JSONL or Parquet file or of a folder of images, or Hugging Face data set name; "
        "several, comma-separated: each client has examples of one of them (docs/how-to/several-data-sets.md); empty: "
        "the server has no data, and only clients evaluate (partitioner = own)",
    )
    test_file: str = option("", "file with the test set; empty: the data set's own test set, else held-out examples")
    text_column: str = option("text", "column with the text")
    prompt_column: str = option("", "causal-lm: column with the prompt that the text responds to; empty: no prompts")
    image_column: str = option("image", "image-classification: column with the image, or with the path of its file")
    label_column: str = option("label", "column with the label")
    client_column: str = option("", "partitioner = natural: column with the client id of each example")
    labels: str = option("", "all labels in order, as a line of CSV; empty: the labels in the data set")
    partitioner: str = option(
        "dirichlet",
        "split of the examples over clients; own: each node reads its own file (docs/how-to/own-data-on-nodes.md), and "
        "dataset is the server's data",
        choices=("iid", *BY_LABEL, "natural", "own"),
    )
    alpha: float = option(0.3, "dirichlet: concentration; smaller values skew labels more", above=0)
    classes_per_client: int = option(2, "pathological, shards: classes (or shards) per client", low=1)
    num_clients: int = option(
        0, "number of clients; 0: each node is one client (natural: each value of client-column)", low=0
    )
    held_out_clients: int = option(
        0,
        "natural: clients that take no part in training, in addition to num-clients; the final model is also tested "
        "on up to test-examples of their examples",
        low=0,
    )
    empty_clients: str = option(
        "skip", "clients without training examples: leave them out, or refuse to run", choices=("skip", "refuse")
    )
    validation_fraction: float = option(0.1, "share of each client's examples kept for validation", low=0, high=0.9)
    server_validation_examples: int = option(500, "validation examples on the server", low=1)
    test_examples: int = option(2000, "examples held out for the test where the data set has no test set", low=1)
    max_length: int = option(64, "tokens per text, longer texts are cut; images: ignored, the model decides", low=4)

    @property
    def datasets(self) -> list[str]:
        """The data sets named in `dataset`; empty where it is empty."""
        return [name.strip() for name in next(csv.reader([self.dataset], skipinitialspace=True), [])]

    @property
    def label_list(self) -> list[str]:
        """The labels in `labels`; empty where it is empty."""
        return next(csv.reader([self.labels], skipinitialspace=True), [])


@dataclass(frozen=True)
class ModelConfig:
    """Task, base model, adapters and their computation."""

    task: str = option(
        "text-classification",
        "learning task (docs/explanations/tasks.md); a dotted name is your own Python module, for example "
        "hospital.tagging",
    )
    model: str = option("minilm", "asset name, path or Hugging Face name of a Transformers model")
    model_sha256: str = option(
        "", "SHA-256 that the base weights must have, as sha256sum prints it; empty: that of the server's weights"
    )
    pooling: str = option("mean", "pooling of token features for the head", choices=("mean", "cls", "pooler"))
    target_modules: str = option("query,value", "linear modules that get an adapter, comma-separated, or all-linear")
    rank: int = option(8, "LoRA rank r", low=1)
    lora_alpha: float = option(16.0, "LoRA alpha", above=0)
    lora_scaling: str = option(
        "standard",
        "scaling s of the adapters; standard: alpha / r, rslora: alpha / sqrt(r), constant: alpha",
        choices=("standard", "rslora", "constant"),
    )
    lora_dropout: float = option(0.0, "dropout on the adapters' input", low=0, high=0.99)
    dtype: str = option(
        "auto",
        "dtype of the frozen base; auto: bfloat16 on devices that compute fast in it, else float32",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    quantization: str = option(
        "none",
        "quantization of the frozen base's linear layers; 4bit: NF4 by bitsandbytes, computed in dtype (QLoRA)",
        choices=("none", "4bit"),
    )
    attention: str = option(
        "auto",
        "attention implementation of the base; auto: the one that trains fastest on the device",
        choices=("auto", "eager", "sdpa"),
    )
    gradient_checkpointing: bool = option(
        False, "keep only the input of each block and recompute the block in the backward pass: less memory, slower"
    )
    device: str = option("auto", "device; auto: CUDA if available, else the CPU", choices=("auto", "cpu", "cuda"))

    def scaling(self, rank: int) -> float:
        """Return the factor s in W0 + s B A for an adapter of this rank."""
        return self.lora_alpha / {"standard": rank, "rslora": math.sqrt(rank), "constant": 1.0}[self.lora_scaling]


@dataclass(frozen=True)
class CopraConfig:
    """Local training: the CopRA schedule, and the gates that switch adapters."""

    local_training: str = option(
        "copra",
        "local training; copra: adapters on with a rising probability, lora: always on, head: the task head alone",
        choices=("copra", "lora", "head"),
    )
    p0: float = option(0.0, "probability at the start that a layer's adapters are on", low=0, high=1)
    p1: float = option(1.0, "the same probability from the end of the ramp on", above=0, high=1)
    ramp: float = option(0.75, "share of training over which the probability rises from p0 to p1", above=0, high=1)
    min_active: int = option(0, "minimum number of layers that are on in each step", low=0, high=1)
    gate_group: str = option("layer", "modules that are switched together", choices=("layer", "module"))
    schedule_progress: str = option(
        "federation",
        "progress that the schedule follows; federation: of the whole run, local: of each client's round",
        choices=("federation", "local"),
    )
    mask_scope: str = option(
        "step",
        "lifetime of a mask; step: one step of one client, shared: the same step of all clients, round: a round of one "
        "client",
        choices=("step", "shared", "round"),
    )
    rescale: bool = option(False, "divide the output of active adapters by their probability")


@dataclass(frozen=True)
class TrainingConfig:
    """Local optimization, and the engine that computes it."""

    optimizer: str = option("adamw", "local optimizer", choices=("adamw", "sgd"))
    learning_rate: float = option(2e-3, "learning rate of the adapters", above=0)
    head_learning_rate: float = option(2e-3, "learning rate of the task head", above=0)
    lr_schedule: str = option(
        "constant", "learning-rate schedule over the whole federation", choices=("constant", "cosine")
    )
    weight_decay: float = option(0.0, "weight decay: decoupled in adamw, L2 in sgd", low=0)
    momentum: float = option(0.0, "sgd: momentum", low=0, high=1)
    batch_size: int = option(16, "examples per micro-batch", low=1)
    gradient_accumulation: int = option(1, "micro-batches per optimizer step", low=1)
    local_steps: int = option(10, "optimizer steps per client and round", low=1)
    local_epochs: int = option(0, "epochs per client and round; 0: use local-steps", low=0)
    max_grad_norm: float = option(1.0, "norm that gradients are clipped to; 0: no clipping", low=0)
    bucket_batches: int = option(
        1, "batches that are formed together, so that each has texts of similar length; 1: no sorting by length", low=1
    )
    engine: str = option(
        "stacked",
        "training engine; stacked: clients of a cohort step together, if the model supports it; peft: one by one",
        choices=("stacked", "peft"),
    )
    step_tokens: int = option(4096, "stacked: maximum tokens per step over all its clients; limits memory", low=1)
    max_memory_gb: float = option(
        0.0, "memory limit of a worker in training, in GB, met by lowering step-tokens; 0: no limit", low=0
    )
    hidden_state_cache_mb: int = option(
        0, "MB per worker to cache hidden states below the lowest active adapter; 0: no cache", low=0
    )


@dataclass(frozen=True)
class FederationConfig:
    """Rounds, sampling of clients, transport and failures."""

    seed: int = option(0, "root of all random streams", low=0)
    num_rounds: int = option(3, "number of rounds", low=1)
    fraction_clients: float = option(1.0, "share of the clients sampled per round", above=0, high=1)
    clients_per_round: int = option(0, "number of clients sampled per round; 0: use fraction-clients", low=0)
    updates: str = option(
        "individual",
        "updates that nodes send; individual: one per client, pooled: the average over a node's clients if the rule is "
        "linear (less traffic, but the aggregation error is not known)",
        choices=("individual", "pooled"),
    )
    uplink_dtype: str = option(
        "float32",
        "dtype of updates on their way to the server; float16 and int8 send the change of each client's adapter, int8 "
        "with error feedback",
        choices=("float32", "float16", "int8"),
    )
    failures: str = option(
        "strict",
        "failed clients; strict: stop the run, tolerant: continue with the other clients",
        choices=("strict", "tolerant"),
    )
    min_replies: int = option(1, "tolerant: minimum number of valid updates per round", low=1)
    over_sample: float = option(
        0.0,
        "tolerant: share of additional clients to sample; a round ends with the first replies of the number asked for",
        low=0,
        high=1,
    )
    max_update_norm: float = option(
        0.0, "largest accepted norm of a client's change (the journal lists each client's distance); 0: no limit", low=0
    )
    round_timeout_s: float = option(3600.0, "seconds to wait for the replies of a round", above=0)
    min_nodes: int = option(1, "number of nodes that must be connected before a run starts", low=1)
    node_timeout_s: float = option(120.0, "seconds to wait for min-nodes nodes at the start", above=0)


@dataclass(frozen=True)
class AggregationConfig:
    """From the clients' updates to the next global adapter. Each rule declares its own parameters in its own file."""

    rule: str = option("fedavg", "aggregation rule (docs/explanations/aggregation.md lists all)")
    weighting: str = option(
        "examples",
        "weight of a client in an average; examples: its training examples, activity: the same, times the steps in "
        "which the layer was on, equal: 1 / number of clients",
        choices=("examples", "activity", "equal"),
    )
    client_ranks: str = option("", "LoRA ranks of the clients, comma-separated, each at most rank; empty: all rank")
    rank_assignment: str = option(
        "listed",
        "client-ranks; listed: one rank per client, drawn: each client draws one of the ranks at random",
        choices=("listed", "drawn"),
    )
    proximal_mu: float = option(0.0, "FedProx: weight mu of mu/2 |theta - global|^2 in the local loss; 0: off", low=0)
    control_variates: bool = option(False, "SCAFFOLD: correct local gradients by control variates")
    server_optimizer: str = option(
        "none",
        "server optimizer; it treats the change of the average as a gradient step from the old global adapter",
        choices=("none", "fedavgm", "fedadam", "fedyogi", "fedadagrad"),
    )
    server_learning_rate: float = option(1.0, "server-optimizer: learning rate", above=0)
    server_momentum: float = option(0.9, "server-optimizer: decay rate of the first moment", low=0, high=0.999)
    server_beta2: float = option(0.99, "fedadam, fedyogi: decay rate of the second moment", low=0, high=0.9999)
    server_tau: float = option(
        1e-3, "fedadam, fedyogi, fedadagrad: adaptivity constant; smaller values adapt more", above=0
    )

    @property
    def rank_list(self) -> list[int]:
        """The ranks in `client_ranks`; empty where it is empty. Raises ConfigError for anything but whole numbers."""
        try:
            return [int(rank) for rank in self.client_ranks.split(",")] if self.client_ranks else []
        except ValueError:
            raise ConfigError(
                f"client-ranks = {self.client_ranks!r} must be a comma-separated list of whole numbers, for example "
                "8,4,2"
            ) from None


@dataclass(frozen=True)
class PrivacyConfig:
    """Client-level differential privacy."""

    dp_clip: float = option(
        0.0, "norm that each client's change is clipped to (docs/how-to/privacy.md); 0: no privacy", low=0
    )
    dp_noise_multiplier: float = option(
        1.0, "standard deviation of the noise on the sum of changes, as a multiple of dp-clip", above=0
    )
    dp_delta: float = option(1e-5, "delta of the reported (epsilon, delta)", above=0, high=0.5)
    dp_budget: float = option(0.0, "largest epsilon that a run may spend; 0: no limit", low=0)


@dataclass(frozen=True)
class EvaluationConfig:
    """Measurements during and after training."""

    eval_every: int = option(1, "rounds between evaluations on the server's validation data", low=1)
    eval_batch_size: int = option(64, "examples per evaluation batch", low=1)
    client_eval_examples: int = option(
        200, "maximum number of its validation examples that each client evaluates at the end", low=1
    )
    merge_gap_clients: int = option(
        4, "clients to evaluate with their own adapters for the merge gap; 0: no merge gap", low=0
    )
    path_pairs: int = option(2, "pairs of clients to evaluate the connecting line of in the last round", low=0)
    path_points: int = option(11, "points on each line, including both ends", low=3)
    path_examples: int = option(200, "validation examples per point of a line", low=1)


@dataclass(frozen=True)
class Config:
    """The configuration of one run. Build it with `from_flat` or `from_toml`.

    Attributes:
        rule_parameters: (key, value) of the rule parameters that are given, sorted by key, unchecked.
    """

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    copra: CopraConfig = CopraConfig()
    training: TrainingConfig = TrainingConfig()
    federation: FederationConfig = FederationConfig()
    aggregation: AggregationConfig = AggregationConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    rule_parameters: tuple[tuple[str, Value], ...] = ()

    @classmethod
    def from_flat(cls, flat: Mapping[str, Any]) -> Config:
        """Return the configuration with the values of `flat` (key -> value) and defaults for all other keys.

        A table is accepted in place of dotted keys. Raises ConfigError that lists every unknown key, wrong type and
        value out of range, one per line.
        """
        flat = flatten(flat)
        parameters = {name: value for name, value in flat.items() if RULE_PARAMETER.fullmatch(name)}
        for name, value in parameters.items():
            if not isinstance(value, Value):
                raise ConfigError(f"{name} = {value!r} must be true, false, a number or a string")
        others = {name: value for name, value in flat.items() if name not in parameters}
        values = values_by_owner(others, KEYS, "configuration key")
        sections = {name: section(**values.get(name, {})) for name, section in SECTIONS.items()}
        config = cls(**sections, rule_parameters=tuple(sorted(parameters.items())))
        config._check_values()
        return config

    @classmethod
    def from_toml(cls, path: Path) -> Config:
        """Read a run folder's ``config.toml``. Raises ConfigError as `from_flat` does."""
        return cls.from_flat(read_toml(path))

    def to_flat(self) -> dict[str, Value]:
        """Return every key with its value: the inverse of `from_flat`. Of rule parameters those that are given."""
        values = {name: getattr(getattr(self, key.owner), key.attribute) for name, key in KEYS.items()}
        return values | dict(self.rule_parameters)

    def to_toml(self) -> str:
        """Return `to_flat` as TOML."""
        return "".join(f"{key} = {toml_value(value)}\n" for key, value in self.to_flat().items())

    def changed(self, **flat: Value) -> Config:
        """Return this configuration with the given keys (in snake_case) replaced. Raises ConfigError as `from_flat`."""
        return Config.from_flat(self.to_flat() | {kebab(key): value for key, value in flat.items()})

    def differences(self, other: Config) -> list[str]:
        """Return the keys with different values, as ``key: value here -> value in other``."""
        ours, theirs = ({key: repr(value) for key, value in config.to_flat().items()} for config in (self, other))
        return [
            f"{key}: {ours.get(key, 'not set')} -> {theirs.get(key, 'not set')}"
            for key in ours | theirs
            if ours.get(key) != theirs.get(key)
        ]

    def _check_values(self) -> None:
        """Raise ConfigError for values that contradict each other.

        `changed` repeats these checks, so counts that depend on num-clients are among them: it may become known late.
        """
        data, copra, federation = self.data, self.copra, self.federation
        if data.partitioner == "natural" and not data.client_column:
            raise ConfigError(
                "partitioner = 'natural' needs client-column: the name of the column with the client id of each example"
            )
        if data.held_out_clients and data.partitioner != "natural":
            raise ConfigError(
                f"held-out-clients = {data.held_out_clients} needs partitioner = 'natural', not {data.partitioner!r}: "
                "held-out clients are values of client-column"
            )
        if not data.dataset and data.partitioner != "own":
            raise ConfigError("dataset = '' (a server without data) needs partitioner = 'own'; else set dataset")
        if data.dataset and not all(data.datasets):
            raise ConfigError(f"dataset = {data.dataset!r} has an empty name; remove the extra comma")
        if len(set(labels := data.label_list)) < len(labels) or len(labels) == 1:
            raise ConfigError(f"labels = {data.labels!r} must be at least two different labels")
        if copra.p0 > copra.p1:
            raise ConfigError(f"p0 = {copra.p0} must not exceed p1 = {copra.p1}")
        if federation.over_sample and federation.failures == "strict":
            raise ConfigError(
                f"over-sample = {federation.over_sample:g} leaves the slowest clients out, which failures = 'strict' "
                "does not allow; set failures = 'tolerant'"
            )
        if data.num_clients and federation.clients_per_round > data.num_clients:
            raise ConfigError(
                f"clients-per-round = {federation.clients_per_round} must not exceed num-clients = {data.num_clients}"
            )
        self._check_client_ranks()

    def _check_client_ranks(self) -> None:
        """Raise ConfigError unless client-ranks is a list of ranks with, where listed, one for each client."""
        text, ranks = self.aggregation.client_ranks, self.aggregation.rank_list
        if not all(1 <= rank <= self.model.rank for rank in ranks):
            raise ConfigError(f"client-ranks = {text!r}: each must be at least 1 and at most rank = {self.model.rank}")
        num_clients, listed = self.data.num_clients, self.aggregation.rank_assignment == "listed"
        if ranks and num_clients and listed and len(ranks) != num_clients:
            raise ConfigError(
                f"client-ranks = {text!r} has {len(ranks)} ranks for {num_clients} clients; list one rank per client, "
                "or set rank-assignment = 'drawn'"
            )


#: section name -> its dataclass
SECTIONS: dict[str, Any] = {f.name: type(f.default) for f in fields(Config) if f.name != "rule_parameters"}

#: every key but the rules' parameters, by name
KEYS: dict[str, Key] = {
    name: key for section, options in SECTIONS.items() for name, key in keys_of(section, options).items()
}


def csv_line(names: Iterable[str]) -> str:
    """Return `names` as a line of CSV, which `DataConfig.label_list` and `DataConfig.datasets` read."""
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow(names)
    return line.getvalue()


def toml_value(value: Value) -> str:
    """Return `value` in TOML's notation."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)  # a JSON string is a TOML basic string
    return repr(value)


def flatten(table: Mapping[str, Any]) -> dict[str, Any]:
    """Return `table` without nested tables: ``{"a": {"b": 1}}`` becomes ``{"a.b": 1}``."""
    flat: dict[str, Any] = {}
    for name, value in table.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}.{rest}": nested for rest, nested in flatten(value).items()}
        else:
            flat[name] = value
    return flat


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file. Raises ConfigError for a file that is missing, unreadable or not TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None


def parse_override(text: str) -> tuple[str, Value]:
    """Parse ``key=value`` from the command line; a value that is not TOML is a string.

    >>> parse_override("learning-rate=1e-3"), parse_override("model=minilm")
    (('learning-rate', 0.001), ('model', 'minilm'))
    """
    key, equals, raw = text.partition("=")
    if not equals:
        raise ConfigError(f"--set {text!r} must have the form KEY=VALUE")
    try:
        value = tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        value = raw
    return key.strip(), value
