"""Files of examples are read and written without a change of their values."""

from __future__ import annotations

from pathlib import Path

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet
import pytest

from copra_fl.config import ConfigError
from copra_fl.sources.tables import as_text, file_table, read_split, write_table

#: two integers that are the same number in float64, and a gap
IDS = [2**60 + 1, 2**60 + 2, None]
ID_TEXTS = ["1152921504606846977", "1152921504606846978", None]


def texts(path: Path, column: str) -> list[str | None]:
    """Return a column of a file as texts, with None for missing ones."""
    return [text if isinstance(text, str) else None for text in as_text(file_table("dataset", path).read()[column])]


def test_integers_with_gaps_keep_their_digits(tmp_path: Path) -> None:
    table = pa.table({"id": IDS, "site": pa.array([1, None, 2], pa.uint8())})
    pa.parquet.write_table(table, tmp_path / "ids.parquet")
    (tmp_path / "ids.jsonl").write_text(
        '{"id": 1152921504606846977, "site": 1}\n{"id": 1152921504606846978, "site": null}\n\n{"site": 2.0}\n'
    )
    for name in ("ids.parquet", "ids.jsonl"):
        assert texts(tmp_path / name, "id") == ID_TEXTS
        assert texts(tmp_path / name, "site") == ["1", None, "2"]


def test_integers_of_a_hub_split_keep_their_digits_and_labels_their_names() -> None:
    features = datasets.Features({"id": datasets.Value("int64"), "label": datasets.ClassLabel(names=["no", "yes"])})
    split = datasets.Dataset.from_dict({"id": IDS, "label": [1, None, 0]}, features=features).select([2, 1, 0])
    rows = read_split(split)
    assert as_text(rows["id"]).fillna("").tolist() == ["", ID_TEXTS[1], ID_TEXTS[0]]
    assert rows["label"].fillna("").tolist() == ["no", "", "yes"]


def test_folders_of_a_path_are_no_columns(tmp_path: Path) -> None:
    (tmp_path / "year=2024").mkdir()
    pd.DataFrame({"text": ["a"]}).to_parquet(tmp_path / "year=2024" / "rows.parquet")
    assert list(file_table("dataset", tmp_path / "year=2024" / "rows.parquet").read()) == ["text"]


def test_values_of_json_lines_are_read_as_they_are(tmp_path: Path) -> None:
    """Names such as "created_at" make pandas read texts and numbers as dates."""
    lines = '{"text": "2021-03-04", "created_at": 1, "whole": 1.0, "half": 1, "flag": true, "mixed": 7}\n' + (
        '{"text": "2021", "created_at": 2, "whole": 2.0, "half": 2.5, "flag": false, "mixed": "A7"}\n'
    )
    (tmp_path / "rows.jsonl").write_text(lines, encoding="utf-8-sig")
    expected = {
        "text": ["2021-03-04", "2021"],
        "created_at": ["1", "2"],
        "whole": ["1", "2"],
        "half": ["1.0", "2.5"],
        "flag": ["True", "False"],
        "mixed": ["7", "A7"],
    }
    assert {column: texts(tmp_path / "rows.jsonl", column) for column in expected} == expected


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_a_written_table_reads_back_equal(suffix: str, tmp_path: Path) -> None:
    notes = ["one\rtwo", 'a, "b"\tc', "three\r\nfour\nfive"]
    dates = pd.to_datetime(["2021-03-04 10:00:00", "2021-03-05 07:30:00", None])
    rows = pd.DataFrame({"note": notes, "id": pd.Series(IDS, dtype=object), "share": [0.1234567890123, 1.0, 2.5]})
    path = tmp_path / f"rows{suffix}"
    write_table(path, rows.assign(date=dates))
    assert texts(path, "note") == notes and texts(path, "id") == ID_TEXTS
    assert [float(text or "") for text in texts(path, "share")] == rows["share"].tolist()
    assert pd.to_datetime(file_table("dataset", path).read()["date"]).tolist()[:2] == dates.tolist()[:2]


def test_values_that_parquet_cannot_store_are_named(tmp_path: Path) -> None:
    mixed = pd.DataFrame({"id": pd.Series([1, "A7"], dtype=object)})
    with pytest.raises(ConfigError, match=r"out\.parquet cannot be stored as Parquet: .*A7"):
        write_table(tmp_path / "out.parquet", mixed)


def test_whole_numbers_are_integers_if_they_fit() -> None:
    assert as_text(pd.Series([3.0, None, -(2.0**62)])).fillna("").tolist() == ["3", "", "-4611686018427387904"]
    assert as_text(pd.Series([1e20, 3.0, None])).fillna("").tolist() == ["1e+20", "3.0", ""]
