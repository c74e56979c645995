"""Plugins: those of docs/how-to/plugins.md in a federation, their digests in the handshake, and wrong ones."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from rich.console import Console
from torch.nn import functional as F

from clients.policy import Policy, PolicyViolation
from copra_fl import plugins
from copra_fl.aggregation import find_rule
from copra_fl.aggregation.compatibility import parameter_keys, parameters_of, with_explicit_parameters
from copra_fl.config import Config, ConfigError
from copra_fl.data.federated import load_data
from copra_fl.models.build import load_processor
from copra_fl.reporting.results import load_run
from copra_fl.sources import assets
from copra_fl.tasks import find_task
from copra_fl.trackers import checked
from copra_fl.trackers.feed import Tracking
from server.errors import FederationError
from server.handshake import check_code, query, read
from tests.support.compatibility import check
from tests.support.documents import ROOT
from tests.support.federations import finished_run, journal
from tests.support.local_grid import LocalGrid
from tests.support.real_runs import RealRun, settings
from tests.support.rounds import random_round
from tests.support.tiny import Settings

PAGE = (ROOT / "docs" / "how-to" / "plugins.md").read_text(encoding="utf-8")
MODULES = dict(re.findall(r"^`hospital/(\w+).py`.*?```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL))
#: a rule, a task and a partitioner of the page
PLUGINS = {
    "rule": "hospital.rules",
    "by-loss.sharpness": 3.0,
    "task": "hospital.focal",
    "partitioner": "hospital.splits:PARTITIONER",
    "client-column": "owner",
    "num-clients": 4,
}


@pytest.fixture
def hospital(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the package ``hospital``, which has the modules of the page and can be imported."""
    folder = tmp_path / "site" / "hospital"
    folder.mkdir(parents=True)
    for name, source in MODULES.items():
        (folder / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(folder.parent)
    return folder


def test_each_example_of_the_page_has_less_than_30_lines() -> None:
    assert MODULES.keys() == {"rules", "focal", "splits", "sheet", "assets"}
    assert max(len(list(filter(None, source.splitlines()))) for source in MODULES.values()) < 30
    code = [line for line in MODULES["rules"].splitlines() if line]
    assert len(code) <= 20


def test_a_federation_of_plugins_trains_and_names_their_digests(tiny: Settings, hospital: Path, tmp_path: Path) -> None:
    run = finished_run(tiny | PLUGINS, tmp_path / "run")
    digests = json.loads((run / "provenance.json").read_text())["start"]["plugins"]
    assert digests.keys() == {"hospital.rules", "hospital.focal", "hospital.splits:PARTITIONER"}
    assert len(set(digests.values())) == 1, "they are one package"
    assert [len(record["clients"]) for record in journal(run)] == [4, 4]

    with closing(Tracking(["hospital.sheet"], [run], Console())) as tracking:
        tracking.update()
    accuracies = pd.read_csv(run.with_suffix(".csv"))["accuracy"].tolist()
    assert accuracies == [record.validation.accuracy for record in load_run(run).journal if record.validation]


def test_the_digest_is_that_of_the_files_where_sys_path_has_their_folder_twice(
    hospital: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in the server app (`server/app.py`). Without ``__init__.py``, a package's path follows sys.path."""
    once = plugins.digest("rule", "hospital.rules")
    monkeypatch.setattr(sys, "path", [*sys.path, *sys.path])
    assert len(importlib.import_module("hospital").__path__) == 2
    assert plugins.digest("rule", "hospital.rules") == once


def test_the_rule_of_the_page_is_the_mean_by_loss(hospital: Path) -> None:
    """Oracle: exp(-s loss) in numpy, on a round whose clients have different losses."""
    rule, round_ = find_rule("hospital.rules"), random_round()
    for client, update in enumerate(round_.updates):
        update.metrics["loss"] = 0.5 * client
    object.__setattr__(round_, "parameters", rule.parameters(sharpness=2.0))
    expected = np.exp(-np.arange(3.0)) / np.exp(-np.arange(3.0)).sum()
    for name, tensor in rule.aggregate(round_).adapter.items():
        stacked = np.stack([adapter[name].double().numpy() for adapter in round_.adapters])
        assert np.allclose(tensor.numpy(), np.tensordot(expected, stacked, axes=1), atol=1e-6), name


def test_parameters_of_a_plugin_are_checked_and_travel_through_flower(hospital: Path) -> None:
    config = with_explicit_parameters(Config.from_flat({"rule": "hospital.rules", "by-loss.sharpness": 2.5}))
    assert parameters_of(config).sharpness == 2.5 and "by-loss.sharpness" not in parameter_keys()
    run_config = config.to_run_config()
    assert run_config["rule-parameters"] == "by-loss.sharpness = 2.5"
    assert Config.from_run_config(run_config) == config
    with pytest.raises(ConfigError, match="by-loss.sharpness = -1.0 must be at least 0"):
        check(config.changed(**{"by-loss.sharpness": -1.0}))
    with pytest.raises(ConfigError, match="unknown rule parameter 'by-loss.sharp'. Did you mean 'by-loss.sharpness'"):
        check(Config.from_flat({"rule": "hospital.rules", "by-loss.sharp": 1.0}))


def test_the_requirements_of_a_plugin_are_checked_as_those_of_a_built_in_rule(hospital: Path) -> None:
    with pytest.raises(ConfigError, match="rule = 'by-loss' does not combine with client-ranks = '8,4'"):
        check(Config.from_flat({"rule": "hospital.rules", "client-ranks": "8,4", "num-clients": 2}))


def test_the_task_of_the_page_has_the_focal_loss(hospital: Path) -> None:
    task, logits = find_task("hospital.focal:TASK"), torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 2, 1, 1, 0])
    right = F.softmax(logits.double(), 1)[torch.arange(5), labels]
    assert torch.allclose(task.losses(logits, {"labels": labels}).double(), (1 - right) ** 2 * -right.log())
    assert task.name == "hospital.focal" and find_task(task.name) is task


