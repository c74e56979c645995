"""Configuration: defaults, checks, TOML, recipes and methods."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from flwr.common.config import flatten_dict

from copra_fl.aggregation import RULES
from copra_fl.cli.config import all_keys
from copra_fl.config import KEYS, SECTIONS, Config, ConfigError, csv_line, csv_list, parse_override
from copra_fl.config.other_names import OTHER_NAMES
from copra_fl.simulation.recipes import (
    Recipe,
    built_in_methods,
    by_short_name,
    method_settings,
    refuse_idle,
    short_name,
)
from tests.support.defaults import APP_KEYS, PYPROJECT, with_defaults

ROOT = Path(__file__).parent.parent


def test_pyproject_holds_the_defaults() -> None:
    text = PYPROJECT.read_text(encoding="utf-8")
    assert with_defaults(text) == text, "renew them: python -m tests.support.defaults"
    flower = flatten_dict(tomllib.loads(text)["tool"]["flwr"]["app"]["config"])
    defaults = {key: flower[key] for key in flower.keys() - APP_KEYS.keys()}
    assert {key: (type(value), value) for key, value in defaults.items()} == {
        name: (type(key.default), key.default) for name, key in all_keys().items()
    }


def test_toml_round_trip() -> None:
    config = Config.from_flat(
        {
            "dataset": 'a "quoted" \\ path/ü.csv',
            "learning-rate": 1e-5,
            "rescale": True,
            "trimmed-mean.trim-fraction": 0.1,
            "norm-clipped.clip-norm": 2.0,
        }
    )
    assert Config.from_flat(tomllib.loads(config.to_toml())) == config


def test_a_rule_parameter_is_kept_replaced_and_compared() -> None:
    config = Config.from_flat({"trimmed-mean.trim-fraction": 0.1})
    assert config.to_flat()["trimmed-mean.trim-fraction"] == 0.1
    assert Config.from_flat({"trimmed-mean": {"trim-fraction": 0.1}}) == config, "a table in place of a dotted key"
    changed = config.changed(**{"trimmed-mean.trim-fraction": 0.3, "seed": 4})
    assert config.differences(changed) == ["seed: 0 -> 4", "trimmed-mean.trim-fraction: 0.1 -> 0.3"]
    assert Config().differences(config) == ["trimmed-mean.trim-fraction: not set -> 0.1"]
    assert len({config, changed, Config()}) == 3, "configurations are hashable"


@pytest.mark.parametrize(
    ("flat", "message"),
    [
        ({"learning-rat": 1.0}, "unknown configuration key 'learning-rat'. Did you mean 'learning-rate'"),
        ({"num_epochs": 3}, "unknown configuration key 'num_epochs'. Did you mean 'local-epochs'"),
        ({"alpha": 0}, "alpha = 0.0 must be more than 0"),
        ({"rank": 0}, "rank = 0 must be at least 1"),
        ({"rank": 8.0}, "rank = 8.0 must be a whole number"),
        ({"rank": True}, "rank = True must be a whole number"),
        ({"rescale": 1}, "rescale = 1 must be true or false"),
        ({"model": 3}, "model = 3 must be a string"),
        ({"client-ranks": 8}, 'client-ranks = 8 must be a string, in quotes: "8"'),
        ({"ramp": 1.5}, "ramp = 1.5 must be more than 0 and at most 1"),
        ({"learning-rate": float("inf")}, "learning-rate = inf"),
        ({"learning-rate": float("nan")}, "learning-rate = nan"),
        ({"dtype": "int8"}, "dtype = 'int8' must be one of auto, float32, bfloat16, float16"),
        ({"learning-rat": 1.0, "rescal": True}, "(?s)learning-rate.*rescale"),
        ({"methodss.copra.rank": 4}, "unknown configuration key 'methodss.copra.rank'"),
        ({"median.weights": [1, 2]}, r"median.weights = \[1, 2\] must be true, false, a number or a string"),
        ({"partitioner": "natural"}, "partitioner = 'natural' needs client-column"),
        ({"held-out-clients": 2}, "held-out-clients = 2 needs partitioner = 'natural'"),
        ({"dataset": ""}, "dataset = '' .* needs partitioner = 'own'"),
        ({"dataset": "a.csv,,b.csv"}, "has an empty name"),
        ({"labels": "a,b,a"}, "labels = 'a,b,a' must be at least two different labels"),
        ({"labels": "a"}, "labels = 'a' must be at least two different labels"),
        ({"p0": 0.9, "p1": 0.5}, "p0 = 0.9 must not exceed p1 = 0.5"),
        ({"over-sample": 0.2}, "over-sample = 0.2 .* set failures = 'tolerant'"),
        ({"num-clients": 4, "clients-per-round": 5}, "clients-per-round = 5 must not exceed num-clients = 4"),
        (
            {"num-clients": 8, "clients-per-round": 4, "min-replies": 6, "failures": "tolerant"},
            "min-replies = 6 must not exceed the number of clients in a round, which is 4",
        ),
        ({"num-clients": 8, "fraction-clients": 0.5, "min-replies": 5}, "min-replies = 5 .* in a round, which is 4"),
        ({"client-ranks": "8,x"}, "client-ranks = '8,x' must be a comma-separated list of whole numbers"),
        ({"client-ranks": "8,16"}, "client-ranks = '8,16': each must be at least 1 and at most rank = 8"),
        ({"client-ranks": "0"}, "client-ranks = '0': each must be at least 1"),
        ({"client-ranks": "8,4", "num-clients": 3}, "has 2 ranks for 3 clients; list one rank per client"),
        ({"client-depths": "2,4", "num-clients": 3}, "has 2 depths for 3 clients; .* set depth-assignment = 'drawn'"),
        ({"client-depths": "2,0"}, "client-depths = '2,0': each must be at least 1"),
        ({"client-depths": "2;4"}, "client-depths = '2;4' must be a comma-separated list of whole numbers"),
        ({"min-depth": 2}, "min-depth = 2 needs client-depths"),
        ({"min-depth": 4, "client-depths": "1,2"}, "min-depth = 4 leaves all clients out: the largest .* is 2"),
    ],
)
def test_wrong_values_are_named(flat: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Config.from_flat(flat)


def test_all_problems_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        Config.from_flat({"rank": 0, "alpha": -1.0, "nonsense": 1})
    assert len(str(caught.value).splitlines()) == 3


def test_ranks_that_are_drawn_need_not_be_one_per_client() -> None:
    config = Config.from_flat({"client-ranks": "8,4", "num-clients": 3, "rank-assignment": "drawn"})
    assert config.aggregation.rank_list == [8, 4]


def test_every_key_is_explained_and_its_default_is_allowed() -> None:
    """A meaning is a phrase of several words, starts in lower case or with a name, and names nothing from the code."""
    keys = all_keys()
    assert {key.owner for key in keys.values()} >= SECTIONS.keys()
    for key in keys.values():
        assert key.check(key.default) == key.default
        assert len(key.doc.split()) >= 2 or key.doc in ("device", "number of rounds"), key.name
        assert "_" not in key.doc and not key.doc.endswith("."), key.name
    assert len({key.doc for key in keys.values()}) == len(keys), "no two keys have the same meaning"


def test_overrides_of_the_command_line() -> None:
    assert parse_override("learning-rate=1e-3") == ("learning-rate", 0.001)
    assert parse_override("num-clients=4") == ("num-clients", 4)
    assert parse_override("rescale=true") == ("rescale", True)
    assert parse_override("model=/some/where=odd") == ("model", "/some/where=odd")
    assert parse_override('model="minilm"') == ("model", "minilm")
    assert parse_override("learning-rate=.005") == ("learning-rate", 0.005)
    assert parse_override("trimmed-mean.trim-fraction=1.e-1") == ("trimmed-mean.trim-fraction", 0.1)
    assert parse_override("rescale=True") == ("rescale", True)
    assert parse_override("client-ranks=8", KEYS) == ("client-ranks", "8")
    assert parse_override('labels="1,2"', KEYS) == ("labels", "1,2")
    assert parse_override("labels=true", KEYS) == ("labels", "true")
    assert parse_override("rank=8", KEYS) == ("rank", 8)
    with pytest.raises(ConfigError, match="must have the form KEY=VALUE"):
        parse_override("rank")


@pytest.mark.parametrize("names", [["a, b", 'said "c"', ""], [" a", "b\t"], ["a\nb", "c\r", "d\r\ne"], ["a"], []])
def test_names_survive_a_line_of_csv(names: list[str]) -> None:
    assert csv_list(csv_line(names)) == names


def test_a_recipe_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    """Editors of Windows write one."""
    (tmp_path / "r.toml").write_text("rank = 4\n", encoding="utf-8-sig")
    assert Recipe.read(str(tmp_path / "r.toml"), []).config().model.rank == 4


RECIPES = sorted((ROOT / "experiments").glob("*.toml"))
METHODS = sorted((ROOT / "experiments" / "methods").glob("*.toml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_valid_with_every_method(path: Path) -> None:
    recipe = Recipe.read(str(path), [])
    recipe.config()
    for method in METHODS:
        assert recipe.config(method.stem, seed=5).federation.seed == 5
    made = recipe.methods.keys() - {method.stem for method in METHODS}
    used = {
        part for grid in recipe.study.get("grids", {}).values() for name in grid["methods"] for part in name.split("+")
    }
    assert all("local-training" in recipe.methods[name] or name in used for name in made), (
        "a method that the recipe defines sets local-training or is in a grid of the study; else its name is misspelt"
    )


def test_precedence_of_recipe_method_and_override(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text('rank = 4\nbatch-size = 2\nlearning-rate = 0.1\nlocal-training = "head"\n'
                    "[methods.copra]\nbatch-size = 3\nlearning-rate = 0.2\n")  # fmt: skip
    config = Recipe.read(str(path), ["learning-rate=0.3"]).config("copra", seed=1)
    assert config.copra.local_training == "copra", "the method's file wins over the recipe"
    assert config.training.batch_size == 3, "the recipe's table for the method wins over the recipe"
    assert config.training.learning_rate == 0.3, "--set wins over all"
    assert config.model.rank == 4


@pytest.fixture
def tuned(tmp_path: Path) -> Recipe:
    """A recipe with a learning rate for each local training, and one for a rule."""
    path = tmp_path / "tuned.toml"
    path.write_text("[methods.lora]\nlearning-rate = 0.1\n[methods.copra]\nlearning-rate = 0.2\n"
                    "[methods.fed-sb]\nlearning-rate = 0.3\n")  # fmt: skip
    return Recipe.read(str(path), [])


@pytest.mark.parametrize(
    ("method", "rule", "training", "rate"),
    [
        ("lora", "fedavg", "lora", 0.1),
        ("copra", "fedavg", "copra", 0.2),
        ("flora", "flora", "lora", 0.1),
        ("flora+copra", "flora", "copra", 0.2),
        ("fed-sb", "fed-sb", "lora", 0.3),
        ("fed-sb+copra", "fed-sb", "copra", 0.3),
    ],
)
def test_methods_combine_a_rule_with_local_training(
    tuned: Recipe, method: str, rule: str, training: str, rate: float
) -> None:
    """The recipe's table of the local training comes first, the tables of the other names override it."""
    config = tuned.config(method)
    assert (config.aggregation.rule, config.copra.local_training) == (rule, training)
    assert config.training.learning_rate == rate


