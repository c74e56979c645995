"""Recipes and methods: from ``--recipe``, ``--methods`` and ``--set`` to configurations.

A recipe is a TOML file of settings. A method is one name or several joined by ``+``: ``flora+copra`` is flora.toml
overlaid by copra.toml. A name is a built-in method (``experiments/methods/NAME.toml``), your own TOML file, or a method
that the recipe defines in a table ``[methods.NAME]``.

Settings, in order of precedence, lowest first:

    1  the defaults
    2  the recipe
    3  the recipe's table ``[methods.T]`` with T = local-training of the method (copra, lora, ...), so that ``flora``
       gets the recipe's learning rate for lora, and ``flora+copra`` its learning rate for copra
    4  the method's files, from left to right
    5  the recipe's tables ``[methods.NAME]`` for the method's other names, from left to right
    6  ``--set``
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from copra_fl.config import KEYS, Config, ConfigError, CopraConfig, Value, as_table, flatten, parse_override, read_toml
from copra_fl.simulation.superlink import app_directory
from copra_fl.wording import unknown_name

#: tables of a recipe that hold no settings of all methods
TABLES = ("methods", "study")
#: keys that only CopRA reads
SCHEDULE_KEYS = ("p0", "p1", "ramp", "min-active", "schedule-progress", "rescale")
#: keys that only CopRA and the training of some layers read
LAYER_KEYS = ("off", "mask-scope")
#: keys that only a server optimizer reads
SERVER_KEYS = ("server-learning-rate", "server-momentum", "server-beta2", "server-tau")
#: keys of the local training that the script of engine = "trainer" decides in its own way
TRAINER_KEYS = (
    "optimizer", "learning-rate", "head-learning-rate", "lr-schedule", "weight-decay", "momentum", "batch-size",
    "gradient-accumulation", "max-grad-norm", "bucket-batches", "step-tokens", "lora-dropout", "gradient-checkpointing",
)  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """Settings of one or several runs.

    Attributes:
        settings: settings for all methods.
        methods: method -> settings for this method alone.
        overrides: settings that override all others.
        study: the recipe's table ``[study]``, for simulation/study.py.
    """

    settings: dict[str, Any]
    methods: dict[str, dict[str, Any]] = field(default_factory=dict)
    overrides: dict[str, Value] = field(default_factory=dict)
    study: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, name: str, overrides: Iterable[str]) -> Recipe:
        """Read the recipe file `name`, or the built-in recipe of that name; `overrides` are ``key=value`` texts.

        Raises ConfigError for an unknown name, a file that is not TOML, and an override without ``=``.
        """
        path, built_in = Path(name), built_in_recipes()
        if not path.is_file():
            if name not in built_in:
                raise ConfigError(f"no recipe file {name!r}; {unknown_name('recipe', name, built_in)}")
            path = built_in[name]
        return cls.of(read_toml(path), dict(parse_override(text, KEYS) for text in overrides))

    def refuse_override(self, key: str, remedy: str) -> None:
        """Raise ConfigError if ``--set`` sets `key`, which the command chooses for each run; `remedy` says how."""
        if key in self.overrides:
            raise ConfigError(f"--set {key}={self.overrides[key]} has no effect here: {remedy}")

    @classmethod
    def of(cls, table: Mapping[str, Any], overrides: Mapping[str, Value]) -> Recipe:
        """Return the recipe with the content of a recipe file. Raises ConfigError for a value in place of a table."""
        settings = {key: value for key, value in table.items() if key not in TABLES}
        tables = as_table("methods", table.get("methods", {}))
        methods = {method: flatten(as_table(f"methods.{method}", own)) for method, own in tables.items()}
        study = as_table("study", table.get("study", {}))
        return cls(flatten(settings), methods, dict(overrides), dict(study))

    def knows(self, method: str) -> bool:
        """Return whether `method` names methods that are built in, defined by this recipe, or files."""
        known = built_in_methods().keys() | self.methods.keys()
        return all(name in known or Path(name).is_file() for name in method.split("+"))

    def config(
        self, method: str | None = None, seed: int | None = None, settings: Mapping[str, Any] | None = None
    ) -> Config:
        """Return the configuration of one run; `settings` override those of the method.

        Raises ConfigError that lists everything wrong with it.
        """
        flat = (self.settings if method is None else self._with_method(method)) | dict(settings or {}) | self.overrides
        return Config.from_flat(flat if seed is None else flat | {"seed": seed})

    def _with_method(self, method: str) -> dict[str, Any]:
        names = method.split("+")
        files = {name: self._method_settings(name) for name in names}
        overlaid = {key: value for settings in files.values() for key, value in settings.items()}
        for name, settings in files.items():
            if not any(overlaid[key] == value for key, value in settings.items()):
                raise ConfigError(
                    f"method {method!r}: {name!r} has no effect, because later names override all of its settings; "
                    "remove it or change the order"
                )
        training = (self.settings | overlaid | self.overrides).get("local-training", CopraConfig.local_training)
        flat = self.settings | self.methods.get(training, {}) | overlaid
        for name in names:
            if short_name(name) != training:
                flat |= self.methods.get(short_name(name), {})
        return flat

    def _method_settings(self, name: str) -> dict[str, Any]:
        return self.methods[name] if name in self.methods.keys() - built_in_methods() else method_settings(name)


def refuse_idle(keys: Iterable[str], configs: Iterable[Config]) -> None:
    """Raise ConfigError for the first of `keys`, those that the user sets, that has no effect in any of `configs`."""
    reasons_by_run = [_idle_reasons(config) for config in configs]
    for key in keys:
        reasons = [reasons.get(key, "") for reasons in reasons_by_run]
        if reasons and all(reasons):
            raise ConfigError(reasons[0])


def _idle_reasons(config: Config) -> dict[str, str]:
    """Return, by key, why a setting has no effect in a run of `config`."""
    flat, copra, rule = config.to_flat(), config.copra, config.aggregation.rule
    of_other_rules = _idle_parameters(config)
    without_groups = set(KEYS["partitioner"].choices) - {"natural"}  # a plugin may need client-column
    rows: list[tuple[bool, Sequence[str], str]] = [
        (
            copra.local_training != "copra",
            SCHEDULE_KEYS,
            f"local-training = {copra.local_training!r}; set local-training = 'copra', or leave it out",
        ),
        (
            copra.local_training != "copra" and not copra.trains_subset,
            LAYER_KEYS,
            f"local-training = {copra.local_training!r} and all layers on; set local-training = 'copra', "
            "layers-per-round or client-depths, or leave it out",
        ),
        (
            config.training.engine == "trainer",
            TRAINER_KEYS,
            "engine = 'trainer', where the script decides; set it in the script, and leave it out here",
        ),
        (
            config.data.partitioner in without_groups,
            ["client-column"],
            f"partitioner = {config.data.partitioner!r}; set partitioner = 'natural', or leave it out",
        ),
        (
            config.data.partitioner in {*KEYS["partitioner"].choices} - {"dirichlet"},
            ["alpha"],
            f"partitioner = {config.data.partitioner!r}; set partitioner = 'dirichlet', or leave it out (LoRA's "
            "alpha is lora-alpha)",
        ),
        (
            config.aggregation.server_optimizer == "none",
            SERVER_KEYS,
            "server-optimizer = 'none'; set server-optimizer, or leave it out",
        ),
        (
            config.privacy.dp_clip == 0,
            ["dp-noise-multiplier", "dp-delta", "dp-budget"],
            "dp-clip = 0, where a run is not private; set dp-clip, or leave it out",
        ),
        (
            copra.layers_per_round == 0 or copra.layer_selection != "cycle",
            ["rounds-per-layer", "full-rounds"],
            f"layers-per-round = {copra.layers_per_round} and layer-selection = {copra.layer_selection!r}; set "
            "layers-per-round and layer-selection = 'cycle', or leave it out",
        ),
        (
            bool(of_other_rules),
            of_other_rules,
            f"rule = {rule!r}; choose the rule with this parameter, or leave it out",
        ),
    ]
    reasons = {key: reason for applies, keys, reason in rows if applies for key in keys}
    return {key: f"{key} = {flat[key]!r} has no effect with {reason}" for key, reason in reasons.items()}


def _idle_parameters(config: Config) -> list[str]:
    """Return the parameters of built-in rules in `config` that its own rule does not have."""
    if not config.rule_parameters:
        return []
    from copra_fl.aggregation.compatibility import parameter_keys  # slow to import

    others = {name for name, key in parameter_keys().items() if key.owner != config.aggregation.rule}
    return [name for name, _ in config.rule_parameters if name in others]


def short_name(method: str) -> str:
    """Return a method's name in tables and folders: ``flora+mine`` for ``flora+path/to/mine.toml``."""
    return "+".join(Path(name).name.removesuffix(".toml") for name in method.split("+"))