def test_a_task_under_another_name_is_found_by_the_name_that_adapter_folders_keep(hospital: Path) -> None:
    (hospital / "tasks.py").write_text(MODULES["focal"].replace("TASK =", "FOCAL ="))
    task = find_task("hospital.tasks:FOCAL")
    assert task.name == "hospital.tasks:FOCAL" and find_task(task.name) is task


def split(tiny: Settings, **changes: object) -> list[np.ndarray]:
    config = Config.from_flat(tiny | PLUGINS | {"task": "text-classification"} | changes)
    return load_data(config, load_processor(config.model)).train


def test_the_partitioner_of_the_page_deals_out_groups(tiny: Settings, hospital: Path) -> None:
    """Six owners in turn to four clients: the first two clients have two owners each."""
    sizes = [len(indices) for indices in split(tiny)]
    assert sizes[0] == pytest.approx(2 * sizes[2], rel=0.3) and sizes[1] == pytest.approx(2 * sizes[3], rel=0.3)


def test_a_changed_partitioner_splits_anew(tiny: Settings, hospital: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cached split is that of its source; `rng` gives the same numbers in each process."""
    at_random = MODULES["splits"].replace("pool.groups % pool", "pool.rng.permutation(pool.size) % pool")
    (hospital / "draws.py").write_text(at_random)
    before, again = (split(tiny, partitioner="hospital.draws") for _ in range(2))
    assert all(map(np.array_equal, before, again))
    (hospital / "draws.py").write_text(at_random + "# another version\n")
    drawn: list[object] = []
    module = __import__("hospital.draws").draws
    partitioner = module.Partitioner(lambda pool: drawn.append(pool) or module.in_turn(pool), needs_groups=True)
    monkeypatch.setattr(module, "PARTITIONER", partitioner)
    assert all(map(np.array_equal, before, split(tiny, partitioner="hospital.draws"))) and len(drawn) == 1


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("return pool.groups + 0.5", "returned float64 of shape"),
        ("return pool.groups[1:]", "returned int64 of shape"),
        ("return pool.groups", "returned values from 0 to 5; it must return .* the client, 0 to 3, or -1"),
    ],
)
def test_a_wrong_split_is_named(tiny: Settings, hospital: Path, source: str, message: str) -> None:
    name = f"wrong{len(source)}"
    (hospital / f"{name}.py").write_text(re.sub(r"return .*", source, MODULES["splits"]))
    with pytest.raises(ConfigError, match=message):
        split(tiny, partitioner=f"hospital.{name}")


def test_a_partitioner_without_its_column_is_rejected(tiny: Settings, hospital: Path) -> None:
    with pytest.raises(ConfigError, match="partitioner = 'hospital.splits' needs client-column"):
        split(tiny, **{"partitioner": "hospital.splits", "client-column": ""})


def test_the_asset_of_the_page_is_fetched_and_verified(
    hospital: Path, empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    share = tmp_path / "share"
    share.mkdir()
    monkeypatch.setenv("WARD_SHARE", str(share))
    shutil.copy(ROOT / "docs" / "tutorials" / "notes.csv", share)
    folder = assets.fetch("hospital.assets:NOTES")
    assert folder == assets.asset_path("hospital.assets:NOTES") and folder.name.startswith("ward-notes-")
    notes = pd.read_csv(ROOT / "docs" / "tutorials" / "notes.csv", dtype=str)
    assert pd.read_parquet(folder / "train.parquet").equals(notes)
    shutil.rmtree(folder)
    (share / "notes.csv").write_text("changed")
    with pytest.raises(assets.AssetError, match="asset 'ward-notes': the file notes.csv has sha256"):
        assets.fetch("hospital.assets:NOTES")


WRONG = [
    ({"rule": "fedavgg"}, "unknown rule 'fedavgg'. Did you mean 'fedavg'.* A rule of your own is named by its place"),
    ({"rule": "hospital.nowhere"}, "no module hospital.nowhere that can be imported and has RULE, a Rule. Install it"),
    ({"rule": "hospital.focal:TASK"}, "hospital.focal that can be imported and has TASK, a Rule"),
    ({"rule": "hospital.broken"}, "rule 'hospital.broken': its module hospital.broken cannot be imported: No module"),
    ({"rule": "hospital.names:AVERAGE"}, "its name 'fedavg' is that of a built-in rule"),
    ({"rule": "hospital.names:LOUD"}, "its name 'By Loss' is not of lower-case letters, digits and -"),
    ({"partitioner": "dirichlett"}, "partitioner = 'dirichlett' must be one of iid, .*, or the name of a plugin"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[next(iter(changes.values())) for changes, _ in WRONG])
def test_a_wrong_plugin_is_named(hospital: Path, changes: Settings, message: str) -> None:
    (hospital / "broken.py").write_text("import a_package_that_is_not_installed\n")
    names = 'AVERAGE = replace(RULE, name="fedavg")\nLOUD = replace(RULE, name="By Loss")\n'
    (hospital / "names.py").write_text(f"from dataclasses import replace\nfrom hospital.rules import RULE\n{names}")
    with pytest.raises(ConfigError, match=message):
        check(Config.from_flat(changes))


def test_wrong_trackers_and_assets_are_named(hospital: Path) -> None:
    with pytest.raises(ConfigError, match="unknown tracker 'tensorbord'. Did you mean 'tensorboard'"):
        checked(["tensorbord"])
    with pytest.raises(ConfigError, match="has Nothing, a function of a run"):
        checked(["hospital.sheet:Nothing"])
    with pytest.raises(ConfigError, match="that can be imported and has NONE, an Asset"):
        assets.find_asset("hospital.assets:NONE")


def test_an_entry_point_names_a_plugin(hospital: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package is installed if its folder of metadata is on the path; nothing else names its entry points."""
    metadata = hospital.parent / "hospital-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: hospital\nVersion: 1.0\n")
    points = {"rules": "by-loss = hospital.rules:RULE", "partitioners": "in-turn = hospital.splits:PARTITIONER"}
    (metadata / "entry_points.txt").write_text(
        "".join(f"[copra_fl.{group}]\n{line}\n" for group, line in points.items())
    )
    plugins.entry_points.cache_clear()
    try:
        config = Config.from_flat({"rule": "by-loss", "partitioner": "in-turn"})
        assert find_rule("by-loss").name == "by-loss"
        assert plugins.digests(config).keys() == {"by-loss", "in-turn"}
    finally:
        plugins.entry_points.cache_clear()