def test_a_user_file_overrides_the_table_of_its_local_training(tuned: Recipe, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("learning-rate = 0.5\nrank = 2\n")
    config = tuned.config(f"flora+{tmp_path / 'mine.toml'}")
    assert (config.aggregation.rule, config.training.learning_rate, config.model.rank) == ("flora", 0.5, 2)
    assert config.copra.local_training == "lora"
    assert short_name(f"flora+{tmp_path / 'mine.toml'}") == "flora+mine"


def test_two_methods_cannot_have_one_name() -> None:
    """Their runs would have the same folder. A dot is part of a name; only .toml is an extension."""
    assert by_short_name(["fedadam+rate-0.1", "fedadam+rate-0.3"]).keys() == {"fedadam+rate-0.1", "fedadam+rate-0.3"}
    with pytest.raises(ConfigError, match="'mine' is named twice; 'a/mine.toml' and 'b/mine.toml' have this name"):
        by_short_name(["a/mine.toml", "b/mine.toml"])


def test_a_method_without_effect_is_refused(tuned: Recipe) -> None:
    with pytest.raises(ConfigError, match="'copra[+]flora': 'copra' has no effect"):
        tuned.config("copra+flora")


def test_a_setting_that_counts_in_one_run_or_for_a_plugin_is_taken() -> None:
    recipe = Recipe.read("smoke", ["trimmed-mean.trim-fraction=0.2"])
    keys = [*recipe.overrides, "server-learning-rate", "rounds-per-layer", "full-rounds"]
    refuse_idle(keys, [recipe.config(method) for method in ("lora", "trimmed-mean", "fedadam", "fedpart")])
    refuse_idle(["dp-delta", "dp-budget"], [Config.from_flat({"dp-clip": 0.1})])
    refuse_idle(["client-column"], [Config.from_flat({"partitioner": "hospital.splits", "client-column": "site"})])


@pytest.mark.parametrize("method", built_in_methods())
def test_no_setting_of_a_built_in_method_is_without_effect(method: str) -> None:
    recipe = Recipe({})
    refuse_idle(method_settings(method), [recipe.config(method)])


@pytest.mark.parametrize("setting", ["off=global", "mask-scope=shared"])
def test_settings_of_layers_that_are_off_need_copra_or_some_layers(setting: str) -> None:
    for subset in (["layers-per-round=3"], ["client-depths=1,2", "depth-assignment=repeated"]):
        recipe = Recipe.read("base", [setting, *subset])
        refuse_idle(recipe.overrides, [recipe.config("lora")])
    recipe = Recipe.read("base", [setting])
    refuse_idle(recipe.overrides, [recipe.config("copra")])
    message = "has no effect with local-training = 'lora' and all layers on; .* layers-per-round or client-depths"
    with pytest.raises(ConfigError, match=message):
        refuse_idle(recipe.overrides, [recipe.config("lora")])


def test_every_rule_has_a_method_and_fedavg_is_lora() -> None:
    recipe = Recipe.read("base", [])
    assert {recipe.config(method.stem).aggregation.rule for method in METHODS} == {rule.name for rule in RULES}
    assert recipe.config("fedavg") == recipe.config("lora")
    assert recipe.config("fedavg+copra") == recipe.config("copra")


def test_unknown_recipe_and_method() -> None:
    with pytest.raises(ConfigError, match="no recipe file 'demoo'.*base, .*smoke"):
        Recipe.read("demoo", [])
    with pytest.raises(ConfigError, match="unknown method 'flor'. Did you mean 'flora'"):
        method_settings("flor")
    with pytest.raises(ConfigError, match=r"there is no method file 'nofile\.toml' in /"):
        method_settings("nofile.toml")


OTHERS = [(other, key) for key, others in OTHER_NAMES.items() for other in others]


def test_other_names_belong_to_one_key_and_are_none_themselves() -> None:
    others = [other for other, _ in OTHERS]
    assert len(set(others)) == len(others) and not KEYS.keys() & set(others) and OTHER_NAMES.keys() <= KEYS.keys()


@pytest.mark.parametrize(("other", "key"), OTHERS)
def test_other_names_hint_at_the_key(other: str, key: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown configuration key '{other}'. Did you mean '{key}'?"):
        Config.from_flat({other: 1})
