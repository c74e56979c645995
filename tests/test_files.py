"""Files that are whole or absent."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from copra_fl.files import write_json


def test_results_are_written_as_json_with_a_line_for_what_fits(tmp_path: Path) -> None:
    value = {"runs": [{"seed": seed, "loss": 0.5, "none": None} for seed in range(4)], 3: [1] * 60}
    write_json(tmp_path / "results.json", value)
    text = (tmp_path / "results.json").read_text()
    assert json.loads(text) == {"runs": value["runs"], "3": value[3]}
    assert '\n  {"seed": 1, "loss": 0.5, "none": null},\n' in text
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "results.json", {"loss": math.nan})
    assert (tmp_path / "results.json").read_text() == text
