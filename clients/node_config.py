"""The node config of a Flower node, and the privacy of the node's own data.

    partition-id, num-partitions    which of how many nodes this is
    data-path                       the node's own file of examples; it is then one client (``partitioner = own``)
    model-path                      where the base model is stored on this node; by default the run's ``model``
    script-path                     where the script that makes the Trainer is stored on this node; by default the run's
                                    ``script``, on a node with its own data none
    policy-path                     the node's policy (`clients.policy`); without it every run is allowed
    audit-path                      folder of the node's audit log (`clients.audit`); without it nothing is logged
    node-key                        a private key of the node, which signs its keys of secure aggregation; in a
                                    deployment another than the one that it shows to the SuperLink
    warm-process                    seconds that a process stays open for the next message (`clients.warm_process`)
    peers                           folder with the public keys of all nodes, client-0.pub and so on: secure aggregation
                                    with these only

Only counts leave a node with its own data. An error message can quote a text, a label or a file name, so such a node
sends only the type of the error and its place in the source code; the node's log has the full message.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from logging import ERROR
from pathlib import Path

from flwr.app import ConfigRecord, Context, RecordDict
from flwr.supercore.logger import log

from clients.warm_cache import open_data, open_own_data
from copra_fl.config import Config
from copra_fl.data.federated import FederatedData, without_training
from copra_fl.secure_aggregation.keys import new_identity, normal_identity
from copra_fl.sources.tables import TableError
from copra_fl.wording import unknown_name

#: paths in a node config, in the order of the fields of `NodeConfig`
PATHS = ("data-path", "model-path", "policy-path", "audit-path", "node-key", "peers", "script-path")
#: all keys of a node config; `clients.app` reads warm-process
KEYS = ("partition-id", "num-partitions", *PATHS, "warm-process")
#: innermost calls of an error that a public message names
NUM_FRAMES = 3


class Rejected(RuntimeError):
    """A run that this node takes no part in. The message may leave the node."""


@dataclass(frozen=True)
class NodeConfig:
    """The node config.

    Attributes:
        partition, num_partitions: which of how many nodes this is.
        data_path: the node's own file of examples; empty without one.
        model_path: the node's copy of the base model; empty without one.
        policy_path: the file of the node's policy; empty without one.
        audit_path: the folder of the node's audit log; empty without one.
        node_key: file of the node's private key; empty without one.
        peers: folder with the public keys of all nodes; empty: any node may take part in secure aggregation.
        script_path: the node's copy of the script that makes the Trainer; empty without one.
    """

    partition: int
    num_partitions: int
    data_path: str = ""
    model_path: str = ""
    policy_path: str = ""
    audit_path: str = ""
    node_key: str = ""
    peers: str = ""
    script_path: str = ""

    @classmethod
    def of(cls, context: Context) -> NodeConfig:
        """Read Flower's node config. Raises Rejected for an unknown key and for wrong partition numbers.

        A misspelt policy-path must not mean that there is no policy.
        """
        settings = context.node_config
        for name in settings:
            if name not in KEYS:
                raise Rejected(f"its node config has an {unknown_name('key', name, KEYS)}")
        partition, num_partitions = settings.get("partition-id"), settings.get("num-partitions")
        if not (isinstance(partition, int) and isinstance(num_partitions, int) and 0 <= partition < num_partitions):
            raise Rejected(
                f"its node config has partition-id = {partition!r} and num-partitions = {num_partitions!r}; set both, "
                "for example 'partition-id=0 num-partitions=2' on the first of two nodes"
            )
        paths = (str(settings.get(name, "")) for name in PATHS)
        return cls(partition, num_partitions, *paths)

    def adapt(self, config: Config) -> Config:
        """Return the run's configuration with this node's paths of the base model and the script.

        Raises Rejected as `with_script` does.
        """
        config = self.with_script(config)
        return config.changed(model=self.model_path) if self.model_path else config

    def with_script(self, config: Config) -> Config:
        """Return the run's configuration with this node's path of the script.

        Raises Rejected if the run needs a script and the node has its own data, but no script: it runs no other file.
        """
        if not config.training.script:
            return config
        if self.data_path and not self.script_path:
            raise Rejected("engine = 'trainer' needs a script on each node, but its node config has no script-path")
        return config.changed(script=self.script_path) if self.script_path else config

    def open_data(self, config: Config) -> FederatedData:
        """Load the examples of the clients that this node can host.

        Raises Rejected if the run needs the node's own data and the node has no file, or if the node has a file and
        the run uses other data.
        """
        if config.data.partitioner == "own":
            if not self.data_path:
                raise Rejected("partitioner = 'own', but its node config has no data-path")
            return open_own_data(without_training(config), self.data_path, self.partition, self.num_partitions)
        if self.data_path:
            raise Rejected(
                f"it has its own data (data-path), but partitioner = {config.data.partitioner!r} would train on "
                "other data; set partitioner = 'own'"
            )
        return open_data(without_training(config))

    def identity(self, node_state: RecordDict, run: str) -> bytes:
        """Return the private key that signs for this node: its own, else one made for the run and kept in its state."""
        if self.node_key:
            return Path(self.node_key).read_bytes()
        record = node_state.config_records.get("secure-identity", ConfigRecord())
        if record.get("run") != run:
            record = ConfigRecord({"run": run, "key": new_identity()})
            node_state["secure-identity"] = record
        key = record["key"]
        assert isinstance(key, bytes)
        return key

    def peer_keys(self) -> dict[int, bytes] | None:
        """Return partition-id -> public key of the nodes that may take part in secure aggregation; None: any.

        Raises Rejected for a folder without keys.
        """
        if not self.peers:
            return None
        files = {path.stem.rpartition("-")[2]: path for path in Path(self.peers).glob("*.pub")}
        keys = {int(number): normal_identity(path.read_bytes()) for number, path in files.items() if number.isdigit()}
        if not keys:
            raise Rejected("secure aggregation: its folder of peers has no public key; repeat copra-fl deploy init")
        return keys

    @contextmanager
    def redact_errors(self) -> Iterator[None]:
        """Replace errors inside the block by Rejected with their public message, on a node with its own data."""
        try:
            yield
        except Rejected:
            raise
        except Exception as error:
            if not self.data_path:
                raise
            raise Rejected(self.public_message(error)) from None

    def without_paths(self, message: str) -> str:
        """Return `message` with the names of this node's paths in place of the paths."""
        for name in PATHS:
            path = getattr(self, name.replace("-", "_"))
            message = message.replace(path, name) if path else message
        return message

    def public_message(self, error: BaseException) -> str:
        """Return the part of `error` that the server may see: type and place, on a node without own data everything."""
        full_message = "".join(traceback.format_exception(error))
        if not self.data_path:
            return self.without_paths(full_message)
        if isinstance(error, Rejected):
            return str(error)
        log(ERROR, "%s", full_message)
        if isinstance(error, TableError):
            return error.public_message
        frames = reversed(traceback.extract_tb(error.__traceback__)[-NUM_FRAMES:])
        places = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames)
        return f"{type(error).__name__} at {places}; the node's log has the message"
