"""Models that leave: stock PEFT and Transformers open adapter folders and merged models, with our logits and labels."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pandas as pd
import pytest
import torch
from peft import AutoPeftModelForFeatureExtraction
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel, pipeline

from copra_fl import load
from copra_fl.config import Config, ConfigError
from copra_fl.files import build_once
from copra_fl.models.base_weights import weights_digest
from copra_fl.models.build import build_model
from copra_fl.models.export import save
from copra_fl.models.merged import export_merged
from copra_fl.models.prediction import Score, score
from copra_fl.sources.assets import ASSETS, asset_in
from tests.support.command_line import run_command
from tests.support.federations import finished_run
from tests.support.model_hub import Hub, model_hub
from tests.support.tiny import WORDS, Settings, no_network
from tests.support.worlds import World, jitter

LABELS = ["first", "second", "third"]
TEXTS = ["sea1 sea2 sky3", "sand1", "sky1 sky2 sky3 sea4 sea5 sand11"]
#: largest difference of a probability: float32, merged weights, other order of sums
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def run(tiny: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on a CSV, whose rule adds to W0."""
    rates = {"learning-rate": 0.02, "head-learning-rate": 0.05}
    work = {"local-steps": 12, "batch-size": 16}
    return finished_run(tiny | rates | work | {"rule": "fedex-lora"}, tmp_path_factory.mktemp("leave") / "run")


def saved_adapter(settings: Settings, folder: Path) -> Any:
    """Write a random model to `folder` and return it; DoRA needs larger noise, because it normalizes the rows."""
    config = Config.from_flat(settings)
    model = build_model(config.model, "layer", len(LABELS), seed=0)
    model.write_adapter(jitter(model.read_adapter(), 3, 1.0 if config.model.dora else 0.3))
    save(model, folder, LABELS, config.data)
    return model


def card_code(folder: Path, number: int, base: object = "") -> dict[str, Any]:
    """Run the code block `number` of the model card in `folder` and return its names."""
    code = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[number]
    names: dict[str, Any] = {}
    exec(code.replace("FOLDER", str(folder)).replace("BASE", str(base)), names)
    return names


def scores(opened: Any) -> Tensor:
    """Return (texts, labels) the scores that a pipeline gives, in the order of `LABELS`."""
    rows = opened(TEXTS, top_k=None, truncation=True)
    by_label = [{entry["label"]: entry["score"] for entry in row} for row in rows]
    return torch.tensor([[row[label] for label in LABELS] for row in by_label])


def expected_scores(model: Any, folder: Path) -> Tensor:
    """Return our own probabilities of `TEXTS`, each alone, so that nothing is padded."""
    processor = load(folder, "cpu").processor
    with torch.inference_mode():
        logits = [model(**processor([text], return_tensors="pt", return_token_type_ids=False)) for text in TEXTS]
    return torch.cat(logits).softmax(1)


@pytest.mark.parametrize(
    ("pooling", "stock", "dora"), [("mean", False, True), ("cls", False, False), ("pooler", True, True)]
)
def test_stock_libraries_open_the_adapter_and_the_merged_model_with_our_scores(
    tiny: Settings, tmp_path: Path, pooling: str, stock: bool, dora: bool
) -> None:
    """BertForSequenceClassification has the pooler's head only; the code is that of the model cards."""
    folder, merged = tmp_path / "adapter", tmp_path / "merged"
    model = saved_adapter(tiny | {"pooling": pooling, "dora": dora}, folder)
    expected = expected_scores(model, folder)
    assert float((expected[0] - expected[1]).abs().max()) > 100 * TOLERANCE
    opened = card_code(folder, 1, tiny["model"])
    if stock:
        assert torch.allclose(scores(opened["run"]), expected, atol=TOLERANCE)
        assert type(opened["base"]).__name__ == "BertForSequenceClassification"
    else:
        batch = load(folder, "cpu").processor(TEXTS, padding=True, return_tensors="pt", return_token_type_ids=False)
        with torch.inference_mode():
            assert torch.allclose(opened["logits"](**batch).softmax(1), expected, atol=TOLERANCE)
    before = weights_digest(str(tiny["model"]))
    export_merged(folder, merged, "float32")
    assert torch.allclose(scores(card_code(merged, 0)["run"]), expected, atol=TOLERANCE)
    assert (merged / "pooled_classifier.py").exists() != stock
    modes = {path.stat().st_mode for place in (folder, merged) for path in place.iterdir()}
    assert len(modes) == 1, "whoever may read the model card may read the weights"
    assert before == weights_digest(str(tiny["model"]))


