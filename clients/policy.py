"""The policy of a node: what its site takes part in, stated in a TOML file of its own.

It is checked at the handshake and again with each message, because a message brings its own configuration; the messages
of secure aggregation have none and are only counted. The node rejects what its policy does not allow, and the server
learns the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from clients.node_config import NodeConfig, Rejected
from copra_fl import plugins
from copra_fl.aggregation.accounting import Release, epsilon
from copra_fl.config import Config, ConfigError, csv_list, keys_of, option, read_toml, values_by_owner
from copra_fl.files import SHA256
from copra_fl.models.build import check_weights
from copra_fl.records import NodeRecord
from copra_fl.training.plan import num_trained
from copra_fl.wording import unknown_name

#: bytes of a MB
MB = 10**6


class PolicyViolation(Rejected):
    """A run or message that the node's policy does not allow, or a policy that cannot be read."""

    def __init__(self, problem: str) -> None:
        super().__init__(f"client policy: {problem}")


@dataclass(frozen=True)
class Policy:
    """The policy of a node; by default everything is allowed."""

    models: str = option(
        "", "base models, comma-separated: names as in `model`, or the SHA-256 of their weights; empty: all"
    )
    tasks: str = option("", "tasks, comma-separated, as in `task`; empty: all")
    plugins: str = option("", "packages whose plugins a run may use, comma-separated; none: no plugins; empty: all")
    protection: str = option(
        "",
        "protections of which a run must have one, comma-separated; private: dp-clip above 0, "
        "secure: secure-aggregation without dp-clip, private+secure: both, so that the node adds its share of the "
        "noise itself; empty: none",
    )
    min_nodes: int = option(0, "secure, private+secure: smallest number of nodes in a round; 0: no limit", low=0)
    min_secure_threshold: float = option(
        0.0, "secure, private+secure: smallest secure-threshold; 0: no limit", low=0, high=1
    )
    min_noise_multiplier: float = option(
        0.0, "private, private+secure: smallest dp-noise-multiplier; 0: no limit", low=0
    )
    min_colluding_nodes: int = option(0, "private+secure: smallest dp-colluding-nodes; 0: no limit", low=0)
    max_epsilon: float = option(
        0.0,
        "private, private+secure: largest epsilon of a whole run at the policy's delta; 0: no limit. With "
        "private+secure towards the server, of a client that takes part in every round",
        low=0,
    )
    delta: float = option(1e-5, "max-epsilon: delta at which epsilon is computed", above=0, high=0.5)
    evaluations: bool = option(
        True, "whether the node evaluates adapters on its own examples; false: a run needs validation-fraction = 0"
    )
    min_examples: int = option(0, "smallest number of training examples of a client that has any; 0: no limit", low=0)
    max_examples_per_round: int = option(
        0, "largest number of examples that a client trains on in a round, counting each pass; 0: no limit", low=0
    )
    max_rounds: int = option(0, "largest number of rounds that the node trains in, over all runs; 0: no limit", low=0)
    max_mb_per_round: float = option(
        0.0, "largest size of a training message and its reply together, in MB; 0: no limit", low=0
    )
    max_mb: float = option(
        0.0, "largest size of all messages and replies together, over all runs, in MB; 0: no limit", low=0
    )

    @classmethod
    def of(cls, node: NodeConfig) -> Policy:
        """Return the policy of a node. Raises PolicyViolation for one that cannot be read or checked."""
        if not node.policy_path:
            return cls()
        try:
            policy = cls.read(Path(node.policy_path))
        except ValueError as error:  # a ConfigError, or a file that is no text
            raise PolicyViolation(node.without_paths(str(error))) from None
        if (policy.max_rounds or policy.max_mb) and not node.audit_path:
            raise PolicyViolation("max-rounds and max-mb need audit-path in the node config, a folder for the counts")
        return policy

    @classmethod
    def read(cls, path: Path) -> Policy:
        """Read a policy. Raises ConfigError that names every unknown key and every value that is not allowed."""
        given = read_toml(path)
        if unknown := [name for name in given if name not in KEYS]:
            raise ConfigError("\n".join(unknown_name("policy key", name, KEYS) for name in unknown))
        values: dict[str, Any] = values_by_owner(given, KEYS, "policy key").get(OWNER, {})
        policy = cls(**values)
        protections = csv_list(policy.protection)
        for name in protections:
            if name not in PROTECTIONS:
                raise ConfigError(unknown_name("protection", name, PROTECTIONS))
        if (policy.min_noise_multiplier or policy.max_epsilon) and not {"private", "private+secure"} & {*protections}:
            raise ConfigError(
                "min-noise-multiplier and max-epsilon need protection = 'private' or protection = 'private+secure'"
            )
        if policy.min_colluding_nodes and "private+secure" not in protections:
            raise ConfigError("min-colluding-nodes needs protection = 'private+secure'")
        if (policy.min_nodes or policy.min_secure_threshold) and not {"secure", "private+secure"} & {*protections}:
            raise ConfigError(
                "min-nodes and min-secure-threshold need protection = 'secure' or protection = 'private+secure'"
            )
        return policy

    def check_run(self, config: Config, model: str, num_clients: int) -> None:
        """Raise PolicyViolation unless a run of this configuration is allowed.

        Args:
            config: with this node's path of the base model.
            model: name of the base model in the run's configuration.
            num_clients: number of clients of the federation, as far as the node knows it.

        Raises ConfigError as `check_weights` and `epsilon` do.
        """
        self._check_plugins(config, model)
        allowed, task = csv_list(self.models), config.model.task
        if allowed and model not in allowed:
            digest = check_weights(config.model) if any(map(SHA256.fullmatch, allowed)) else ""
            if digest not in allowed:
                with_digest = f" (SHA-256 {digest})" if digest else ""
                raise PolicyViolation(f"model {model!r}{with_digest} is not among {', '.join(allowed)}")
        if self.tasks and task not in csv_list(self.tasks):
            raise PolicyViolation(f"task {task!r} is not among {', '.join(csv_list(self.tasks))}")
        problems = [PROTECTIONS[name](self, config, num_clients) for name in csv_list(self.protection)]
        if problems and all(problems):
            raise PolicyViolation("; ".join(problems))
        if config.data.validation_fraction and not self.evaluations:
            raise PolicyViolation(
                f"validation-fraction = {config.data.validation_fraction:g}, but the node evaluates nothing "
                "(evaluations = false): the run needs validation-fraction = 0"
            )
        if 0 < self.max_rounds < config.federation.num_rounds:
            raise PolicyViolation(
                f"num-rounds = {config.federation.num_rounds} is more than max-rounds = {self.max_rounds}"
            )

    def _check_plugins(self, config: Config, model: str) -> None:
        """Raise PolicyViolation unless the plugins of a run are allowed. They are not imported."""
        allowed = csv_list(self.plugins)
        for name, place in (plugins.named_in(config) | plugins.named_in(config.changed(model=model))).items():
            if allowed and plugins.package(place) not in allowed:
                raise PolicyViolation(f"plugin {name!r} is not in a package among {', '.join(allowed)}")

    def check_examples(self, config: Config, num_examples: Mapping[int, int]) -> None:
        """Raise PolicyViolation unless clients with so many training examples may take part.

        The message does not tell the number of examples.
        """
        if self.max_examples_per_round and config.training.engine == "trainer":
            raise PolicyViolation("engine = 'trainer' does not say on how many examples a client trains in a round")
        for client, number in num_examples.items():
            if 0 < number < self.min_examples:
                raise PolicyViolation(
                    f"client {client} has fewer training examples than min-examples = {self.min_examples}"
                )
            if 0 < self.max_examples_per_round < num_trained(config.training, number):
                raise PolicyViolation(
                    f"client {client} would train on more examples than max-examples-per-round = "
                    f"{self.max_examples_per_round}"
                )

    def check_nodes(self, number: int) -> None:
        """Raise PolicyViolation for a round of secure aggregation with so many nodes, if they are too few."""
        if number < self.min_nodes:
            raise PolicyViolation(f"{number} nodes are in the round, fewer than min-nodes = {self.min_nodes}")

    def check_counts(self, record: NodeRecord) -> None:
        """Raise PolicyViolation if the node's totals with `record` are more than the policy allows."""
        if 0 < self.max_rounds < record.total_rounds:
            raise PolicyViolation(f"the node has trained in max-rounds = {self.max_rounds} rounds")
        if record.kind == "train" and 0 < self.max_mb_per_round * MB < record.bytes_down + record.bytes_up:
            raise PolicyViolation(
                f"message and reply have more than max-mb-per-round = {self.max_mb_per_round:g}: "
                f"{(record.bytes_down + record.bytes_up) / MB:.3g} MB"
            )
        if 0 < self.max_mb * MB < record.total_bytes:
            raise PolicyViolation(
                f"messages and replies of all runs have more than max-mb = {self.max_mb:g}: "
                f"{record.total_bytes / MB:.3g} MB"
            )


