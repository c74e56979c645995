"""Opened runs have the federation's global states and clients; runs that cannot be probed are refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from flwr.app import Message

from copra_fl.adapters.server_state import ServerState
from copra_fl.adapters.state import Adapter, complete
from copra_fl.config import Config
from copra_fl.probes.open_run import LIMITATIONS, Limitation, OpenRun, open_run, open_runs, plain_adapters
from copra_fl.reporting.results import ResultsError
from copra_fl.tensor_files import read_tensors
from server.round_request import RoundRequest
from server.strategy import CohortStrategy, TrainResult
from tests.support.federations import finished_run
from tests.support.tiny import Settings

METRICS = ("loss", "accuracy", "examples")


@pytest.fixture
def adapters_at_server(monkeypatch: pytest.MonkeyPatch) -> dict[int, dict[int, Adapter]]:
    """Record the clients' adapters that the server aggregates: round -> client -> adapter."""
    recorded: dict[int, dict[int, Adapter]] = {}
    aggregate = CohortStrategy.aggregate_train

    def spy(self: CohortStrategy, request: RoundRequest, replies: list[Message], *secure: object) -> TrainResult:
        before = self.state.adapter
        result = aggregate(self, request, replies, *secure)
        recorded[request.server_round] = {update.client: complete(update, before) for update in result.updates}
        return result

    monkeypatch.setattr(CohortStrategy, "aggregate_train", spy)
    return recorded


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"engine": "peft", "lora-dropout": 0.2, "fraction-clients": 0.5},
        {"rule": "flora"},
        {"rule": "fed-sb", "local-training": "lora"},
    ],
)
def test_clients_trained_again_equal_those_of_the_federation(
    tiny: Settings, changes: Settings, adapters_at_server: dict[int, dict[int, Adapter]], tmp_path: Path
) -> None:
    run = open_run(finished_run(tiny | changes, tmp_path / "run"))
    for server_round in (1, 2):
        again = run.clients(server_round)
        assert list(again) == sorted(adapters_at_server[server_round])
        for client, adapter in adapters_at_server[server_round].items():
            for name, tensor in adapter.items():
                assert torch.allclose(again[client][name], tensor, rtol=1e-5, atol=1e-6), name
    client, adapter = max(again.items())
    alone = run.clients(2, only=[client])
    assert list(alone) == [client]
    assert all(torch.allclose(alone[client][name], adapter[name], rtol=1e-5, atol=1e-6) for name in adapter)


def test_the_final_state_scores_as_in_the_summary(tiny: Settings, tmp_path: Path) -> None:
    """With a residual, as trained and as plain adapters: the residual is folded in, or shared by all."""
    directory = finished_run(tiny | {"rule": "fedex-lora"}, tmp_path / "run")
    run, summary = open_run(directory), json.loads((directory / "summary.json").read_text())
    expected = {split: {name: summary[split][name] for name in METRICS} for split in ("test", "validation")}
    assert run.score([run.adapter], "test") == [pytest.approx(expected["test"], rel=1e-6)]
    assert run.score([run.adapter]) == [pytest.approx(expected["validation"], rel=1e-6)]
    tensors, _ = read_tensors(directory / "checkpoints" / "round-00002.safetensors")
    assert run.residual and all(torch.equal(run.residual[name], tensors[f"residual/{name}"]) for name in run.residual)
    start = run.state(0)
    (folded, initial), shared = plain_adapters([run.final, start], [run.scaling] * 2)
    assert shared == {}
    assert run.score_plain([folded], "test") == [pytest.approx(expected["test"], rel=1e-4)]
    assert run.score_plain([initial, folded])[0] == pytest.approx(run.score([start.adapter], residual={})[0], rel=1e-4)
    unfolded, shared = plain_adapters([run.final, ServerState(start.adapter, run.residual)], [run.scaling] * 2)
    assert shared == run.residual
    assert run.score_plain(unfolded, residual=shared)[0] == pytest.approx(expected["validation"], rel=1e-4)


