"""What a node's own configuration says of its site, and what of the site's data may leave it.

    data-path     its own file of examples; the node is then one client (``partitioner = own``)
    model-path    where the base lies here; without it the run's ``model`` is looked for

Of a site's own data nothing leaves but counts. An error can quote a text, a label or a file's name, so on such a node
only its kind and its place in the sources leave; the whole of it is in the node's log.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from logging import ERROR
from pathlib import Path

from flwr.app import Context
from flwr.common.logger import log

from clients.warm_cache import open_data, open_own
from copra_fl.config import Config
from copra_fl.data.federated import FederatedData
from copra_fl.sources.tables import TableError

#: calls that are named of an error, from the innermost outwards
PLACES = 3


class Refused(RuntimeError):
    """A run that this node takes no part in. The message may leave the node."""


@dataclass(frozen=True)
class Site:
    """
    Attributes:
        partition, num_partitions: which of how many nodes this is.
        data_path: its own file; empty where it has none.
        model_path: its own copy of the base; empty where it has none.
    """

    partition: int
    num_partitions: int
    data_path: str = ""
    model_path: str = ""

    @classmethod
    def of(cls, context: Context) -> Site:
        """Raises Refused for a node config without its place among the nodes."""
        settings = context.node_config
        partition, num_partitions = settings.get("partition-id"), settings.get("num-partitions")
        if not (isinstance(partition, int) and isinstance(num_partitions, int) and 0 <= partition < num_partitions):
            raise Refused(
                f"its node config has partition-id = {partition!r} and num-partitions = {num_partitions!r}; of two "
                "nodes the first has 'partition-id=0 num-partitions=2'"
            )
        return cls(partition, num_partitions, str(settings.get("data-path", "")), str(settings.get("model-path", "")))

    def adapt(self, config: Config) -> Config:
        """The run's configuration as it is here."""
        return config.changed(model=self.model_path) if self.model_path else config

    def open_data(self, config: Config) -> FederatedData:
        """The examples of the run's clients that are here.

        Raises Refused where the run wants the site's own data and there is none, or does not want what there is.
        """
        if config.data.partitioner == "own":
            if not self.data_path:
                raise Refused("partitioner = 'own', but its node config names no data-path")
            return open_own(config, self.data_path, self.partition, self.num_partitions)
        if self.data_path:
            raise Refused(
                f"it has data of its own (data-path), and partitioner = {config.data.partitioner!r} would train on "
                "other data; partitioner = 'own' trains on it"
            )
        return open_data(config)

    @contextmanager
    def discretion(self) -> Iterator[None]:
        """Errors inside come out as what may leave this node."""
        try:
            yield
        except Refused:
            raise
        except Exception as error:
            if not self.data_path:
                raise
            raise Refused(self.told(error)) from None

    def told(self, error: BaseException) -> str:
        """What the server may know of `error`: all of it, but of a node with data of its own only what and where."""
        whole = "".join(traceback.format_exception(error))
        if not self.data_path:
            return whole
        if isinstance(error, Refused):
            return str(error)
        log(ERROR, "%s", whole)
        if isinstance(error, TableError):
            return error.public_message
        frames = reversed(traceback.extract_tb(error.__traceback__)[-PLACES:])
        places = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames)
        return f"{type(error).__name__} at {places}; the node's own log has the message"
