"""The sections of a configuration: every key with its default, meaning and allowed values.

The parameters of aggregation rules are declared in the rules' files.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from copra_fl.config.keys import ConfigError, Value, option
from copra_fl.config.toml import csv_list

#: partitioners that split examples by their labels
BY_LABEL = ("dirichlet", "pathological", "shards")
#: defaults of other keys with secure-aggregation = true, where the server sees sums and no single update
SECURE_DEFAULTS: dict[str, Value] = {
    "updates": "pooled",
    "max-update-norm": 100.0,
    "max-update-ratio": 0.0,
    "merge-gap-clients": 0,
    "path-pairs": 0,
}


def _whole_numbers(key: str, text: str) -> list[int]:
    """Return the numbers in the comma-separated value `text` of `key`. Raises ConfigError for anything else."""
    try:
        return [int(number) for number in text.split(",")] if text else []
    except ValueError:
        raise ConfigError(
            f"{key} = {text!r} must be a comma-separated list of whole numbers, for example 8,4,2"
        ) from None


@dataclass(frozen=True)
class DataConfig:
    """Examples and their split over clients."""

    dataset: str = option(
        "health-tweets",
        "asset name, path of a CSV, TSV, JSONL or Parquet file or a folder of images, or Hugging Face data set name; "
        "several, comma-separated: each client has examples of one of them (docs/how-to/several-data-sets.md); empty: "
        "the server has no data, and only clients evaluate (partitioner = own)",
    )
    test_file: str = option("", "file with the test set; empty: the data set's own test set, else held-out examples")
    separator: str = option(
        "auto",
        "CSV files: character between columns; auto: a comma, in a .tsv file a tab",
        choices=("auto", "comma", "semicolon", "tab", "pipe"),
    )
    text_column: str = option("text", "column with the text")
    prompt_column: str = option("", "causal-lm: column with the prompt that the text responds to; empty: no prompts")
    prompt_template: str = option(
        "",
        "causal-lm: text before the response, with {prompt} in place of the prompt; empty: the tokenizer's chat "
        "template. label-words: prompt, with {text} in place of the text; the label's word follows after a space; "
        "empty: {text}, a line break and Label:",
    )
    label_words: str = option(
        "",
        "label-words: a word for each label, in order, as a line of CSV; they must begin with different tokens; empty: "
        "the labels themselves",
    )
    image_column: str = option("image", "image-classification: column with the image, or with the path of its file")
    label_column: str = option("label", "column with the label")
    client_column: str = option("", "partitioner = natural: column with the client id of each example")
    labels: str = option("", "all labels in order, as a line of CSV; empty: the labels in the data set")
    partitioner: str = option(
        "dirichlet",
        "split of the examples over clients; own: each node reads its own file (docs/how-to/own-data-on-nodes.md), and "
        "dataset is the server's data",
        choices=("iid", *BY_LABEL, "natural", "own"),
        plugins="copra_fl.partitioners",
    )
    alpha: float = option(
        0.3, "dirichlet: concentration; smaller values skew labels more. LoRA's alpha is lora-alpha", above=0
    )
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
    client_examples: int = option(
        0,
        "maximum number of training examples per client, drawn at random from its own; 0: no limit",
        low=0,
    )
    shots: int = option(
        0,
        "few-shot: maximum number of training examples of each label per client, drawn likewise; 0: no limit",
        low=0,
    )
    server_validation_examples: int = option(500, "validation examples on the server", low=1)
    test_examples: int = option(2000, "examples held out for the test where the data set has no test set", low=1)
    duplicates: str = option(
        "exact",
        "held-out examples that are dropped because a client has the same one; exact: equal content, near: also texts "
        "that differ in case, punctuation and links alone",
        choices=("exact", "near"),
    )
    max_length: int = option(
        64,
        "tokens per text, longer texts are cut; images: the model decides, and attention = auto alone goes by this",
        low=4,
    )

    def value(self, key: str) -> Any:
        """Return the value of the configuration key `key`."""
        return getattr(self, key.replace("-", "_"))

    @property
    def datasets(self) -> list[str]:
        """The data sets named in `dataset`; empty where it is empty."""
        return [name.strip() for name in csv_list(self.dataset)]

    @property
    def label_list(self) -> list[str]:
        """The labels in `labels`; empty where it is empty."""
        return [label.strip() for label in csv_list(self.labels)]


@dataclass(frozen=True)
class ModelConfig:
    """Task, base model, adapters and their computation."""

    task: str = option(
        "text-classification",
        "learning task (docs/explanations/tasks.md), or a plugin (docs/how-to/plugins.md)",
    )
    model: str = option("minilm", "asset name, path or Hugging Face name of a Transformers model")
    model_sha256: str = option(
        "", "SHA-256 that the base weights must have, as sha256sum prints it; empty: that of the server's weights"
    )
    pooling: str = option("mean", "pooling of token features for the head", choices=("mean", "cls", "pooler"))
    target_modules: str = option(
        "query,value",
        "linear modules that get an adapter, by name or by the end of their path (layer.5.attention.self.query), "
        "comma-separated, or all-linear",
    )
    rank: int = option(8, "LoRA rank r", low=1)
    lora_alpha: float = option(16.0, "LoRA alpha", above=0)
    lora_scaling: str = option(
        "standard",
        "scaling s of the adapters; standard: alpha / r, rslora: alpha / sqrt(r), sfed: alpha sqrt(N / r) for N "
        "clients per round (docs/explanations/aggregation.md), constant: alpha",
        choices=("standard", "rslora", "sfed", "constant"),
    )
    scaling_clients: int = option(
        0,
        "sfed: number N of clients; 0: those of a round, by num-clients and fraction-clients or clients-per-round",
        low=0,
    )
    dora: bool = option(
        False, "DoRA (arXiv 2402.09353): train the norm of each row of an adapted weight too; not in the stacked engine"
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
        "attention implementation of the base; auto: the one that trains fastest on the device with max-length tokens, "
        "however many an image has",
        choices=("auto", "eager", "sdpa"),
    )
    gradient_checkpointing: bool = option(
        False, "keep only the input of each block and recompute the block in the backward pass: less memory, slower"
    )
    device: str = option("auto", "device; auto: CUDA if available, else the CPU", choices=("auto", "cpu", "cuda"))

    def scaling(self, rank: int) -> float:
        """Return the factor s in W0 + s B A for an adapter of this rank."""
        divisors = {
            "standard": rank,
            "rslora": math.sqrt(rank),
            "sfed": math.sqrt(rank / max(self.scaling_clients, 1)),
            "constant": 1.0,
        }
        return self.lora_alpha / divisors[self.lora_scaling]


@dataclass(frozen=True)
class CopraConfig:
    """Local training: the CopRA schedule, and the gates that switch adapters."""

    local_training: str = option(
        "lora",
        "local training; lora: adapters always on, copra: on with a rising probability, line: always on, each step at "
        "a random point of the line from the round's start to the client's adapter, head: the task head alone",
        choices=("lora", "copra", "line", "head"),
    )
    p0: float = option(0.0, "probability at the start that a layer's adapters are on", low=0, high=1)
    p1: float = option(1.0, "the same probability from the end of the ramp on", above=0, high=1)
    ramp: float = option(0.75, "share of training over which the probability rises from p0 to p1", above=0, high=1)
    off: str = option(
        "base",
        "what a layer that is off computes; base: the frozen base alone, global: the base with the adapter that the "
        "client starts the round from, which is not trained there",
        choices=("base", "global"),
    )
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
    layers_per_round: int = option(
        0,
        "number of layers that a client trains and sends in a round, the others stay off; 0: all",
        low=0,
    )
    layer_selection: str = option(
        "random",
        "layers-per-round; random: layers drawn for each client and round, cycle: the same layers for all clients, "
        "from the bottom of the model to its top",
        choices=("random", "cycle"),
    )
    rounds_per_layer: int = option(1, "cycle: consecutive rounds that train the same layers", low=1)
    full_rounds: int = option(0, "cycle: rounds of all layers before each pass through the model", low=0)
    client_depths: str = option(
        "",
        "largest number of layers that each client trains, comma-separated (docs/how-to/weak-clients.md); empty: all",
    )
    depth_assignment: str = option(
        "listed",
        "client-depths; listed: one depth per client, repeated: the list again and again until each client has a "
        "depth, drawn: each client draws one of the depths at random",
        choices=("listed", "repeated", "drawn"),
    )
    depth_allocation: str = option(
        "top",
        "client-depths; top: a client trains its last layers, which saves memory and time, random: layers drawn in "
        "each round, as FedRA allocates them",
        choices=("top", "random"),
    )
    min_depth: int = option(0, "client-depths: clients of a smaller depth take no part in training", low=0)

    @property
    def trains_subset(self) -> bool:
        """True if clients train only some of the layers in a round."""
        return self.layers_per_round > 0 or bool(self.client_depths)

    @property
    def depth_list(self) -> list[int]:
        """The depths in `client_depths`; empty where it is empty. Raises ConfigError for anything but whole numbers."""
        return _whole_numbers("client-depths", self.client_depths)


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
    optimizer_state: str = option(
        "fresh",
        "moments and step counts of the local optimizer when a round starts; fresh: none, client: those of the client "
        "after its last round, shared: the average over the clients of earlier rounds, kept by the server",
        choices=("fresh", "client", "shared"),
    )
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
        "training engine; stacked: clients of a cohort step together, if the model supports it; peft: one by one; "
        "trainer: one by one, each by the Trainer that script makes (docs/how-to/federated-trainer.md)",
        choices=("stacked", "peft", "trainer"),
    )
    script: str = option(
        "",
        "trainer: Python file that makes a client's Trainer and federates it; optimizer, learning rate and batches are "
        "those of this Trainer",
    )
    step_tokens: int = option(
        4096, "stacked: maximum tokens per step over all its clients, rounded up to whole clients; limits memory", low=1
    )
    max_memory_gb: float = option(
        0.0, "memory limit of a worker in training, in GB, met by lowering step-tokens; 0: no limit", low=0
    )


@dataclass(frozen=True)
class FederationConfig:
    """Rounds, sampling of clients, transport and failures."""

    seed: int = option(0, "root of all random streams", low=0)
    num_rounds: int = option(3, "number of rounds", low=1)
    fraction_clients: float = option(1.0, "share of the clients sampled per round", above=0, high=1)
    clients_per_round: int = option(0, "number of clients sampled per round; 0: use fraction-clients", low=0)
    start: str = option(
        "common",
        "adapters before the first round; common: the same for all clients, own: each client draws its own A",
        choices=("common", "own"),
    )
    stale_clients: float = option(
        0.0, "share of the clients, drawn once, that always train from an old global adapter", low=0, high=1
    )
    staleness: int = option(1, "stale-clients: age of that adapter, in rounds before the newest", low=1)
    updates: str = option(
        "individual",
        "updates that nodes send; individual: one per client, pooled: the average over a node's clients if the rule is "
        "linear (less traffic, but the aggregation error is not known); by default pooled with secure-aggregation",
        choices=("individual", "pooled"),
    )
    uplink_dtype: str = option(
        "float32",
        "dtype of updates on their way to the server; float16 and int8 send the change of each client's adapter, int8 "
        "with error feedback unless the rule draws or recomputes the factors",
        choices=("float32", "float16", "int8"),
    )
    moments_dtype: str = option(
        "float32",
        "optimizer-state = shared: dtype of the moments on their way in both directions; bfloat16: half the bytes, "
        "rounded to 8 bits",
        choices=("float32", "bfloat16"),
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
        1e6,
        "largest accepted norm of a client's change (the journal lists each client's distance); 0: no limit. With "
        "secure-aggregation 100 by default: the larger it is, the coarser are the fixed-point numbers",
        low=0,
    )
    max_update_ratio: float = option(
        100.0,
        "largest accepted norm of a client's change, control variate or shared moments, in medians of the round's, of "
        "which there must be 3; 0: no limit, which is the default with secure-aggregation",
        low=0,
    )
    keep_checkpoints: int = option(
        0, "newest checkpoints that stay in the run's folder; 0: all. Probes of earlier rounds need theirs", low=0
    )
    round_timeout_s: float = option(3600.0, "seconds to wait for the replies of a round", above=0)
    min_nodes: int = option(1, "number of nodes that must be connected before a run starts", low=1)
    node_timeout_s: float = option(
        120.0, "seconds to wait for min-nodes nodes at the start, and for the handshakes of later nodes", above=0
    )

    def round_size(self, num_clients: int) -> int:
        """Return the number of clients whose updates make up a round, without over-sampling."""
        number = self.clients_per_round or max(1, round(self.fraction_clients * num_clients))
        return min(number, num_clients)

    def sample_size(self, num_clients: int) -> int:
        """Return the number of clients sampled per round, over-sampled ones included; a private run draws it."""
        number = self.round_size(num_clients)
        return min(number + math.ceil(self.over_sample * number), num_clients)


@dataclass(frozen=True)
class AggregationConfig:
    """From the clients' updates to the next global adapter. Each rule declares its own parameters in its own file."""

    rule: str = option(
        "fedavg", "aggregation rule (docs/explanations/aggregation.md lists all), or a plugin (docs/how-to/plugins.md)"
    )
    weighting: str = option(
        "examples",
        "weight of a client in an average; examples: its training examples, activity: the same, times the steps in "
        "which the layer was on, equal: 1 / number of clients",
        choices=("examples", "activity", "equal"),
    )
    client_ranks: str = option("", "LoRA ranks of the clients, comma-separated, each at most rank; empty: all rank")
    rank_assignment: str = option(
        "listed",
        "client-ranks; listed: one rank per client, repeated: the list again and again until each client has a rank, "
        "drawn: each client draws one of the ranks at random",
        choices=("listed", "repeated", "drawn"),
    )
    proximal_mu: float = option(0.0, "FedProx: weight mu of mu/2 |theta - global|^2 in the local loss; 0: off", low=0)
    gram_shrinkage: float = option(
        100.0,
        "ffa-lora-gram, rolora-gram: Gram matrices of T tokens are multiplied by T / (T + this) off their diagonal",
        low=0,
    )
    gucci_beta: float = option(
        0.0, "FedGuCci: weight beta of the loss half-way between the client's parameters and the anchors; 0: off", low=0
    )
    gucci_anchors: int = option(1, "gucci-beta: number N of the newest global adapters, which are the anchors", low=1)
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
        return _whole_numbers("client-ranks", self.client_ranks)


