"""The tiny data set of the tests, and a machine without a network."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

#: a flat configuration, as in a recipe
Settings = dict[str, object]

#: the vocabulary of the tiny data set
WORDS = [f"{topic}{i}" for topic in ("sea", "sky", "sand") for i in range(12)]


TOPICS = ("sea", "sky", "sand")


#: blocks of the tiny models
NUM_LAYERS = 3


def make_texts(path: Path, num_examples: int = 600, seed: int = 0) -> Path:
    """Write a CSV whose labels are the topic of most words of a text; `owner` is one of 6 people."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(num_examples):
        topic = TOPICS[i % 3]
        words = [f"{topic if rng.random() < 0.6 else rng.choice(TOPICS)}{rng.integers(12)}" for _ in range(8)]
        rows.append({"text": " ".join(words), "label": topic, "owner": f"owner-{i % 6}"})
    pd.DataFrame(rows).to_csv(path, index=False)
    return path


def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set a package index for pip that does not answer."""
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("PIP_RETRIES", "0")
