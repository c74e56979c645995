"""Files that are whole or absent, and damage that is noticed."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from copra_fl import files
from copra_fl.data.cache import cached
from copra_fl.files import DamagedFile, cache_dir, kept_digest, sha256, write_json
from copra_fl.tensor_files import read_tensors, write_tensors


def test_results_are_written_as_json_with_a_line_for_what_fits(tmp_path: Path) -> None:
    value = {"runs": [{"seed": seed, "loss": 0.5, "none": None} for seed in range(4)], 3: [1] * 60}
    write_json(tmp_path / "results.json", value)
    text = (tmp_path / "results.json").read_text()
    assert json.loads(text) == {"runs": value["runs"], "3": value[3]}
    assert '\n  {"seed": 1, "loss": 0.5, "none": null},\n' in text
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "results.json", {"loss": math.nan})
    assert (tmp_path / "results.json").read_text() == text


def test_any_changed_byte_of_a_tensor_file_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tensors = {"a": torch.arange(5), "none": torch.zeros(0, 3), "half": torch.ones(2, 2, dtype=torch.bfloat16)}
    write_tensors(path, tensors, {"record": "é" * 10})
    read, texts = read_tensors(path)
    assert texts == {"record": "é" * 10} and all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    content = path.read_bytes()
    for place in range(8, len(content)):  # the first 8 bytes are the length of the header
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(DamagedFile, match="x.safetensors is damaged"):
            read_tensors(path)


def test_a_damaged_cache_file_is_named_and_built_again(caplog: pytest.LogCaptureFixture) -> None:
    built = []

    def build() -> tuple[dict[str, torch.Tensor], dict[str, int]]:
        built.append(1)
        return {"tokens": torch.arange(9)}, {"length": 9}

    cached("tests", "damaged", build)
    path = cache_dir() / "tests" / "damaged.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    tensors, facts = cached("tests", "damaged", build)
    assert tensors["tokens"].tolist() == list(range(9)) and facts == {"length": 9} and len(built) == 2
    assert f"{path} is damaged" in caplog.text


def test_a_digest_is_computed_again_only_after_a_file_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, computed = tmp_path / "weights", []
    path.write_text("a")

    def compute() -> str:
        computed.append(1)
        return sha256(path)

    digests = [kept_digest([path], compute) for _ in range(2)]
    assert digests == [sha256(path)] * 2 and len(computed) == 2  # it could still change without another time
    monkeypatch.setattr(files, "SETTLED_SECONDS", -1)
    assert [kept_digest([path], compute) for _ in range(3)] == [sha256(path)] * 3 and len(computed) == 3
    path.write_text("b")
    assert kept_digest([path], compute) == sha256(path) and len(computed) == 4
    with pytest.raises(FileNotFoundError):
        kept_digest([tmp_path / "none"], compute)