@dataclass(frozen=True)
class PrivacyConfig:
    """Secure aggregation, and client-level differential privacy."""

    secure_aggregation: bool = option(
        False,
        "nodes mask their pooled updates, so that the server learns their sum and no more (docs/how-to/privacy.md)",
    )
    secure_threshold: float = option(
        2 / 3,
        "secure-aggregation: share of the nodes of a round that must stay to its end; more is safer against nodes that "
        "work with the server, less survives more failures",
        above=0.5,
        high=1,
    )

    dp_clip: float = option(
        0.0, "norm that each client's change is clipped to (docs/how-to/privacy.md); 0: no privacy", low=0
    )
    dp_noise_multiplier: float = option(
        1.0, "standard deviation of the noise on the sum of changes, as a multiple of dp-clip", above=0
    )
    dp_colluding_nodes: int = option(
        1,
        "dp-clip with secure-aggregation: number of nodes that may reveal their share of the noise, or leave it "
        "out; each node knows its own. The more they are, the larger is every share",
        low=0,
    )
    dp_delta: float = option(1e-5, "delta of the reported (epsilon, delta)", above=0, high=0.5)
    dp_budget: float = option(
        0.0, "largest epsilon that a run may spend; a round that does not fit ends it; 0: no limit", low=0
    )

    @property
    def is_local(self) -> bool:
        """True if nodes add the noise of a private run, and the server sees no update without it."""
        return self.secure_aggregation and self.dp_clip > 0


