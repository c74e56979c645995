"""Data files of nodes, and a search for their contents in all messages of a run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

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
    """Texts of known words, each with a word of its own that no other text in the world has."""
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


class Wire(LocalGrid):
    """Keeps every message as the bytes that go over the wire, and its numbers."""

    def __init__(self, files: list[Path], app: ClientApp = client_app) -> None:
        super().__init__(len(files), app, [{"data-path": str(path)} for path in files])
        self.messages: list[Message] = []

    def answer(self, message: Message) -> Message:
        reply = super().answer(message)
        self.messages += [message, reply]
        return reply

    @property
    def seen(self) -> bytes:
        return b"".join(message_to_proto(message).SerializeToString() for message in self.messages)

    @property
    def numbers(self) -> Iterator[list[int | float]]:
        """The lists of numbers in records: protobuf packs them, so that they are no plain bytes."""
        for message in self.messages:
            if message.has_content():
                for record in [*message.content.metric_records.values(), *message.content.config_records.values()]:
                    yield from (value for value in record.values() if isinstance(value, list))


def leaks(grid: Wire, config: Config, files: list[Path]) -> list[str]:
    """What of the nodes' files was seen: names, words that only one text has, runs of 6 tokens of an example."""
    tokenizer = load_processor(config.model)
    seen, found = grid.seen, []
    numbers = [
        " ".join(map(str, map(int, values))) for values in grid.numbers if set(map(type, values)) <= {int, float}
    ]
    for site, path in enumerate(files):
        found += [path.name] if path.stem.encode() in seen else []
        for text in rows_of(site)["note"]:
            word, tokens = text.split()[0], tokenizer(text)["input_ids"][2:8]
            found += [word] if word.encode() in seen else []
            forms = [np.array(tokens, kind).tobytes() for kind in (np.int32, np.int64, np.float32, np.int16, np.uint8)]
            if any(form in seen for form in forms) or any(" ".join(map(str, tokens)) in line for line in numbers):
                found.append(f"tokens of {word}")
    return found