@pytest.mark.parametrize("pooling", ["mean", "cls", "pooler"])
def test_the_code_of_a_card_opens_a_base_in_bfloat16(
    tiny: Settings, tmp_path: Path, pooling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its features are in bfloat16 and the head in float32; no class has the head."""
    base = shutil.copytree(str(tiny["model"]), tmp_path / "base")
    AutoModel.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    monkeypatch.setattr("copra_fl.models.export.stock_classifier", lambda *_: None)
    model = saved_adapter(tiny | {"model": str(base), "dtype": "bfloat16", "pooling": pooling}, tmp_path / "adapter")
    opened = card_code(tmp_path / "adapter", 1, base)
    inputs = load(tmp_path / "adapter", "cpu").processor(TEXTS[0], return_tensors="pt", return_token_type_ids=False)
    with torch.inference_mode():
        assert torch.allclose(opened["logits"](**inputs), model(**inputs), atol=0.05)


def test_merged_weights_can_be_stored_in_16_bits(tiny: Settings, tmp_path: Path) -> None:
    """bfloat16 keeps 8 bits of each weight."""
    model = saved_adapter(tiny, tmp_path / "adapter")
    export_merged(tmp_path / "adapter", tmp_path / "merged", "bfloat16")
    stored = load_file(tmp_path / "merged" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    expected = expected_scores(model, tmp_path / "adapter")
    assert torch.allclose(scores(card_code(tmp_path / "merged", 0)["run"]), expected, atol=0.03)


@pytest.mark.parametrize("pooling", ["mean", "pooler"])
def test_pipeline_never_answers_from_an_adapter_folder_with_a_random_head(
    tiny: Settings, tmp_path: Path, pooling: str
) -> None:
    """Without the labels, which an adapter folder cannot tell Transformers, there is no answer."""
    saved_adapter(tiny | {"pooling": pooling}, tmp_path)
    with pytest.raises((ValueError, KeyError)):
        pipeline("text-classification", str(tmp_path))(TEXTS[0])


def test_no_file_of_an_adapter_folder_names_a_cache(tiny: Settings, tmp_path: Path, monkeypatch) -> None:
    """The base is an asset in a cache: files name the hub's model, and any cache serves it, also from a path."""
    minilm = ASSETS["minilm"]
    cache = tmp_path / "cache"
    base = cache / "assets" / minilm.folder_name
    build_once(base, lambda scratch: Path(shutil.copytree(str(tiny["model"]), scratch / "model")))
    folder = tmp_path / "adapter"
    model = saved_adapter(tiny | {"model": str(base)}, folder)
    for file in (path for path in folder.iterdir() if path.suffix in (".json", ".md")):
        assert str(tmp_path) not in file.read_text(), file
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == minilm.hub == "sentence-transformers/all-MiniLM-L6-v2"
    reference = json.loads((folder / "task.json").read_text())["base"]
    assert reference["asset"] == "minilm" and reference["sha256"] == weights_digest(str(base))
    assert "base_model: sentence-transformers/all-MiniLM-L6-v2\n" in (folder / "README.md").read_text()
    no_network(monkeypatch)
    monkeypatch.setenv("COPRA_FL_ASSETS", str(cache / "assets"))
    assert asset_in("/elsewhere/assets/" + minilm.folder_name) is minilm
    expected = model.read_adapter()
    opened = load(folder, "cpu").model.read_adapter()
    assert opened.keys() == expected.keys() and all(torch.equal(opened[name], expected[name]) for name in expected)


def test_a_base_of_the_hub_is_named_with_its_commit(tiny: Settings, tmp_path: Path, monkeypatch) -> None:
    """In the hub's cache; stock PEFT opens the adapter from there."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    model = tmp_path / "models--owner--tiny"
    shutil.copytree(str(tiny["model"]), model / "snapshots" / commit)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    folder = tmp_path / "adapter"
    saved_adapter(tiny | {"model": "owner/tiny"}, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("owner/tiny", commit)
    card = (folder / "README.md").read_text()
    assert "base_model: owner/tiny\n" in card and "base_model:adapter:owner/tiny\n" in card and commit in card
    assert load(folder, "cpu").base.sha256 == weights_digest(str(tiny["model"]))
    assert AutoPeftModelForFeatureExtraction.from_pretrained(folder).peft_config["default"].r == 2


def test_a_base_may_lie_elsewhere_and_must_have_the_same_weights(tiny: Settings, tmp_path: Path) -> None:
    base = Path(shutil.copytree(str(tiny["model"]), tmp_path / "base"))
    folder = tmp_path / "adapter"
    saved_adapter(tiny | {"model": str(base)}, folder)
    shutil.move(base, moved := tmp_path / "moved")
    digest = weights_digest(str(moved))
    with pytest.raises(ConfigError, match=f"Set base to the folder with the model whose weights have SHA-256 {digest}"):
        load(folder, "cpu")
    load(folder, "cpu", base=str(moved))
    model = AutoModel.from_pretrained(moved)
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1e-3
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(ConfigError, match=f"the base differs: .* trained on weights with {digest}; set base to"):
        load(folder, "cpu", base=str(tmp_path / "other"))


def test_a_folder_of_an_earlier_version_opens_and_becomes_portable(run: Path, tmp_path: Path) -> None:
    """It has names of modules, no digest, no settings of the data, no tokenizer and no card."""
    old = Path(shutil.copytree(run, tmp_path / "old"))
    adapter = old / "adapter"
    description = json.loads((adapter / "task.json").read_text())
    del description["base"], description["data"]
    (adapter / "task.json").write_text(json.dumps(description))
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["query", "value"]}))
    for name in ("tokenizer.json", "tokenizer_config.json", "README.md"):
        (adapter / name).unlink()
    run_command("export", old, "--to", tmp_path / "portable")
    files = {path.name for path in (run / "adapter").iterdir()}
    assert files == {path.name for path in (tmp_path / "portable").iterdir()}
    for name in ("adapter_model.safetensors", "head.safetensors"):
        expected, written = (load_file(folder / name) for folder in (run / "adapter", tmp_path / "portable"))
        assert expected.keys() == written.keys() and all(torch.equal(expected[key], written[key]) for key in expected)
    assert json.loads((tmp_path / "portable" / "task.json").read_text())["data"]["max-length"] == 16
    shutil.move(adapter, alone := tmp_path / "alone")
    message = run_command("predict", alone, "--data", "x.csv", "--to", tmp_path / "y.csv", code=2).message
    assert "there is no file" in message


def test_the_card_of_a_run_names_base_data_method_and_results(run: Path) -> None:
    card = huggingface_hub.ModelCard.load(run / "adapter" / "README.md")
    summary = json.loads((run / "summary.json").read_text())
    assert card.data.library_name == "peft" and card.data.pipeline_tag == "text-classification"
    assert "lora" in card.data.tags
    (result,) = card.data.eval_results
    assert result.metric_value == round(summary["test"]["accuracy"], 4) and result.dataset_name == "texts"
    training = ("rule fedex-lora", "rounds | 2", "rank 2, alpha 16", "partitioner = dirichlet")
    for fact in ("tiny-bert", "sand, sea, sky", "adapter of rank 34 in PEFT", *training):
        assert fact in card.text, fact
    assert "/tmp" not in card.text


def test_the_card_names_the_examples_of_a_step_and_the_rate_of_what_is_trained(tiny: Settings, tmp_path: Path) -> None:
    changes = {"local-training": "head", "gradient-accumulation": 3, "head-learning-rate": 0.05, "num-rounds": 1}
    run = finished_run(tiny | changes, tmp_path / "run")
    card = (run / "adapter" / "README.md").read_text()
    assert "| local work | 3 steps of 12 examples (batch-size 4 x gradient-accumulation 3) |" in card
    assert "| optimizer | adamw, learning rate 0.05 |" in card


def test_from_csv_to_predictions_through_the_pipeline(run: Path, tiny: Settings, tmp_path: Path) -> None:
    """Trained, exported, opened by pipeline(), predicted: the labels and the accuracy are those of our evaluation."""
    merged, predictions = tmp_path / "merged", tmp_path / "predictions.csv"
    test = World(tiny).data.test
    rows = pd.read_csv(str(tiny["dataset"])).iloc[test].sample(frac=1, random_state=0)
    rows.to_csv(tmp_path / "test.csv", index=False)
    run_command("export", run, "--merge", "--to", merged)
    out = run_command("predict", run, "--data", tmp_path / "test.csv", "--to", predictions, "--batch-size", 7).out
    written = pd.read_csv(predictions)
    assert written["text"].tolist() == rows["text"].tolist() and written["owner"].tolist() == rows["owner"].tolist()
    classify = pipeline("text-classification", str(merged), trust_remote_code=True)
    answers = classify(rows["text"].tolist(), truncation=True)
    assert [answer["label"] for answer in answers] == written["predicted"].tolist()
    probabilities = written[[f"probability {label}" for label in ("sand", "sea", "sky")]].to_numpy()
    assert np.allclose([answer["score"] for answer in answers], probabilities.max(1), atol=TOLERANCE)
    assert np.allclose(probabilities.sum(1), 1, atol=1e-5)
    summary = json.loads((run / "summary.json").read_text())["test"]
    scores = f"accuracy {summary['accuracy']:.1%}, macro-F1 {summary['metrics']['macro_f1']:.1%}"
    assert out.splitlines() == [
        f"{predictions}: {len(rows)} rows",
        f"{scores} ({len(rows)} rows with a label in 'label')",
    ]
    assert (written["predicted"] == written["label"]).mean() == pytest.approx(summary["accuracy"])
    assert summary["accuracy"] > 0.5 and summary["examples"] == len(rows)
    of_label = probabilities[np.arange(len(rows)), written["label"].map({"sand": 0, "sea": 1, "sky": 2})]
    assert -np.log(of_label).mean() == pytest.approx(summary["loss"], rel=1e-4)


def test_a_score_counts_rows_with_a_label() -> None:
    """By hand: F1 of sea 2/3, of sky 1, of ice 0, which the model does not have; sand occurs nowhere."""
    rows = pd.DataFrame({"predicted": ["sea", "sea", "sky", "sky"], "code": [" sea", "ice", "sky", None]})
    expected = Score(examples=3, unknown=1, accuracy=2 / 3, macro_f1=pytest.approx((2 / 3 + 1 + 0) / 3))
    assert score(rows, ["sand", "sea", "sky"], "code") == expected
    assert score(rows, ["sea", "sky"], "label") is None and score(rows[3:], ["sea", "sky"], "code") is None


def test_predictions_of_a_run_in_bfloat16_are_those_of_the_merged_model(tiny: Settings, tmp_path: Path) -> None:
    folder, merged, predictions = tmp_path / "adapter", tmp_path / "merged", tmp_path / "predictions.csv"
    saved_adapter(tiny | {"dtype": "bfloat16"}, folder)
    export_merged(folder, merged, "float32")
    pd.DataFrame({"text": TEXTS}).to_csv(tmp_path / "rows.csv", index=False)
    run_command("predict", folder, "--data", tmp_path / "rows.csv", "--to", predictions)
    written = pd.read_csv(predictions)[[f"probability {label}" for label in LABELS]].to_numpy()
    assert np.allclose(written, scores(card_code(merged, 0)["run"]), atol=TOLERANCE)


def test_predict_takes_other_formats_columns_and_adapter_folders(run: Path, tiny: Settings, tmp_path: Path) -> None:
    rows = pd.DataFrame({"2024": [" ".join(WORDS[i : i + 3]) for i in range(0, 30, 3)], "id": range(10)})
    rows.to_parquet(tmp_path / "notes.parquet")
    rows.to_csv(tmp_path / "notes.csv", sep=";", index=False)
    alone = shutil.copytree(run / "adapter", tmp_path / "alone")
    arguments = ("--data", tmp_path / "notes.parquet", "--to", tmp_path / "out.parquet", "--set", "text-column=2024")
    run_command("predict", alone, *arguments)
    written = pd.read_parquet(tmp_path / "out.parquet")
    assert written["id"].tolist() == list(range(10)) and set(written["predicted"]) <= {"sand", "sea", "sky"}
    assert written["probability sea"].dtype == np.float32
    arguments = ("--data", tmp_path / "notes.csv", "--set", "text-column=2024", "--set", "separator=semicolon")
    run_command("predict", alone, *arguments, "--to", tmp_path / "out.tsv")
    assert pd.read_csv(tmp_path / "out.tsv", sep="\t")["predicted"].tolist() == written["predicted"].tolist()


@pytest.mark.parametrize(
    ("rows", "arguments", "message"),
    [
        ({"text": ["sea1", "", "sky1", " "]}, [], "'text' is empty in 2 of 4 rows: 1, 3 (counted from 0)"),
        ({"note": ["sea1"]}, [], "its columns are note. Set it: --set text-column=COLUMN"),
        (
            {"text;note": ["sea1;x"]},
            [],
            "its columns are text;note. Its columns seem to be separated otherwise: set sep",
        ),
        ({"text": ["sea1"]}, ["--set", "max-length=600"], "max-length = 600 is more than the 512 tokens that model"),
        ({f"c{i}": ["x"] for i in range(25)}, [], "c18, c19 and 6 more. Set it: --set text-column=COLUMN"),
        ({"text": ["sea1"], "predicted": ["sea"]}, [], "already has a column 'predicted'; rename it"),
        ({"text": ["sea1"]}, ["--set", "text-colum=note"], "unknown configuration key 'text-colum'"),
        ({"text": ["sea1"]}, ["--set", "learning-rate=1"], "--set learning-rate has no effect on a prediction"),
        ({"text": ["sea1"]}, ["--to", "out.xlsx"], "out.xlsx ends in '.xlsx'; supported formats are .csv"),
        ({"text": ["sea1"]}, ["--to", "nowhere/out.csv"], "there is no folder"),
    ],
)
def test_rows_that_cannot_be_predicted_are_rejected(
    run: Path, tmp_path: Path, rows: dict, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("copra_fl.models.prediction._probabilities", None)  # nothing is computed
    pd.DataFrame(rows | {"id": "x"}).to_csv(tmp_path / "rows.csv", index=False)
    if "id" in message or "its columns" in message:
        pd.DataFrame(rows).to_csv(tmp_path / "rows.csv", index=False)
    target = [] if "--to" in arguments else ["--to", tmp_path / "out.csv"]
    output = run_command("predict", run, "--data", tmp_path / "rows.csv", *target, *arguments, code=2)
    assert message in output.message
    assert not (tmp_path / "out.csv").exists()


def test_columns_with_lists_and_dicts_stay_and_images_go(run: Path, tmp_path: Path) -> None:
    """In a CSV they are JSON. Image bytes stand alone, or in a dict as in Hugging Face data sets."""
    notes = {"text": ["sea1", "sky1"], "meta": [{"ward": "Ä", "beds": [1, 2]}, None], "tags": [["x"], []]}
    images = {"image": [{"bytes": b"png", "path": None}, None], "scan": [b"png", None]}
    pd.DataFrame(notes | images | {"id": [1, 2]}).to_parquet(tmp_path / "notes.parquet")
    for suffix in ("csv", "jsonl"):
        run_command("predict", run, "--data", tmp_path / "notes.parquet", "--to", tmp_path / f"out.{suffix}")
    written = pd.read_csv(tmp_path / "out.csv", keep_default_na=False)
    assert list(written)[:4] == ["text", "meta", "tags", "id"] and list(written)[4] == "predicted"
    assert written["meta"].tolist() == ['{"ward": "Ä", "beds": [1, 2]}', ""]
    assert written["tags"].tolist() == ['["x"]', "[]"]
    assert pd.read_json(tmp_path / "out.jsonl", lines=True)["meta"].tolist() == notes["meta"]


def test_values_that_parquet_does_not_take_are_one_line(run: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "sea1", "id": 1}\n{"text": "sky1", "id": "A7"}\n')
    files = ("--data", tmp_path / "rows.jsonl", "--to", tmp_path / "out.parquet")
    message = run_command("predict", run, *files, code=2).message
    assert "cannot be stored as Parquet: Could not convert 'A7' with type str: tried to convert to int64" in message


def test_folders_without_an_adapter_are_rejected(run: Path, tmp_path: Path) -> None:
    to = ("--to", tmp_path / "to")
    assert "is not the folder of a run or of an adapter" in run_command("export", tmp_path, *to, code=2).message
    (tmp_path / "config.toml").write_text("")
    assert "has not finished, or its rule trains one model" in run_command("export", tmp_path, *to, code=2).message
    (tmp_path / "comparison.toml").write_text("")
    assert "is a comparison: name one of the runs" in run_command("export", tmp_path, *to, code=2).message
    assert "is not an empty folder" in run_command("export", run, "--to", tmp_path, code=2).message


@pytest.mark.parametrize("name", ["task.json", "adapter_config.json", "adapter_model.safetensors", "head.safetensors"])
def test_a_damaged_file_of_an_adapter_folder_is_named(run: Path, tmp_path: Path, name: str) -> None:
    """A clone of a repository without Git LFS has a pointer in place of each large file."""
    adapter = Path(shutil.copytree(run / "adapter", tmp_path / "adapter"))
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 1234\n"
    (adapter / name).write_text("{" if name.endswith(".json") else pointer)
    message = run_command("export", adapter, "--to", tmp_path / "to", code=2).message
    assert f"{adapter / name} is missing or damaged: " in message and "git lfs pull" in message
    (adapter / name).unlink()
    with pytest.raises(ConfigError, match=rf"{name} is missing or damaged"):
        load(adapter, "cpu")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub on this machine, with HF_ENDPOINT, HF_TOKEN and HF_HUB_DISABLE_XET set as in the environment of a user.

    huggingface_hub reads the variables when it is imported.
    """
    with model_hub("hf_secret") as hub:
        for name, value in {"ENDPOINT": hub.address, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}.items():
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        yield hub


def test_push_uploads_the_exported_folder(run: Path, hub: Hub, tmp_path: Path) -> None:
    """Twice: the second time the model is there already."""
    for _ in range(2):
        out = run_command("push", run, "hospital/notes", "--private").out
        assert out.strip() == f"{hub.address}/hospital/notes"
    assert hub.private == {"hospital/notes"}
    run_command("export", run, "--to", tmp_path / "notes")
    exported = {path.name: path.read_bytes() for path in (tmp_path / "notes").iterdir()}
    assert hub.models == {"hospital/notes": exported}
    assert len(hub.large) == 2, "the adapter and its head"


def test_a_push_that_cannot_work_says_what_to_do(run: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def message(code: int, repository: str = "hospital/notes") -> str:
        return run_command("push", run, repository, code=code).message

    assert message(2, "notes").endswith("a model on the hub is called OWNER/NAME, of letters, digits, '-', '_' and '.'")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "has rejected the upload to hospital/notes: Invalid username or password" in message(1)
    with monkeypatch.context() as patch:
        patch.delenv("HF_TOKEN")
        patch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(run / "no-token"))
        assert "there is no access token for http://127.0.0.1" in message(1)
    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
        assert "cannot reach http://127.0.0.1:9: " in message(1)
        patch.setattr(huggingface_hub.constants, "ENDPOINT", "http://host:port")
        assert "cannot reach http://host:port: Invalid port: 'port'. Check the network, or set HF_ENDPOINT" in message(
            1
        )
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set, so that nothing is uploaded" in message(1)
    assert hub.models == {}