@dataclass(frozen=True)
class EvaluationConfig:
    """Measurements during and after training."""

    eval_every: int = option(1, "rounds between evaluations on the server's validation data", low=1)
    target_accuracy: float = option(
        0.0, "validation accuracy, as a share, at which a run ends before num-rounds; 0: no target", low=0, high=1
    )
    patience: int = option(
        0, "evaluations in a row without a new best validation accuracy after which a run ends; 0: no limit", low=0
    )
    eval_batch_size: int = option(64, "examples per evaluation batch", low=1)
    final_test: bool = option(
        True,
        "evaluate the final model on the test data and on held-out clients; false: in runs that choose settings, which "
        "test data must not influence",
    )
    client_eval_examples: int = option(
        200, "maximum number of its validation examples that each client evaluates at the end", low=1
    )
    client_eval_clients: int = option(
        0,
        "clients that evaluate the final model on their own validation examples, drawn from those that have any, the "
        "same ones at each evaluation of a run; 0: all of them",
        low=0,
    )
    merge_gap_clients: int = option(
        4,
        "clients to evaluate with their own adapters for the merge gap; 0: no merge gap, which is the default with "
        "secure-aggregation",
        low=0,
    )
    path_pairs: int = option(
        2,
        "pairs of clients to evaluate the connecting line of in the last round; by default 0 with secure-aggregation",
        low=0,
    )
    path_points: int = option(11, "points on each line, including both ends", low=3)
    path_examples: int = option(200, "validation examples per point of a line", low=1)
