"""Data that cannot be used are refused, with an error that names the problem."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from transformers import PreTrainedTokenizerFast

from copra_fl.config import ConfigError
from copra_fl.data.federated import load_data
from tests.support.tables import make_config

pytestmark = pytest.mark.usefixtures("empty_caches")

ERRORS: list[tuple[str, dict[str, Any], str]] = [
    ("missing.csv", {}, r"dataset: there is no file .*missing\.csv"),
    ("empty.csv", {}, r"empty\.csv has no examples"),
    ("header.csv", {}, r"header\.csv has no examples"),
    ("rows.txt", {}, r"rows\.txt ends in '\.txt'; supported formats are \.csv, \.json, \.jsonl, \.parquet"),
    ("binary.csv", {}, r"binary\.csv cannot be read as CSV in UTF-8"),
    ("trailing.csv", {}, r"trailing\.csv cannot be read as CSV .* rows have more fields than its header\. Quote texts"),
    ("commas.csv", {}, r"commas\.csv cannot be read as CSV .* rows have more fields than its header\. Quote texts"),
    (
        "broken.jsonl",
        {},
        r"broken\.jsonl cannot be read as JSON with one object per line: line 2, column 25: Expecting",
    ),
    ("array.json", {}, r"as JSON with one object per line: line 1 begins with '\['.* each object on a line of its own"),
    ("indented.json", {}, r"as JSON with one object per line: line 1 begins with '\['.* without an array around"),
    ("wide.csv", {}, r"its columns are c0, c1, .*, c19 and 5 more$"),
    ("broken.parquet", {}, r"broken\.parquet cannot be read as Parquet"),
    ("table.xlsx", {}, r"dataset: there is no file .*table\.xlsx"),
    ("semicolons.csv", {}, r"'text' is not a column .* are text;label\. .* otherwise: set separator = 'semicolon'"),
    ("tabs.csv", {"separator": "comma"}, r"'text' is not a column .*: set separator = 'tab'"),
    (
        "fractions.csv",
        {},
        r"label-column = 'label' of .* has numbers with fractions, such as 0\.5, .* list all labels in",
    ),
    ("names.csv", {}, r"label-column = 'label' of .* has 600 different labels in 600 rows; choose another column, or"),
    ("rows.csv", {"text_column": "body"}, r"text-column = 'body' is not a column .* columns are text, label, owner"),
    (
        "rows.csv",
        {"label_column": "topic"},
        r"label-column = 'topic' is not a column .* columns are text, label, owner",
    ),
    ("rows.csv", {"client_column": "site", "partitioner": "natural"}, r"client-column = 'site' is not a column"),
    ("rows.csv", {"test_file": "gone.csv"}, r"test-file: there is no file .*gone\.csv"),
    ("rows.csv", {"test_file": "newlabel.csv"}, r"labels that do not occur in .*rows\.csv: wind\. .*: air, fire, sea"),
    ("rows.csv", {"test_file": "copy.csv"}, r"nothing is left of the test set"),
    ("oneclass.csv", {}, r"oneclass\.csv has one label only, 'air'"),
    ("nolabels.csv", {}, r"no example with all of 'text', 'label'"),
    (
        "rows.csv",
        {"partitioner": "natural", "client_column": "owner", "num_clients": 6, "held_out_clients": 7},
        "num-clients = 6 and held-out-clients = 7 need at least 13 clients, but the client column has 12 values",
    ),
    ("rows.csv", {"held_out_clients": 2}, "held-out-clients = 2 needs partitioner = 'natural', not 'dirichlet'"),
    ("rows.csv", {"test_examples": 300}, r"test-examples = 300 and .* = 40 would take 340 of 600 examples"),
    ("rows.csv", {"num_clients": 501}, r"num-clients = 501 is more than the 500 examples"),
    (
        "rows.csv",
        {"partitioner": "pathological", "classes_per_client": 5},
        r"classes-per-client = 5 is more than the 4",
    ),
    ("rows.csv", {"partitioner": "pathological", "num_clients": 499}, r"'pathological' cannot split this data: Label"),
    ("rows.csv", {"partitioner": "shards", "classes_per_client": 90}, r"is 540 shards, more than the 500 examples"),
    (
        "rows.csv",
        {"partitioner": "natural", "client_column": "owner", "num_clients": 13},
        r"num-clients = 13 is more than the 12 values of the client column",
    ),
    ("health-tweet", {}, r"unknown data set 'health-tweet'\. Did you mean 'health-tweets'\?"),
    ("minilm", {}, r"unknown data set 'minilm'"),
    (
        "someone/nothing",
        {},
        r"'someone/nothing' is not an asset .*20newsgroups.*, not a file .*hub: Couldn't reach.*"
        r"load_dataset\('someone/nothing', split='train'\).to_parquet",
    ),
]


@pytest.mark.parametrize(("dataset", "changes", "message"), ERRORS, ids=lambda value: str(value)[:40])
def test_errors_name_the_file_setting_or_value(
    rows: pd.DataFrame,
    dataset: str,
    changes: dict[str, Any],
    message: str,
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("rows.csv", "rows.txt", "copy.csv"):
        rows.to_csv(name, index=False)
    rows.assign(label="air").to_csv("oneclass.csv", index=False)
    rows.assign(label=None).to_csv("nolabels.csv", index=False)
    rows[:1].assign(label="wind").to_csv("newlabel.csv", index=False)
    rows.assign(label=[str(row % 4 / 2) for row in range(len(rows))]).to_csv("fractions.csv", index=False)
    rows.assign(label=[f"name{row}" for row in range(len(rows))]).to_csv("names.csv", index=False)
    rows[["text", "label"]].to_csv("semicolons.csv", index=False, sep=";")
    rows.to_csv("tabs.csv", index=False, sep="\t")
    Path("empty.csv").write_text("")
    Path("header.csv").write_text("text,label\n")
    Path("binary.csv").write_bytes(b"text,label\n\xff\xfe\x00,1\n")
    Path("trailing.csv").write_text("text,label\nhello,air,\nworld,sea,\n")
    Path("commas.csv").write_text("text,label\nWoman, 62: stiff,air\nfever,sea\n")
    Path("broken.jsonl").write_text('{"text": "air", "label": "sea"}\n{"text": "air", "label": \n')
    rows.to_json("array.json", orient="records")
    rows.to_json("indented.json", orient="records", indent=1)
    pd.DataFrame({f"c{number}": ["x"] for number in range(25)}).to_csv("wide.csv", index=False)
    Path("broken.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(ConfigError, match=message):
        load_data(make_config(dataset, **changes), tokenizer)


def test_files_with_other_separators_and_listed_fractions_are_read(
    rows: pd.DataFrame, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = rows.assign(label=[str(row % 4 / 2) for row in range(len(rows))])
    digests = set()
    for name, separator, value in [("a.csv", ",", "auto"), ("b.tsv", "\t", "auto"), ("c.csv", ";", "semicolon")]:
        rows.to_csv(tmp_path / name, index=False, sep=separator)
        data = load_data(make_config(tmp_path / name, separator=value, labels="0.0,0.5,1.0,1.5"), tokenizer)
        assert data.label_names == ["0.0", "0.5", "1.0", "1.5"]
        digests.add(tuple(data.examples.lengths))
    assert len(digests) == 1


def test_a_tokenizer_without_padding_is_refused(
    rows: pd.DataFrame, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    rows.to_csv(tmp_path / "rows.csv", index=False)
    without = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, name_or_path="some/gpt")
    with pytest.raises(ConfigError, match="'some/gpt' must have a padding token"):
        load_data(make_config(tmp_path / "rows.csv"), without)
