"""Images: read equally from every format, trained equally by both engines, and clear errors for invalid ones."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
import transformers as tf
from peft import PeftModel
from PIL import ExifTags, Image
from transformers.image_utils import load_image

from copra_fl import files, tasks
from copra_fl.config import Config, ConfigError
from copra_fl.data import federated
from copra_fl.data.federated import load_data
from copra_fl.data.local import load_local_data
from copra_fl.models import memory_plan
from copra_fl.models.build import build_model, load_processor
from copra_fl.models.export import load, save
from copra_fl.models.merged import export_merged
from copra_fl.sources import tables
from copra_fl.sources.tables import file_table, find_tables
from copra_fl.tasks.images import ImageProcessor, encode_images
from copra_fl.training.evaluation import evaluate
from tests.support.local_grid import run_federation
from tests.support.tiny import Settings
from tests.support.worlds import CASES, World, assert_alike, jitter

LABELS = ("bars", "blot", "stripes")
SHAPE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
PATCHES = {"image_size": 12, "patch_size": 4}
NUM_TOKENS = 3 * 3 + 1


@pytest.fixture(scope="session")
def tiny_vit(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Path of a grayscale ViT with 3 layers, 32 wide, random weights."""
    folder = tmp_path_factory.mktemp("tiny-vit")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tf.ViTModel(tf.ViTConfig(num_channels=1, **PATCHES, **SHAPE)).save_pretrained(folder)
    tf.ViTImageProcessorPil(
        size={"height": 12, "width": 12}, image_mean=[0.4], image_std=[0.3], do_convert_rgb=False
    ).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_dino(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Path of a DINOv2 for color images, of the same size; its processor crops the center."""
    folder = tmp_path_factory.mktemp("tiny-dino")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tf.Dinov2Model(tf.Dinov2Config(mlp_ratio=2, **PATCHES, **SHAPE)).save_pretrained(folder)
    tf.BitImageProcessorPil(size={"shortest_edge": 14}, crop_size={"height": 12, "width": 12}).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one subfolder per label: 240 PNG images of 14 x 16, half of them in color."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for i in range(240):
        label, pixels = LABELS[i % 3], rng.integers(0, 120, (16, 14, 3), np.uint8)
        if label == "bars":
            pixels[:, rng.integers(2) :: 4] += 120
        elif label == "stripes":
            pixels[rng.integers(2) :: 4] += 120
        else:
            pixels[4:12, 4:10] += 120
        image = Image.fromarray(pixels if i % 2 else pixels[..., 0])
        (folder / label).mkdir(exist_ok=True)
        image.save(folder / label / f"{i:03}.png")
    return folder


@pytest.fixture
def images(tiny: Settings, tiny_vit: str, photos: Path) -> Settings:
    """Settings of a federation on the folder."""
    vision = {
        "task": "image-classification",
        "model": tiny_vit,
        "dataset": str(photos),
        "target-modules": "q_proj,v_proj",
    }
    return tiny | vision | {"server-validation-examples": 40, "test-examples": 40}


def table(photos: Path) -> pd.DataFrame:
    """The folder as a table of paths."""
    files = sorted(photos.glob("*/*.png"))
    return pd.DataFrame({"image": [str(f.relative_to(photos)) for f in files], "label": [f.parent.name for f in files]})


def load_images(settings: Settings) -> federated.FederatedData:
    config = Config.from_flat(settings)
    return load_data(config, load_processor(config.model))


@pytest.mark.parametrize("base", ["tiny_vit", "tiny_dino"])
def test_every_format_gives_the_pixels_of_transformers(
    images: Settings, photos: Path, tmp_path: Path, base: str, request: pytest.FixtureRequest
) -> None:
    """Oracle: Pillow and the model's own image processor in one call."""
    model = str(request.getfixturevalue(base))
    rows, shape = table(photos), (3 if base == "tiny_dino" else 1, 12, 12)
    processor = tf.AutoImageProcessor.from_pretrained(model, backend="pil")
    opened = [Image.open(photos / name).convert("RGB" if base == "tiny_dino" else "L") for name in rows["image"]]
    expected = processor(opened, return_tensors="pt")["pixel_values"]

    folder = shutil.copytree(photos, tmp_path / "with-csv")
    rows.to_csv(folder / "paths.csv", index=False)
    contents = [{"bytes": (photos / name).read_bytes(), "path": None} for name in rows["image"]]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    columns = {"image": contents, "label": rows["label"].tolist()}
    datasets.Dataset.from_dict(columns, features).to_parquet(tmp_path / "hugging-face.parquet")
    rows.assign(image=[content["bytes"] for content in contents]).to_parquet(tmp_path / "bytes.parquet")
    for source in (photos, folder / "paths.csv", tmp_path / "hugging-face.parquet", tmp_path / "bytes.parquet"):
        federated = load_images(images | {"model": model, "dataset": str(source)})
        batch = federated.examples.batch(np.arange(len(rows)))
        assert batch["pixel_values"].shape == (240, *shape) and federated.examples.max_length == NUM_TOKENS
        torch.testing.assert_close(batch["pixel_values"], expected)
        assert [LABELS[label] for label in batch["labels"]] == rows["label"].tolist()


@pytest.mark.parametrize("flags", [{"do_normalize": False}, {"do_rescale": False}], ids=lambda flags: next(iter(flags)))
def test_pixels_are_rescaled_and_normalized_where_the_model_s_are(
    tiny_dino: str, photos: Path, tmp_path: Path, flags: dict[str, bool]
) -> None:
    """Oracle: Transformers' own image processor, with which an exported model opens."""
    shutil.copytree(tiny_dino, tmp_path, dirs_exist_ok=True)
    settings = json.loads((tmp_path / "preprocessor_config.json").read_text()) | flags
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    opened = [Image.open(file).convert("RGB") for file in sorted(photos.glob("*/*.png"))[:3]]
    expected = tf.AutoImageProcessor.from_pretrained(tmp_path, backend="pil")(opened, return_tensors="pt")
    pixels = ImageProcessor(str(tmp_path))(opened)["pixel_values"]
    torch.testing.assert_close(pixels, expected["pixel_values"], check_dtype=False)


def test_images_are_turned_as_their_exif_data_say(images: Settings, photos: Path, tmp_path: Path) -> None:
    """Oracle: Transformers' `load_image`. Orientation 6: the file has the image on its side."""
    folder = shutil.copytree(photos, tmp_path / "turned")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.open(folder / "bars" / "000.png").save(folder / "bars" / "000.jpg", exif=exif)
    (folder / "bars" / "000.png").unlink()
    data = load_images(images | {"dataset": str(folder)})
    opened = load_image(str(folder / "bars" / "000.jpg"))
    assert opened.size == (16, 14)
    expected = tf.AutoImageProcessor.from_pretrained(images["model"], backend="pil")(
        opened.convert("L"), return_tensors="pt"
    )["pixel_values"]
    torch.testing.assert_close(data.examples.batch(np.array([0]))["pixel_values"], expected)
    processor = load_processor(Config.from_flat(images).model)
    torch.testing.assert_close(processor([Image.open(folder / "bars" / "000.jpg")])["pixel_values"], expected)


def test_a_folder_is_listed_once_and_read_once_for_all_processes(
    images: Settings, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(photos, folder := tmp_path / "new")
    listed, hashed = Counter[str](), Counter[Path]()
    list_images, sha256 = tables._images, tables.sha256

    def counted_list(listed_folder: Path) -> list[Path]:
        listed[listed_folder.name] += 1
        return list_images(listed_folder)

    def counted_sha256(path: Path) -> str:
        hashed[path] += 1
        return sha256(path)

    monkeypatch.setattr(tables, "_images", counted_list)
    monkeypatch.setattr(tables, "sha256", counted_sha256)
    monkeypatch.setattr(files, "SETTLED_SECONDS", -1)  # the files are new
    data = Config.from_flat(images | {"dataset": str(folder)}).data
    (first, _), (second, _) = find_tables(data), find_tables(data)
    assert listed == {"train": 2, "new": 2} and set(hashed.values()) == {1} and len(hashed) == 240
    assert first.digest == second.digest

    load_processor(Config.from_flat(images).model)
    monkeypatch.setattr("copra_fl.tasks.images.AutoModel", None)  # the number of tokens needs no model any more
    assert load_processor(Config.from_flat(images).model).num_tokens == NUM_TOKENS


def test_changed_images_of_a_table_are_read_again(images: Settings, photos: Path, tmp_path: Path) -> None:
    """The table itself stays as it is; an equal table beside other images has those images."""
    first, second = (shutil.copytree(photos, tmp_path / name) for name in ("first", "second"))
    name = table(photos)["image"][5]
    Image.new("L", (14, 16), 255).save(second / name)
    pixels, digests = {}, {}
    for folder in (first, second):
        table(photos).to_csv(folder / "paths.csv", index=False)
        federated = load_images(images | {"dataset": str(folder / "paths.csv")})
        pixels[folder], digests[folder] = federated.examples.batch(np.arange(240))["pixel_values"], federated.digest
    changed = [i for i in range(240) if not torch.equal(pixels[first][i], pixels[second][i])]
    assert changed == [5] and digests[first] != digests[second]
    shutil.copy(second / name, first / name)
    federated = load_images(images | {"dataset": str(first / "paths.csv")})
    assert torch.equal(federated.examples.batch(np.arange(240))["pixel_values"], pixels[second])
    assert federated.digest == digests[second], "equal content has one digest on all machines"


def test_images_of_a_table_are_found_after_a_try_with_the_wrong_separator(
    images: Settings, photos: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(photos, tmp_path / "photos")
    table(photos).to_csv(folder / "paths.csv", index=False, sep=";")
    flat = images | {"dataset": str(folder / "paths.csv")}
    with pytest.raises(ConfigError, match="separator"):
        load_images(flat)
    before = load_images(flat | {"separator": "semicolon"}).digest
    Image.new("L", (14, 16), 255).save(folder / table(photos)["image"][5])
    assert load_images(flat | {"separator": "semicolon"}).digest != before


def test_a_folder_can_have_a_test_set_and_be_the_file_of_a_node(images: Settings, photos: Path, tmp_path: Path) -> None:
    rows = table(photos)
    for i, (name, label) in enumerate(zip(rows["image"], rows["label"], strict=True)):
        part = tmp_path / ("test" if i % 4 == 0 else "train") / label
        part.mkdir(parents=True, exist_ok=True)
        shutil.copy(photos / name, part)
    (tmp_path / "train" / "bars" / "notes.txt").write_text("not an image")
    federated = load_images(images | {"dataset": str(tmp_path)})
    assert len(federated.test) == 60 and len(federated.examples) == 240

    config = Config.from_flat(images | {"partitioner": "own", "labels": "bars,blot,stripes"})
    local = load_local_data(config, load_processor(config.model), str(tmp_path / "test"), 1, 3)
    assert len(local.train[1]) + len(local.validation[1]) == 60


def test_no_test_image_equals_a_training_image(images: Settings, photos: Path, tmp_path: Path) -> None:
    doubled = pd.concat([table(photos)] * 2, ignore_index=True)
    folder = shutil.copytree(photos, tmp_path / "twice")
    doubled.to_csv(folder / "twice.csv", index=False)
    federated = load_images(images | {"dataset": str(folder / "twice.csv")})
    assert federated.dropped.duplicates > 40
    pixels = federated.examples.batch(np.arange(480))["pixel_values"]
    trained = {pixels[i].numpy().tobytes() for part in federated.train + federated.validation for i in part}
    assert not trained & {pixels[i].numpy().tobytes() for i in federated.test}


@pytest.mark.parametrize(
    "case",
    ["lora", "copra", "all linear, pooler", "cls", "epochs: unequal steps, short last batches"],
)
def test_both_engines_train_the_same_adapters(images: Settings, case: str) -> None:
    """Oracle: `train_client`, each client alone with plain PEFT. The case with the pooler has Gram matrices too."""
    rule = "ffa-lora-gram" if "pooler" in case else "fedavg"
    world = World(images | {"local-steps": 8, "num-rounds": 4, "alpha": 1.0, "rule": rule} | CASES[case])
    for update in world.together(*range(6)):
        assert_alike(update, world.alone(update.client), 1e-5)


def test_both_engines_train_the_same_adapters_on_color_images(images: Settings, tiny_dino: str) -> None:
    targets = {"target-modules": ",".join(_attention(tiny_dino))}
    world = World(images | targets | {"model": tiny_dino, "alpha": 1.0})
    for update in world.together(*range(6)):
        assert_alike(update, world.alone(update.client), 1e-5)


def _attention(model: str) -> list[str]:
    """Return the architecture's names of query and value."""
    names = {name.split(".")[-1] for name, _ in tf.AutoModel.from_pretrained(model).named_modules()}
    return sorted(names & {"query", "value", "q_proj", "v_proj"})


def test_metrics_are_means_over_single_images(images: Settings) -> None:
    """Oracle: each image through PEFT's model, the mean of its hidden states, and the head."""
    world = World(images)
    indices, losses, right = world.data.server_validation, [], []
    with torch.inference_mode():
        world.plain.write_adapter(world.start)
        for index in indices:
            batch = world.data.examples.batch(np.array([index]))
            hidden = world.plain.peft(pixel_values=batch["pixel_values"]).last_hidden_state[0]
            assert len(hidden) == NUM_TOKENS
            logits, label = world.plain.head(hidden.mean(0)), batch["labels"].item()
            losses.append((torch.logsumexp(logits, 0) - logits[label]).item())
            right.append(logits.argmax().item() == label)
    expected = {"loss": np.mean(losses), "accuracy": np.mean(right), "examples": len(indices)}
    for model in (world.plain, world.stacked):
        [result] = evaluate(model, [world.start], world.data.examples, indices, 16)
        assert result == pytest.approx(expected, rel=1e-5)


def test_a_federation_trains_an_adapter_that_classifies_images(images: Settings, photos: Path, tmp_path: Path) -> None:
    learn = {"num-rounds": 6, "local-steps": 30, "learning-rate": 0.01, "head-learning-rate": 0.01, "alpha": 5.0}
    folder = run_federation(images | learn | {"target-modules": "all-linear"}, tmp_path / "run")
    saved = load(folder / "adapter", "cpu")
    rows = table(photos)
    with torch.inference_mode():
        logits = saved.model(**saved.processor([Image.open(photos / name) for name in rows["image"]]))
    predicted = [saved.labels[i] for i in logits.argmax(1)]
    assert np.mean([a == b for a, b in zip(predicted, rows["label"], strict=True)]) > 0.8


@pytest.mark.parametrize(("base", "pooling", "stock"), [("tiny_dino", "mean", False), ("tiny_vit", "cls", True)])
def test_stock_libraries_open_the_model_with_our_scores(
    images: Settings, photos: Path, tmp_path: Path, base: str, pooling: str, stock: bool, request: pytest.FixtureRequest
) -> None:
    """The pipeline makes images RGB, so that grayscale images go through the image processor alone."""
    config = Config.from_flat(images | {"model": request.getfixturevalue(base), "pooling": pooling})
    model, files = build_model(config.model, "layer", 3, seed=0), sorted(photos.glob("*/*.png"))[70:90]
    model.write_adapter(jitter(model.read_adapter(), 3, 0.3))
    save(model, tmp_path / "adapter", list(LABELS), config.data)
    saved = load(tmp_path / "adapter", "cpu")
    with torch.inference_mode():
        expected = saved.model(**saved.processor([Image.open(file) for file in files])).softmax(1)
    merged = export_merged(tmp_path / "adapter", tmp_path / "merged", "float32")
    assert type(merged).__name__ == ("ViTForImageClassification" if stock else "PooledClassifier")
    if not stock:
        classify = tf.pipeline("image-classification", str(tmp_path / "merged"), trust_remote_code=True)
        answers = [
            {entry["label"]: entry["score"] for entry in row} for row in classify(list(map(str, files)), top_k=3)
        ]
        scores = torch.tensor([[answer[label] for label in LABELS] for answer in answers])
        torch.testing.assert_close(scores, expected, rtol=0, atol=1e-4)
        return
    names = {"id2label": dict(enumerate(LABELS))}
    adapted = PeftModel.from_pretrained(
        tf.AutoModelForImageClassification.from_pretrained(config.model.model, **names), tmp_path / "adapter"
    )
    opened = tf.AutoModelForImageClassification.from_pretrained(tmp_path / "merged")
    processor = tf.AutoImageProcessor.from_pretrained(tmp_path / "merged", backend="pil")
    pixels = processor([Image.open(file).convert("L") for file in files], return_tensors="pt")
    assert opened.config.id2label == names["id2label"]
    for classifier in (adapted.eval(), opened):
        with torch.inference_mode():
            torch.testing.assert_close(classifier(**pixels).logits.softmax(1), expected, rtol=0, atol=1e-5)


def test_two_data_sets_of_images_share_an_adapter(images: Settings, photos: Path, tmp_path: Path) -> None:
    """Each data set is as it is alone, and both engines train its clients to the same adapters."""
    other = shutil.copytree(photos, tmp_path / "other")
    (other / "blot").rename(other / "smudge")
    world = World(images | {"dataset": f"{photos}, {other}", "alpha": 1.0, "num-clients": 6})
    assert {label.split("/")[0] for label in world.data.label_names} == {photos.name, "other"}
    alone = load_images(images | {"dataset": str(other), "alpha": 1.0, "num-clients": 3})
    ours, theirs = (data.examples.batch(data.train[client]) for data, client in ((world.data, 3), (alone, 0)))
    assert torch.equal(ours["pixel_values"], theirs["pixel_values"])
    for update in world.together(*range(6)):
        assert_alike(update, world.alone(update.client), 1e-5)


def test_the_memory_plan_counts_the_tokens_of_an_image(images: Settings) -> None:
    """Eager attention keeps (heads, T, T) probabilities per layer, with T the number of an image's tokens."""
    config = Config.from_flat(images | {"step-tokens": 100, "batch-size": 4, "attention": "eager"})
    needed = memory_plan.plan(config, 3, NUM_TOKENS)
    assert needed.clients == 3  # 4 rows of 10 tokens each
    assert needed.row == memory_plan.plan(config.changed(max_length=512), 3, NUM_TOKENS).row > 0


@pytest.mark.parametrize(
    ("pixels", "suffix", "mode"),
    [(np.uint16, "png", "I;16"), (np.int32, "tiff", "I"), (np.float32, "tiff", "F")],
)
def test_images_of_more_than_8_bits_are_rejected(
    pixels: type, suffix: str, mode: str, images: Settings, tmp_path: Path
) -> None:
    """Pillow would make all values above 255 white."""
    Image.fromarray(np.arange(144).reshape(12, 12).astype(pixels) * 400).save(tmp_path / f"deep.{suffix}")
    processor = load_processor(Config.from_flat(images).model)
    file = (tmp_path / f"deep.{suffix}").read_bytes()
    bits = 16 if mode == "I;16" else 32
    with pytest.raises(
        ConfigError, match=rf"image 0 .* has {bits} bits per pixel \(Pillow's mode {mode}\); convert it"
    ):
        encode_images(processor, pd.Series([file], dtype=object))


def test_an_image_that_is_too_large_for_pillow_is_named(
    images: Settings, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(ConfigError, match=r"image 0 .* cannot be decoded: Image size .* exceeds limit"):
        encode_images(
            load_processor(Config.from_flat(images).model),
            pd.Series([(photos / "blot" / "001.png").read_bytes()], dtype=object),
        )


def test_errors_name_the_image_or_folder(images: Settings, photos: Path, tiny_model: str, tmp_path: Path) -> None:
    folder = shutil.copytree(photos, tmp_path / "broken")
    (folder / "blot" / "001.png").write_bytes(b"no image at all")
    with pytest.raises(ConfigError, match=r"image 80 .* cannot be decoded: cannot identify image"):
        load_images(images | {"dataset": str(folder)})
    table(photos).replace("bars/000.png", "bars/gone.png").to_csv(folder / "paths.csv", index=False)
    with pytest.raises(ConfigError, match=r"cannot read the image .*broken/bars/gone.png: No such file"):
        load_images(images | {"dataset": str(folder / "paths.csv")})
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"the folder .*empty has no images. It must have one subfolder per label"):
        file_table("data-path", tmp_path / "empty")
    with pytest.raises(ConfigError, match="model = .* expects input_ids, so it is not an image model"):
        load_images(images | {"model": tiny_model})
    with pytest.raises(ConfigError, match=r"unknown task 'images-classification'. Did you mean 'image-classification'"):
        tasks.find_task("images-classification")
