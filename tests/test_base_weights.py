"""A base is mapped from a file in its compute dtype, and gives the hidden states of Transformers' own model."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, DebertaV2Config, DebertaV2Model

from copra_fl import files
from copra_fl.files import CacheError, cache_dir
from copra_fl.models import base_weights
from copra_fl.models.base_weights import open_base, weights_digest
from tests.support.worlds import BATCH


def mapped_files(base: torch.nn.Module) -> set[str]:
    """Return the files that the kernel says the weights are mapped from; "" for memory without a file."""
    files = set()
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, _, _, _, _, *name = line.split(maxsplit=5)
        start, end = (int(address, 16) for address in addresses.split("-"))
        if any(start <= parameter.data_ptr() < end for parameter in base.parameters()):
            files.add("".join(name))
    return files


def converted() -> set[Path]:
    return set((cache_dir() / "bases").glob("*"))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_every_process_maps_the_same_file(tiny_model: str) -> None:
    stored = str(Path(tiny_model) / "model.safetensors")
    assert mapped_files(open_base(tiny_model, "float32", "eager", AutoModel)) == {stored}, (
        "in its own dtype, the base must be mapped from its own file"
    )
    first, second = (open_base(tiny_model, "bfloat16", "eager", AutoModel) for _ in range(2))
    with torch.inference_mode():
        first(**BATCH)
    (file,) = mapped_files(first)
    assert mapped_files(second) == {file} and str(cache_dir() / "bases") in file
    assert {parameter.dtype for parameter in first.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_hidden_states_equal_those_of_a_plain_model(tiny_model: str, dtype: str, attention: str) -> None:
    plain = AutoModel.from_pretrained(tiny_model, attn_implementation=attention).to(getattr(torch, dtype))
    base = open_base(tiny_model, dtype, attention, AutoModel)
    with torch.inference_mode():
        assert torch.equal(base(**BATCH).last_hidden_state, plain(**BATCH).last_hidden_state)
    assert base.config._attn_implementation == attention
    assert base.name_or_path == base.config.name_or_path == tiny_model


def test_a_changed_source_is_converted_anew(tiny_model: str, tmp_path: Path) -> None:
    source = tmp_path / "mine"
    shutil.copytree(tiny_model, source)
    open_base(str(source), "bfloat16", "eager", AutoModel)
    base = AutoModel.from_pretrained(source)
    with torch.no_grad():
        base.embeddings.word_embeddings.weight[7] = 3
    base.save_pretrained(source)
    assert (open_base(str(source), "bfloat16", "eager", AutoModel).embeddings.word_embeddings.weight[7] == 3).all()


def test_a_source_that_changed_within_one_tick_of_the_clock_is_converted_anew(tiny_model: str, tmp_path: Path) -> None:
    """Size and time of modification are as before, as after a change within the granularity of the file system."""
    source = shutil.copytree(tiny_model, tmp_path / "mine")
    weights, before = source / "model.safetensors", open_base(str(source), "bfloat16", "eager", AutoModel)
    status, content = weights.stat(), bytearray(weights.read_bytes())
    content[-4:] = b"\x00\x00\x80\x40"  # 4 in float32
    weights.write_bytes(content)
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
    after = open_base(str(source), "bfloat16", "eager", AutoModel)
    assert [name for name, tensor in after.state_dict().items() if not tensor.equal(before.state_dict()[name])]


def test_processes_convert_once_and_leave_nothing_unfinished(tiny_model: str, tmp_path: Path) -> None:
    """One of several processes converts; the leftovers of a killed process are removed."""
    source = tmp_path / "mine"
    shutil.copytree(tiny_model, source)
    before = converted()
    spawn = multiprocessing.get_context("spawn")  # a forked child may inherit a lock that a thread holds, and hang
    with ProcessPoolExecutor(2, mp_context=spawn) as pool:
        list(pool.map(_open, [str(source)] * 2, ["float16"] * 2))
    assert {path.suffix for path in converted() - before} == {"", ".lock"}
    (place,) = (path for path in converted() - before if path.is_dir())
    (place / "model.safetensors").rename(tmp_path / "weights")
    place.rename(place.with_suffix(".part"))
    open_base(str(source), "float16", "eager", AutoModel)
    assert (place / "model.safetensors").exists() and not place.with_suffix(".part").exists()


def test_a_damaged_base_is_named_and_converted_again(
    tiny_model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = shutil.copytree(tiny_model, tmp_path / "mine")
    before = converted()
    base = open_base(str(source), "float16", "eager", AutoModel)
    whole = {name: tensor.clone() for name, tensor in base.state_dict().items()}  # the model's are mapped from the file
    (place,) = (path for path in converted() - before if path.is_dir())
    with (place / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    again = open_base(str(source), "float16", "eager", AutoModel).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())
    assert f"{place} is damaged (model.safetensors); it is built again" in caplog.text


def _open(source: str, dtype: str) -> None:
    open_base(source, dtype, "eager", AutoModel)


def test_a_cache_that_cannot_be_written_is_named(
    tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bases").write_text("in the way")
    monkeypatch.setenv("COPRA_FL_CACHE", str(tmp_path))
    with pytest.raises(CacheError, match="cannot store .* in bfloat16 .* Set COPRA_FL_CACHE to another folder"):
        open_base(tiny_model, "bfloat16", "eager", AutoModel)


def test_a_model_without_sdpa_computes_with_eager(tmp_path: Path) -> None:
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    DebertaV2Model(DebertaV2Config(vocab_size=30, **shape)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="scaled_dot_product_attention"):
        AutoModel.from_pretrained(tmp_path, attn_implementation="sdpa")
    assert open_base(str(tmp_path), "float32", "sdpa", AutoModel).config._attn_implementation == "eager"


def sha256sum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_digest_of_weights_is_what_sha256sum_prints(tiny_model: str, tmp_path: Path) -> None:
    """For shards it is the digest of their digests, one per line, sorted by name."""
    assert weights_digest(tiny_model) == sha256sum(Path(tiny_model) / "model.safetensors")
    AutoModel.from_pretrained(tiny_model).save_pretrained(tmp_path, max_shard_size="40KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert weights_digest(str(tmp_path)) == hashlib.sha256("\n".join(map(sha256sum, shards)).encode()).hexdigest()


def test_the_digest_is_computed_once_until_the_files_change(
    tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    monkeypatch.setattr(files, "SETTLED_SECONDS", -1)  # the files are new
    digest, read = weights_digest(str(model)), []
    monkeypatch.setattr(base_weights, "sha256", lambda path: read.append(path) or sha256sum(path))
    assert weights_digest(str(model)) == digest and not read
    with (model / "model.safetensors").open("ab") as file:
        file.write(b" ")
    assert weights_digest(str(model)) == sha256sum(model / "model.safetensors") != digest
    assert read == [model / "model.safetensors"]


def test_an_empty_digest_is_computed_again(tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power failure can leave one; the agreement on the base must not be switched off by it."""
    model = str(shutil.copytree(tiny_model, tmp_path / "model"))
    monkeypatch.setattr(files, "SETTLED_SECONDS", -1)  # the files are new
    before = set((cache_dir() / "kept").glob("*"))
    digest = weights_digest(model)
    (kept,) = set((cache_dir() / "kept").glob("*")) - before
    kept.write_text("")
    assert weights_digest(model) == digest == kept.read_text()


def test_a_folder_without_weights_is_an_error(tiny_model: str, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    (model / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"has no weights: none of model.safetensors, model.safetensors.index.json"):
        weights_digest(str(model))
