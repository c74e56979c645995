"""`copra-fl config` and `copra-fl recipes`: complete, readable, and the same for machines."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from copra_fl.cli import app, main
from copra_fl.cli.config import all_keys
from copra_fl.simulation.recipes import Recipe, built_in_methods, built_in_recipes


def output_of(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments, catch_exceptions=False, env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return result.stdout


def test_config_lists_every_key_below_its_section_or_rule() -> None:
    text = output_of("config")
    lines = [line.strip(" │\n") for line in text.splitlines()]
    for title, key, meaning in (
        ("section data", "num-clients = 0", "number of clients"),
        ("section aggregation", 'rule = "fedavg"', "aggregation rule"),
        ("rule trimmed-mean", "trimmed-mean.trim-fraction = 0.2", "share beta of the clients' values"),
    ):
        titles = [line for line in lines[: next(i for i, line in enumerate(lines) if line.startswith(key))]
                  if line.startswith(("section ", "rule ")) and "=" not in line]  # fmt: skip
        assert titles[-1] == title
        assert any(line.startswith(key) and meaning in line for line in lines)
    assert all(f" {name} = " in text for name in all_keys())


def test_config_shows_one_key_in_full() -> None:
    assert output_of("config", "lora-fair.regularization").splitlines() == [
        "lora-fair.regularization",
        "  meaning     weight lambda of the correction's squared norm",
        "  default     0.01",
        "  allowed     a number, more than 0",
        "  belongs to  rule lora-fair",
    ]
    assert "  allowed     lora | copra | line | head" in output_of("config", "local-training")
    assert "  allowed     a number, at least 0 and at most 0.99" in output_of("config", "lora-dropout")


def test_config_for_machines_has_the_same_keys() -> None:
    records = json.loads(output_of("config", "--json"))
    assert [record["key"] for record in records] == list(all_keys())
    assert json.loads(output_of("config", "trimmed-mean.trim-fraction", "--json")) == {
        "key": "trimmed-mean.trim-fraction",
        "belongs_to": "rule trimmed-mean",
        "type": "float",
        "default": 0.2,
        "choices": [],
        "minimum": 0,
        "maximum": 0.49,
        "exclusive_minimum": None,
        "meaning": "share beta of the clients' values to drop at each end",
    }


def test_config_names_the_closest_key(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["copra-fl", "config", "learning-rat"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    assert capsys.readouterr().err == (
        "copra-fl: unknown configuration key 'learning-rat'. Did you mean 'learning-rate'? `copra-fl config` lists all "
        "keys\n"
    )


def test_recipes_lists_every_recipe_and_method_with_one_line() -> None:
    listing = json.loads(output_of("recipes", "--json"))
    assert listing["recipes"].keys() == built_in_recipes().keys()
    assert listing["methods"].keys() == built_in_methods().keys()
    table = " ".join(output_of("recipes").split())
    for entries in listing.values():
        for name, entry in entries.items():
            assert f"{name} │ {entry['summary']}" in table
            assert 20 < len(entry["summary"]) < 120 and entry["summary"][-1] in ".?", f"{name}: not one whole sentence"


def test_every_listed_name_can_be_used() -> None:
    listing = json.loads(output_of("recipes", "--json"))
    for recipe in listing["recipes"]:
        for method in listing["methods"]:
            Recipe.read(recipe, []).config(method)
