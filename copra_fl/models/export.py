"""Save a model as an adapter folder in PEFT's own format, and open it again."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

from copra_fl.adapters import residual as residuals
from copra_fl.adapters.state import Adapter, part_of
from copra_fl.config import DataConfig
from copra_fl.models.adapted import AdaptedModel
from copra_fl.models.build import choose_device, open_model
from copra_fl.tasks import find_task


@dataclass(frozen=True)
class SavedModel:
    """A model opened from an adapter folder: `model(**processor(...))` returns logits.

    Attributes:
        model: the base with adapter and head.
        processor: makes contents the inputs of `model`: the tokenizer or image processor of the base, or the task's
            `opened_processor`.
        labels: the label of each logit, in order; empty for a task without labels.
    """

    model: AdaptedModel
    processor: Any
    labels: list[str]


def save(
    model: AdaptedModel, directory: Path, labels: list[str], data: DataConfig, residual: Adapter | None = None
) -> None:
    """Write `model` to `directory`: the adapter in PEFT's format, ``task.json``, and a trained head.

    `data` is the run's section. The head is in ``head.safetensors``. A core and a `residual` are folded into one plain
    adapter of a higher rank, so that PEFT alone can open it.
    """
    model.gates.open()
    adapter = model.read_adapter()
    if residual or any(part_of(name) == "R" for name in adapter):
        _save_folded(model, adapter, residual or {}, directory)
    else:
        model.peft.save_pretrained(str(directory))
    if model.head is not None:
        head = {name: tensor.detach().cpu() for name, tensor in model.head.state_dict().items()}
        save_file(head, directory / "head.safetensors")
    description = {
        "task": model.task.name,
        "labels": labels,
        "options": model.task.option_values(data),
        "pooling": model.pooling,
        "dtype": str(model.base.dtype).removeprefix("torch."),
        "attention": model.base.config._attn_implementation,
        "quantization": "4bit" if getattr(model.base, "is_loaded_in_4bit", False) else "none",
    }
    (directory / "task.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def _save_folded(model: AdaptedModel, adapter: Adapter, residual: Adapter, directory: Path) -> None:
    lora: Any = copy.copy(model.peft.peft_config["default"])
    folded = residuals.fold(adapter, residual, lora.lora_alpha / lora.r)
    lora.r = lora.lora_alpha = next(len(tensor) for name, tensor in folded.items() if part_of(name) == "A")
    lora.inference_mode = True
    lora.save_pretrained(str(directory))
    save_file(folded, directory / "adapter_model.safetensors", {"format": "pt"})


def load(directory: str | Path, device: str = "auto") -> SavedModel:
    """Open a model that `save` wrote, on the base that its adapter names; `device` is auto, cpu or cuda.

    Raises ConfigError for an unknown task, and for cuda without a CUDA device.
    """
    directory = Path(directory)
    description = json.loads((directory / "task.json").read_text(encoding="utf-8"))
    task = find_task(description["task"])
    base_name = LoraConfig.from_pretrained(str(directory)).base_model_name_or_path
    compute = description["dtype"], description["attention"], description.get("quantization", "none")
    base = open_model(base_name, *compute, task, choose_device(device))
    peft, head = PeftModel.from_pretrained(base, str(directory)), None
    if task.trains_head:
        weights = load_file(directory / "head.safetensors")
        head = nn.Linear(weights["weight"].shape[1], weights["weight"].shape[0])
        head.load_state_dict(weights)
    model = AdaptedModel(task, peft, head, description["pooling"], "layer", choose_device(device))
    processor = task.processor_class.from_pretrained(base_name)
    labels, options = description["labels"], description.get("options", {})
    return SavedModel(model, task.opened_processor(processor, labels, options), labels)
