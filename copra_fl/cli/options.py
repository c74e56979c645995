"""Options that several commands share."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from copra_fl import trackers
from copra_fl.config import KEYS
from copra_fl.simulation import ray_cluster
from copra_fl.simulation.recipes import built_in_methods, built_in_recipes
from copra_fl.simulation.run_folder import check_writable

RECIPE_HELP = f"Recipe: a TOML file, or the name of a built-in recipe ({', '.join(built_in_recipes())})."


def complete_recipe(incomplete: str) -> list[str]:
    """Return the built-in recipes for shell completion."""
    return [name for name in built_in_recipes() if name.startswith(incomplete)]


def complete_setting(incomplete: str) -> list[str]:
    """Return the configuration keys, or the allowed values of a key, for shell completion."""
    name, equals, value = incomplete.partition("=")
    if equals and name in KEYS:
        return [f"{name}={choice}" for choice in KEYS[name].choices if choice.startswith(value)]
    return [f"{key}=" for key in KEYS if key.startswith(incomplete)]


def complete_method(incomplete: str) -> list[str]:
    """Return the built-in methods for shell completion, also of the last name in a list like ``lora,flora+co``."""
    cut = max(incomplete.rfind(","), incomplete.rfind("+")) + 1
    return [incomplete[:cut] + name for name in built_in_methods() if name.startswith(incomplete[cut:])]


def writable_folder(parameter: typer.CallbackParam, folder: Path | None) -> Path | None:
    """Return `folder`, the value of an option, before any work starts. Raises ConfigError as `check_writable` does."""
    if folder is not None:
        check_writable(parameter.opts[0], folder)
    return folder


def set_option(help_text: str) -> Any:
    """Return the option ``--set`` with its help."""
    return typer.Option("--set", metavar="KEY=VALUE", autocompletion=complete_setting, help=help_text)


RecipeOption = Annotated[
    str | None,
    typer.Option("--recipe", help=f"{RECIPE_HELP} Default: base.", autocompletion=complete_recipe, metavar="FILE"),
]
SetOption = Annotated[
    list[str] | None, set_option("Set a configuration key; overrides recipe and method. May be repeated.")
]
DataSettingsOption = Annotated[
    list[str] | None, set_option("Set a key of the data: text-column, separator, max-length. May be repeated.")
]
MethodsOption = Annotated[
    str | None,
    typer.Option(
        "--methods",
        autocompletion=complete_method,
        help="Methods, separated by commas: built-in names or TOML files. flora+copra combines two methods, the later "
        "one wins; all means every built-in method that fits the recipe, those with a rule also with copra. Default: "
        "those of the comparison that --resume continues, else lora,copra.",
    ),
]
SeedsOption = Annotated[
    str | None,
    typer.Option(
        "--seeds",
        help="Random seeds, separated by commas; every method runs with every seed. Default: those of the comparison "
        "that --resume continues, else 0,1,2.",
    ),
]
OutputOption = Annotated[
    Path | None, typer.Option("--output", help="Folder for the results. Default: a new folder in runs/.")
]
WorkersOption = Annotated[
    int | None, typer.Option("--workers", min=1, help="Number of Ray workers. Default: one per core, at most 4.")
]
GpusOption = Annotated[
    float | None,
    typer.Option(
        "--gpus-per-worker", min=0, help="GPUs per worker, for example 0.5. Default: all GPUs, shared evenly."
    ),
]
RayAddressOption = Annotated[
    str | None,
    typer.Option(
        "--ray-address",
        metavar="HOST:PORT",
        help="Run on the Ray cluster at this address, which this machine must belong to. Default: start Ray on this "
        "machine.",
        callback=ray_cluster.check_address,
    ),
]
ResumeOption = Annotated[
    bool, typer.Option("--resume", help="Continue the run in --output after its last finished round.")
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Delete an existing run in --output.")]
TrackOption = Annotated[
    list[str] | None,
    typer.Option(
        "--track",
        metavar="TRACKER",
        help="Send metrics to tensorboard, mlflow, wandb or a plugin during the run. May be repeated.",
        callback=trackers.checked,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the results as JSON on standard output.")]
ModelArgument = Annotated[
    Path, typer.Argument(metavar="RUN", help="Folder of a finished run, or of an adapter.", show_default=False)
]
MergeOption = Annotated[
    bool, typer.Option("--merge", help="Write a Transformers model with merged weights. Default: an adapter for PEFT.")
]


class DtypeName(StrEnum):
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class DeviceName(StrEnum):
    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


DtypeOption = Annotated[DtypeName, typer.Option("--dtype", help="Dtype of merged weights.")]
DeviceOption = Annotated[DeviceName, typer.Option("--device", help="Device; auto: CUDA if available, else the CPU.")]
DatasetOption = Annotated[
    str,
    typer.Option(
        "--dataset",
        metavar="NAME",
        help="Data set whose labels the model gives, if the run has several.",
        show_default=False,
    ),
]
BaseOption = Annotated[
    str,
    typer.Option(
        "--base",
        metavar="MODEL",
        help="Base model, if it is not where the adapter says: an asset, a folder, or a name on the hub.",
        show_default=False,
    ),
]
