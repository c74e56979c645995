"""Save a model as an adapter folder in PEFT's own format, and open it again.

    adapter_config.json, adapter_model.safetensors   the adapter, for PEFT; with the head where a class of Transformers
                                                     has the same head (`classifier.py`)
    head.safetensors                                 the head of a task that trains one
    task.json                                        task, labels, data sets, base, computation; columns and length of
                                                     the data
    README.md                                        the model card
    tokenizer*.json, preprocessor_config.json        the tokenizer or image processor

The folder names its base in a way that holds on every machine (`base_reference.py`).
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from copra_fl.adapters import residual as residuals
from copra_fl.adapters.state import PEFT_PREFIX, Adapter, part_of, parts
from copra_fl.config import ConfigError, DataConfig, Value
from copra_fl.data.multi import consecutive_ranges
from copra_fl.files import copy_permissions
from copra_fl.models.adapted import AdaptedModel
from copra_fl.models.base_reference import BaseReference
from copra_fl.models.build import choose_device, open_model
from copra_fl.models.card import ModelFacts, Training, write_adapter_card
from copra_fl.models.classifier import Classifier, stock_classifier
from copra_fl.seeding import torch_stream
from copra_fl.tasks import Task, find_task
from copra_fl.wording import unknown_name


@dataclass(frozen=True)
class SavedModel:
    """A model opened from an adapter folder: `model(**processor(...))` returns logits.

    Attributes:
        model: the base with adapter and head.
        processor: makes contents the inputs of `model`: the tokenizer or image processor of the base, or the task's
            `opened_processor`.
        labels: the label of each logit, in order; empty for a task without labels.
        base: the base that the folder names.
        quantization: of the base in training.
        data: settings of the run's data that `model` needs for new examples: columns, ``max-length``, the task's
            options. In folders of earlier versions the options alone.
        datasets: name of each data set -> number of its labels, in order, for a model of several data sets; else empty.
    """

    model: AdaptedModel
    processor: Any
    labels: list[str]
    base: BaseReference
    quantization: str
    data: dict[str, Value]
    datasets: dict[str, int]


def save(
    model: AdaptedModel,
    directory: Path,
    labels: list[str],
    data: DataConfig,
    residual: Adapter | None = None,
    training: Training | None = None,
    datasets: Mapping[str, int] | None = None,
) -> None:
    """Write `model` to `directory`, an adapter folder.

    A core and a `residual` are folded into one plain adapter of a higher rank, so that PEFT alone can open it.

    Args:
        data: the run's section.
        training: of the model, for its card.
        datasets: as in `SavedModel`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    model.gates.open()
    task, source = model.task, str(model.base.name_or_path)
    base = BaseReference.of(source)
    classifier = stock_classifier(model, model.head, labels)
    lora, tensors = _plain_adapter(model, residual or {})
    lora.base_model_name_or_path, lora.revision, lora.inference_mode = base.name, base.revision, True
    auto_mapping = None
    if classifier is not None:
        tensors = _of_classifier(tensors, classifier)
        lora.modules_to_save = [classifier.head]
        lora.task_type = "SEQ_CLS" if task.pipeline == "text-classification" else None
        parent = type(classifier.model)
        auto_mapping = {"base_model_class": parent.__name__, "parent_library": parent.__module__}
    if task.trains_head:
        lora.target_modules, lora.exclude_modules = _pattern(tensors), None
    lora.save_pretrained(str(directory), auto_mapping_dict=None if lora.task_type else auto_mapping)
    save_file(tensors, directory / "adapter_model.safetensors", {"format": "pt"})
    if model.head is not None:
        head = {name: tensor.detach().cpu() for name, tensor in model.head.state_dict().items()}
        save_file(head, directory / "head.safetensors")
    description = {
        "task": task.name,
        "labels": labels,
        "datasets": dict(datasets or {}),
        "options": task.option_values(data),
        "data": _data_settings(task, data),
        "base": asdict(base),
        "pooling": model.pooling,
        "dtype": str(model.base.dtype).removeprefix("torch."),
        "attention": model.base.config._attn_implementation,
        "quantization": "4bit" if getattr(model.base, "is_loaded_in_4bit", False) else "none",
    }
    (directory / "task.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    opened = task.opened_processor(task.processor_class.from_pretrained(source), labels, task.option_values(data))
    processor = task.classifier_processor(opened, data.max_length) if task.trains_head else task.saved_processor(opened)
    processor.save_pretrained(directory)
    facts = ModelFacts(task, labels, base, model.pooling, description["quantization"], training, datasets or ())
    write_adapter_card(directory, facts, lora.r, type(classifier.model).__name__ if classifier else "")
    copy_permissions(directory / "README.md", directory.glob("*.safetensors"))


def _plain_adapter(model: AdaptedModel, residual: Adapter) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Return PEFT's configuration and tensors of the adapter, with core and `residual` folded in."""
    adapter, lora = model.read_adapter(), cast(LoraConfig, copy.copy(model.peft.peft_config["default"]))
    if not residual and not parts(adapter, {"R"}):
        return lora, {_peft_name(name): tensor for name, tensor in parts(adapter, {"A", "B", "m"}).items()}
    folded = residuals.fold(adapter, residual, lora.lora_alpha / lora.r)
    lora.r = lora.lora_alpha = next(len(tensor) for name, tensor in folded.items() if part_of(name) == "A")
    return lora, folded


def _peft_name(name: str) -> str:
    """Return PEFT's name of the tensor `name` in a file: DoRA's magnitudes have no ``.weight`` there."""
    return name.removesuffix(".weight") if part_of(name) == "m" else name


def _of_classifier(tensors: Mapping[str, Tensor], classifier: Classifier) -> dict[str, Tensor]:
    """Return the adapter as one of the stock classifier, with the head."""
    body = f"{PEFT_PREFIX}{classifier.body}."
    adapter = {body + name.removeprefix(PEFT_PREFIX): tensor for name, tensor in tensors.items()}
    head = classifier.model.get_submodule(classifier.head).state_dict()
    return adapter | {f"{PEFT_PREFIX}{classifier.head}.{name}": tensor.cpu() for name, tensor in head.items()}


def _pattern(tensors: Mapping[str, Tensor]) -> str:
    """Return a pattern of the whole names of the adapted modules.

    Names such as ``query`` would also match in a class with another head, which Transformers then draws at random. With
    whole names PEFT opens the adapter on the class it belongs to, and raises an error for another.
    """
    modules = dict.fromkeys(_module_of(name) for name in tensors if ".lora_" in name)
    patterns = dict.fromkeys(re.sub(r"\\\.\d+(?=\\\.)", r"\\.\\d+", re.escape(module)) for module in modules)
    return "|".join(patterns)


def _module_of(name: str) -> str:
    return name.removeprefix(PEFT_PREFIX).partition(".lora_")[0]


def _data_settings(task: Task, data: DataConfig) -> dict[str, Value]:
    keys = (*task.columns, *task.optional_columns, "max-length", *task.options)
    return {key: data.value(key) for key in keys}


def load(directory: str | Path, device: str = "auto", base: str = "", dtype: str = "", dataset: str = "") -> SavedModel:
    """Open a model that `save` wrote, with the adapter on its base.

    Args:
        directory: the adapter folder.
        device: auto, cpu or cuda.
        base: where the base is: an asset, a folder, or a name on the hub; empty: where the adapter folder says.
        dtype: of the base, which is dequantized if it is quantized; empty: as it was trained.
        dataset: name of one of several data sets: the model gives the logits of its labels alone, whose names lose
            that of the data set; empty: those of all data sets.

    Raises ConfigError for files of the folder that are missing or damaged, an unknown task or data set, a base that is
    missing or has another digest, and for cuda without a CUDA device; AssetError for an asset that cannot be fetched.
    """
    directory = Path(directory)
    description = read_description(directory)
    task, datasets = find_task(description["task"]), description.get("datasets", {})
    rows = _rows_of(dataset, datasets) if dataset else range(len(description["labels"]))
    with _readable(directory / "adapter_config.json"):
        lora = LoraConfig.from_pretrained(str(directory))
    named = description.get("base")
    reference = BaseReference(**named) if named else BaseReference.of_earlier_version(lora.base_model_name_or_path)
    source = reference.find(base)
    attention, quantization = description["attention"], description.get("quantization", "none")
    body = open_model(source, dtype or description["dtype"], attention, quantization, task, choose_device(device))
    if dtype and quantization != "none":
        body.dequantize(getattr(torch, dtype))
    adapter = _adapter_tensors(directory, lora, body.base_model_prefix)
    lora.target_modules, lora.exclude_modules, lora.modules_to_save = {_module_of(name) for name in adapter}, None, None
    lora.task_type, lora.auto_mapping, lora.base_model_name_or_path = task.peft_type, None, source
    try:
        with torch_stream(torch.device("cpu"), 0, "init"):  # of tensors that are overwritten below
            peft = get_peft_model(body, lora)
    except ValueError as error:
        raise ConfigError(f"the adapter in {directory} does not fit the base {source}: {error}") from error
    head = None
    if task.trains_head:
        stored = _read_tensors(directory / "head.safetensors")
        weights = {name: tensor[rows.start : rows.stop].clone() for name, tensor in stored.items()}
        head = nn.Linear(weights["weight"].shape[1], weights["weight"].shape[0], bias="bias" in weights)
        adapter |= {f"head.{name}": tensor for name, tensor in weights.items()}
    model = AdaptedModel(task, peft, head, description["pooling"], "layer", choose_device(device))
    shapes = {name: tensor.shape for name, tensor in model.read_adapter().items()}
    if shapes != {name: tensor.shape for name, tensor in adapter.items()}:
        raise ConfigError(f"the adapter in {directory} does not fit the base {source}: it has tensors of other shapes")
    model.write_adapter(adapter)
    labels = [label.removeprefix(f"{dataset}/") for label in description["labels"][rows.start : rows.stop]]
    options = description.get("options", {})
    processor = task.opened_processor(task.processor_class.from_pretrained(source), labels, options)
    data = description.get("data", options)
    return SavedModel(model, processor, labels, reference, quantization, data, {} if dataset else datasets)


def read_description(directory: Path) -> dict[str, Any]:
    """Return the content of ``task.json`` in an adapter folder. Raises ConfigError if it is missing or damaged."""
    with _readable(directory / "task.json") as file:
        return dict(json.loads(file.read_text(encoding="utf-8")))


def _read_tensors(file: Path) -> dict[str, Tensor]:
    with _readable(file):
        return load_file(file)


@contextmanager
def _readable(file: Path) -> Iterator[Path]:
    """Raise ConfigError for a `file` of an adapter folder that the block cannot read."""
    try:
        yield file
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(
            f"{file} is missing or damaged: {error}. Copy the folder again; in a clone of a repository of the hub, run "
            "`git lfs pull`"
        ) from error


def _rows_of(dataset: str, datasets: Mapping[str, int]) -> range:
    """Return the rows of the head of `dataset`, one of `datasets`. Raises ConfigError for another name."""
    if not datasets:
        raise ConfigError(f"dataset = {dataset!r} has no effect: the adapter does not name several data sets")
    if dataset not in datasets:
        raise ConfigError(unknown_name("data set", dataset, datasets))
    return dict(zip(datasets, consecutive_ranges(list(datasets.values())), strict=True))[dataset]


def require_dataset(directory: Path, dataset: str) -> None:
    """Raise ConfigError if the model in `directory` has several data sets and `dataset`, the name of one, is empty."""
    datasets = read_description(directory).get("datasets", {})
    if datasets and not dataset:
        names = ", ".join(datasets)
        raise ConfigError(f"{directory} has the labels of several data sets; choose one with --dataset: {names}")


def load_exact(directory: Path, device: str, base: str, dataset: str) -> SavedModel:
    """Open a model with the labels of one data set as `load` does, with an unquantized base in float32.

    It has the scores of the merged model. Raises ConfigError as `load` and `require_dataset` do.
    """
    require_dataset(directory, dataset)
    quantized = read_description(directory).get("quantization", "none") != "none"
    return load(directory, device, base, "" if quantized else "float32", dataset)


def _adapter_tensors(directory: Path, lora: LoraConfig, body: str) -> Adapter:
    """Return the tensors of the adapter without a head, by their names in the base alone, whose prefix is `body`."""
    stored = _read_tensors(directory / "adapter_model.safetensors")
    tensors = {
        name if part_of(name) in ("A", "B") else f"{name}.weight": tensor
        for name, tensor in parts(stored, {"A", "B", "m"}).items()
    }
    if not lora.modules_to_save:
        return tensors
    prefix = f"{PEFT_PREFIX}{body}."
    return {PEFT_PREFIX + name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