def test_a_node_with_another_version_of_a_plugin_is_rejected_by_name(tiny: Settings, hospital: Path) -> None:
    """The node has answered before the server's sources change."""
    config = Config.from_flat(tiny | PLUGINS)
    (reply,) = query(LocalGrid(1), config, [100], timeout=60)
    handshake = read(reply)
    check_code("node 100", handshake, config)
    (hospital / "helpers.py").write_text("# a new file of the server's version\n")
    message = r"node 100 has another version of the plugin hospital.rules \(digest \w+\) than the server"
    with pytest.raises(FederationError, match=message):
        check_code("node 100", handshake, config)


def test_a_policy_names_the_packages_of_plugins_before_they_are_imported() -> None:
    config = Config.from_flat({"rule": "elsewhere.rules"})
    Policy(plugins="elsewhere").check_run(config, "minilm", 4)
    for allowed in ("hospital, wards", "none"):
        with pytest.raises(PolicyViolation, match="plugin 'elsewhere.rules' is not in a package among"):
            Policy(plugins=allowed).check_run(config, "minilm", 4)


def test_folders_of_plugins_travel_to_other_processes(hospital: Path) -> None:
    """Not those of installed packages."""
    configs = [Config.from_flat(changes) for changes in ({"rule": "hospital.rules"}, {"task": "torch.nn:TASK"}, {})]
    assert plugins.import_folders(configs) == [str(hospital.parent)]


@pytest.mark.slow
def test_plugins_in_the_folder_of_the_command_reach_the_workers(tiny: Settings, tmp_path: Path) -> None:
    """The real command, without PYTHONPATH of its own: SuperLink, server app and Ray's workers import the package."""
    (tmp_path / "hospital").mkdir()
    for name, source in MODULES.items():
        (tmp_path / "hospital" / f"{name}.py").write_text(source)
    flat = tiny | PLUGINS | {"num-rounds": 1}
    arguments = ["simulate", *settings(flat), "--output", "run", "--workers", "1", "--track", "hospital.sheet"]
    RealRun(arguments, tmp_path).finish()
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["rule"] == "hospital.rules"
    assert (tmp_path / "run.csv").read_text().count("\n") == 2
    assert "by-loss.sharpness = 3.0" in (tmp_path / "run" / "config.toml").read_text()