def lack_of_privacy(policy: Policy, config: Config, num_clients: int) -> str:
    """Return the reason why a run is not private enough; empty if it is.

    With tolerated failures fewer clients can be there to sample from, so that each is in more rounds; `min-nodes` are
    there at least.
    """
    federation = config.federation
    fewest = num_clients if federation.failures == "strict" else min(federation.min_nodes, num_clients)
    rate = max(federation.round_size(number) / number for number in range(fewest, num_clients + 1))
    return lack_of_noise(policy, config, rate)


def lack_of_local_privacy(policy: Policy, config: Config, num_clients: int) -> str:
    """Return the reason why a run in which nodes add the noise is not private enough; empty if it is.

    The server knows who takes part, so the sample hides nothing from it.
    """
    if reason := lack_of_secure_aggregation(policy, config, num_clients):
        return reason
    if config.privacy.dp_colluding_nodes < policy.min_colluding_nodes:
        return (
            f"dp-colluding-nodes = {config.privacy.dp_colluding_nodes} is below min-colluding-nodes = "
            f"{policy.min_colluding_nodes}"
        )
    return lack_of_noise(policy, config, sampling_rate=1.0)


def lack_of_noise(policy: Policy, config: Config, sampling_rate: float) -> str:
    """Return the reason why a run has too little noise; empty if it has enough.

    `sampling_rate` is that towards those from whom clients are to be protected.
    """
    privacy, federation = config.privacy, config.federation
    if not privacy.dp_clip:
        return "dp-clip = 0, but the run must be private (dp-clip above 0)"
    if privacy.dp_noise_multiplier < policy.min_noise_multiplier:
        return (
            f"dp-noise-multiplier = {privacy.dp_noise_multiplier:g} is below min-noise-multiplier = "
            f"{policy.min_noise_multiplier:g}"
        )
    if policy.max_epsilon:
        spent = epsilon_of_run(sampling_rate, privacy.dp_noise_multiplier, federation.num_rounds, policy.delta)
        if spent > policy.max_epsilon:
            return (
                f"the run's epsilon of {spent:.3f} at delta = {policy.delta:g} is more than max-epsilon = "
                f"{policy.max_epsilon:g}, with each client in up to {sampling_rate:.3g} of the rounds"
            )
    return ""


