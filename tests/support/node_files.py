"""Data files of nodes, a search for their content in all messages of a run, and rows of Flower's list of nodes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import pandas as pd
from flwr.app import Message
from flwr.clientapp import ClientApp
from flwr.common.serde import message_to_proto

from clients.app import app as client_app
from copra_fl.config import Config
from copra_fl.models.build import load_processor
from tests.support.local_grid import LocalGrid
from tests.support.tiny import TOPICS, WORDS

SUFFIXES = (".csv", ".jsonl", ".parquet")

NAMES = [f"ward-{number}-admissions{suffix}" for number, suffix in enumerate(SUFFIXES)]


def rows_of(site: int, number: int = 40) -> pd.DataFrame:
    """Return texts of known words; each also has a unique word, ``patient<site>x<number>``."""
    rng = np.random.default_rng(1000 + site)
    labels = [TOPICS[(site + i) % 2] for i in range(number)]
    texts = [f"patient{site}x{i} {' '.join(rng.choice(WORDS, 7))}" for i in range(number)]
    return pd.DataFrame({"note": texts, "topic": labels, "hidden": range(number)})


def write(rows: pd.DataFrame, path: Path) -> Path:
    match path.suffix:
        case ".csv":
            rows.to_csv(path, index=False)
        case ".jsonl":
            rows.to_json(path, orient="records", lines=True)
        case _:
            rows.to_parquet(path)
    return path


class Traffic(Protocol):
    """Recorded traffic of a run: bytes, and lists of numbers that are packed in them."""

    @property
    def seen(self) -> bytes: ...

    @property
    def numbers(self) -> Iterable[Sequence[int | float]]: ...


class RecordingGrid(LocalGrid):
    """A grid of nodes with these files, which records all messages."""

    def __init__(self, files: list[Path], app: ClientApp = client_app) -> None:
        super().__init__(len(files), app, [{"data-path": str(path)} for path in files])
        self.messages: list[Message] = []

    def answer(self, message: Message) -> Message:
        reply = super().answer(message)
        self.messages += [message, reply]
        return reply

    @property
    def seen(self) -> bytes:
        """All messages as the bytes that go over the wire."""
        return b"".join(message_to_proto(message).SerializeToString() for message in self.messages)

    @property
    def numbers(self) -> Iterator[list[int | float]]:
        """The lists of numbers in records, which protobuf packs, so that they are not searchable in `seen`."""
        for message in self.messages:
            if message.has_content():
                for record in [*message.content.metric_records.values(), *message.content.config_records.values()]:
                    yield from (value for value in record.values() if isinstance(value, list))


def find_leaks(traffic: Traffic, config: Config, files: list[Path]) -> list[str]:
    """Return the content of the nodes' files in the traffic: file names, unique words, runs of 6 tokens of a text."""
    tokenizer = load_processor(config.model)
    seen, leaks = traffic.seen, []
    lists = [
        " ".join(map(str, map(int, values))) for values in traffic.numbers if set(map(type, values)) <= {int, float}
    ]
    for site, path in enumerate(files):
        leaks += [path.name] if path.stem.encode() in seen else []
        for text in rows_of(site)["note"]:
            word, tokens = text.split()[0], tokenizer(text)["input_ids"][2:8]
            leaks += [word] if word.encode() in seen else []
            encoded = [np.array(tokens, t).tobytes() for t in (np.int32, np.int64, np.float32, np.int16, np.uint8)]
            if any(form in seen for form in encoded) or any(" ".join(map(str, tokens)) in line for line in lists):
                leaks.append(f"tokens of {word}")
    return leaks


def listed(node: str, status: str) -> dict[str, str]:
    """Return a node as ``flwr supernode list`` has it."""
    return {"node-id": node, "status": status, "online-at": "now", "offline-at": ""}
