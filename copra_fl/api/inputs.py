"""Objects in memory as settings: tables and models become files in the cache, named by their content.

The processes of a run read these files. `copra-fl clean` removes those that were not used for a while.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from copra_fl.config import ConfigError, csv_line, flatten, kebab
from copra_fl.files import atomic_write, build_once, cache_dir, sha256
from copra_fl.wording import join_words

if TYPE_CHECKING:  # slow to import
    import datasets
    import pandas as pd
    from peft import LoraConfig

#: folders of the cache with tables and models from memory
TABLES, MODELS = "tables", "models"
#: attributes of a LoraConfig that say nothing of the adapters in a federation
DESCRIPTIVE = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision", "task_type",
}  # fmt: skip


def as_settings(keywords: Mapping[str, object]) -> dict[str, Any]:
    """Return settings from keyword arguments: ``learning_rate`` is ``learning-rate``, a list is a line of CSV.

    A table holds the parameters of a rule: ``trimmed_mean={"trim_fraction": 0.1}``.
    """
    return {kebab(name): _plain(value) for name, value in flatten(keywords).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return csv_line(map(str, value))
    if isinstance(value, Path):
        return str(value)
    is_scalar = type(value).__module__ == "numpy" and getattr(value, "ndim", 1) == 0
    return value.item() if is_scalar else value


def store_table(name: str, table: pd.DataFrame | datasets.Dataset) -> str:
    """Return the path of a Parquet file with the rows of `table`, the argument `name`.

    Class labels of a Dataset become their names. Raises ConfigError for an object of another type, an empty table, and
    columns that Parquet cannot store.
    """
    import datasets
    import pandas as pd

    from copra_fl.sources.tables import parquet_bytes, read_split

    if isinstance(table, datasets.DatasetDict):
        splits = ", ".join(map(str, table))
        raise ConfigError(f"{name} is a DatasetDict with the splits {splits}; pass one split, as in {name}=d['train']")
    if not isinstance(table, pd.DataFrame | datasets.Dataset):
        raise ConfigError(
            f"{name} is of type {type(table).__name__}; it must be a pandas DataFrame or a datasets.Dataset. The path "
            "or name of a data set is the setting dataset"
        )
    if not len(table):
        raise ConfigError(f"{name} has no rows")
    frame = read_split(table) if isinstance(table, datasets.Dataset) else table.rename(columns=str)
    content = parquet_bytes(name, frame)
    digest = hashlib.sha256(content).hexdigest()
    path = cache_dir() / TABLES / f"table-{digest[:16]}.parquet"
    if path.exists() and sha256(path) == digest:
        path.touch()
    else:
        path.parent.mkdir(exist_ok=True)
        atomic_write(path, content, mode=0o600)
    return str(path)


def store_model(model: Any, processor: Any = None) -> str:
    """Return the path of a folder with `model` and its tokenizer or image processor, as Transformers saves them.

    Without a `processor`, it is loaded from where the model was loaded from. Raises ConfigError for a model that
    Transformers cannot open from a folder.
    """
    from peft import PeftModel
    from transformers import AutoProcessor, PreTrainedModel

    if isinstance(model, PeftModel):
        raise ConfigError(
            "model is a PeftModel; pass the model below it, as in model.get_base_model(), and its LoraConfig as lora="
        )
    kind = type(model)
    if not isinstance(model, PreTrainedModel):
        raise ConfigError(
            f"model is of type {kind.__name__}; it must be a Transformers model, or the name or path of one"
        )
    if kind.__module__.partition(".")[0] != "transformers":
        raise ConfigError(
            f"model is of the class {kind.__module__}.{kind.__name__}; other processes can open only Transformers' own "
            "classes from a folder"
        )
    if getattr(model, "is_quantized", False):
        raise ConfigError("model is quantized; pass it unquantized, with quantization='4bit' as a setting")
    if processor is None:
        if not model.name_or_path:
            raise ConfigError("model was not loaded from a name or path; pass its tokenizer as processor=")
        try:
            processor = AutoProcessor.from_pretrained(model.name_or_path)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"model: its tokenizer or image processor cannot be loaded from {model.name_or_path!r}; pass it as "
                "processor="
            ) from error

    def build(scratch: Path) -> Path:
        model.save_pretrained(scratch / "model")
        processor.save_pretrained(scratch / "model")
        return scratch / "model"

    place = cache_dir() / MODELS / _model_digest(model, processor)
    build_once(place, build)
    place.touch()
    return str(place)


def _model_digest(model: Any, processor: Any) -> str:
    """Return the first half of a SHA-256 over configuration, weights and processor."""
    import torch

    digest = hashlib.sha256(f"{type(model).__name__}\n{model.config.to_json_string()}".encode())
    for name, tensor in sorted(model.state_dict().items()):
        values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(values.numpy())
    with tempfile.TemporaryDirectory() as folder:
        processor.save_pretrained(folder)
        for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
            digest.update(f"{path.relative_to(folder)} {sha256(path)}\n".encode())
    return digest.hexdigest()[:32]


def lora_settings(lora: LoraConfig) -> dict[str, Any]:
    """Return the settings of a LoraConfig: rank, alpha, dropout, scaling, DoRA, and target modules if it has any.

    Raises ConfigError that names every other option that is set.
    """
    from peft import LoraConfig

    if not isinstance(lora, LoraConfig):
        raise ConfigError(f"lora is of type {type(lora).__name__}; it must be a peft.LoraConfig")
    taken = {"r", "lora_alpha", "lora_dropout", "target_modules", "use_dora", "use_rslora"}
    defaults = LoraConfig()
    others = [
        field.name
        for field in fields(lora)
        if field.name not in taken | DESCRIPTIVE and getattr(lora, field.name) != getattr(defaults, field.name)
    ]
    if others:
        raise ConfigError(
            f"lora sets {join_words(others)}, which no setting of a federation stands for; set only "
            f"{join_words(sorted(taken))}"
        )
    settings: dict[str, Any] = {
        "rank": lora.r,
        "lora-alpha": float(lora.lora_alpha),
        "lora-dropout": float(lora.lora_dropout),
        "dora": lora.use_dora,
        "lora-scaling": "rslora" if lora.use_rslora else "standard",
    }
    targets = lora.target_modules
    if isinstance(targets, str) and targets != "all-linear" and not targets.replace("_", "").isalnum():
        raise ConfigError(f"lora: target_modules = {targets!r} is a regular expression; list the names of the modules")
    if targets:
        settings["target-modules"] = targets if isinstance(targets, str) else ",".join(sorted(targets))
    return settings