@pytest.fixture(scope="module")
def run(tiny: Settings, tmp_path_factory: pytest.TempPathFactory) -> OpenRun:
    return open_run(finished_run(tiny, tmp_path_factory.mktemp("runs") / "run"))


def test_rounds_that_a_run_does_not_have(run: OpenRun) -> None:
    with pytest.raises(ResultsError, match="no round 3; its rounds are 0 to 2"):
        run.state(3)
    with pytest.raises(ResultsError, match="no round 0; its rounds are 1 to 2"):
        run.clients(0)


@pytest.fixture
def altered(run: OpenRun, tiny: Settings, tmp_path: Path) -> Callable[..., Path]:
    """Return a function that copies the run's records to a new folder, with changed settings and no checkpoints."""

    def altered(name: str, changes: Settings, summary: bool = True) -> Path:
        directory = tmp_path / name
        directory.mkdir()
        for file in ("journal.jsonl", "provenance.json", *(["summary.json"] if summary else [])):
            (directory / file).write_bytes((run.directory / file).read_bytes())
        (directory / "config.toml").write_text(Config.from_flat(tiny | changes).to_toml())
        return directory

    return altered


def test_incomplete_and_changed_runs_are_refused(run: OpenRun, altered: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match="is not the folder of a run: it has no config.toml$"):
        open_run(tmp_path)
    (tmp_path / "comparison.toml").touch()
    with pytest.raises(ResultsError, match="it is a comparison: name one of the runs in it"):
        open_run(tmp_path)
    with pytest.raises(ResultsError, match=r"is not finished \(2 of 2 rounds\): continue it with --resume"):
        open_run(altered("unfinished", {}, summary=False))
    other_data = altered("other-data", {"alpha": 5.0})
    with pytest.raises(ResultsError, match="does not give the data .* trained on; the data or copra-fl has changed"):
        open_run(other_data)
    provenance = json.loads((other_data / "provenance.json").read_text())
    provenance["start"]["versions"]["copra-fl"] = "0.0.9"
    (other_data / "provenance.json").write_text(json.dumps(provenance))
    with pytest.raises(ResultsError, match="trained on; the run is of copra-fl 0.0.9, this is copra-fl "):
        open_run(other_data)
    with pytest.raises(ResultsError, match="round-00001.safetensors does not exist"):
        open_run(altered("pruned", {})).state(1)
    short = altered("short", {"max-length": 8, "server-validation-examples": 30})
    (short / "provenance.json").unlink()
    with pytest.raises(ResultsError, match="differ in the data"):
        open_runs([run.directory, short])


REFUSED: dict[str, Settings] = {
    "rule": {"rule": "fedsa-lora", "local-training": "lora"},
    "dora": {"dora": True},
    "partitioner": {"partitioner": "own", "labels": "sea,sky,sand"},
    "num-clients": {"num-clients": 0},
    "client-ranks": {"rule": "zero-pad", "client-ranks": "2,2,2,2,1,1"},
    "control-variates": {"control-variates": True},
    "optimizer-state": {"optimizer-state": "client"},
}


@pytest.mark.parametrize("limitation", LIMITATIONS, ids=lambda limitation: limitation.key)
def test_each_limitation_is_refused_with_its_key_and_reason(
    limitation: Limitation, altered: Callable[..., Path]
) -> None:
    settings = REFUSED[limitation.key]
    directory = altered(limitation.key, settings)
    action = {"opening": "the run cannot be probed", "retraining": "the clients of a round cannot be trained again"}
    reason = f"{action[limitation.prevents]}: {limitation.key} = {settings[limitation.key]!r}: {limitation.reason}"
    with pytest.raises(ResultsError, match=re.escape(reason)):
        open_run(directory).clients(1)
    if limitation.prevents == "retraining":
        open_run(directory)