def by_short_name(methods: Iterable[str]) -> dict[str, str]:
    """Return short name -> name or file of each method. Raises ConfigError for two methods of one short name."""
    sources: dict[str, str] = {}
    for source in methods:
        name = short_name(source)
        if name in sources:
            others = f"{sources[name]!r} and {source!r}"
            remedy = "name it once" if source == sources[name] else f"{others} have this name: rename a file"
            raise ConfigError(f"method {name!r} is named twice; {remedy}")
        sources[name] = source
    return sources


def built_in_recipes() -> dict[str, Path]:
    """Return the recipes of copra-fl, by name."""
    return {path.stem: path for path in sorted((app_directory() / "experiments").glob("*.toml"))}


def built_in_methods() -> dict[str, Path]:
    """Return the methods of copra-fl, by name."""
    return {path.stem: path for path in sorted((app_directory() / "experiments" / "methods").glob("*.toml"))}


def method_settings(method: str) -> dict[str, Any]:
    """Return the settings of a built-in method or of your own TOML file. Raises ConfigError for an unknown name."""
    built_in = built_in_methods()
    path = built_in.get(method, Path(method))
    if not path.is_file():
        if path.suffix or len(path.parts) > 1:
            raise ConfigError(f"there is no method file {method!r} in {Path.cwd()}")
        raise ConfigError(unknown_name("method", method, built_in))
    return flatten(read_toml(path))


def summary_line(path: Path) -> str:
    """Return the first comment line of a recipe or method file: its description in one line."""
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip()