@lru_cache
def epsilon_of_run(sampling_rate: float, noise_multiplier: float, num_rounds: int, delta: float) -> float:
    """Return the epsilon of `num_rounds` equal rounds (`accounting.epsilon`)."""
    return epsilon([Release(sampling_rate, noise_multiplier)] * num_rounds, delta)


def lack_of_secure_aggregation(policy: Policy, config: Config, num_clients: int) -> str:
    """Return why a run is not securely aggregated; empty if it is."""
    if not config.privacy.secure_aggregation:
        return "secure-aggregation = false, but the server must see sums only"
    if config.privacy.secure_threshold < policy.min_secure_threshold:
        return (
            f"secure-threshold = {config.privacy.secure_threshold:g} is below min-secure-threshold = "
            f"{policy.min_secure_threshold:g}"
        )
    return ""


def lack_of_secure_sums(policy: Policy, config: Config, num_clients: int) -> str:
    """Return why the sums of a run are not those of enough updates; empty if they are.

    In a private run they need not be: a node without a client takes part, and a round is repeated with other nodes.
    There only the noise hides an update, which this protection does not ask for.
    """
    if config.privacy.is_local:
        return (
            f"dp-clip = {config.privacy.dp_clip:g}, but protection = 'secure' does not ask for noise, which alone "
            "hides an update in a private run; use protection = 'private+secure' with min-noise-multiplier"
        )
    return lack_of_secure_aggregation(policy, config, num_clients)


#: name of a protection -> function of the policy, the configuration and the number of clients that returns what a run
#: lacks of it; empty if it has it
PROTECTIONS: dict[str, Callable[[Policy, Config, int], str]] = {
    "private": lack_of_privacy,
    "secure": lack_of_secure_sums,
    "private+secure": lack_of_local_privacy,
}

#: the keys of a policy, by name
OWNER = "policy"
KEYS = keys_of(OWNER, Policy)
