"""Finished runs, opened again: their global models, their clients, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from flwr.app import Message

from copra_fl.adapters.state import Adapter, complete, load_checkpoint
from copra_fl.config import Config
from copra_fl.probes.open_run import OpenRun, State, open_run, open_runs, plain
from copra_fl.reporting.results import ResultsError
from server.round_request import RoundRequest
from server.strategy import CohortStrategy, TrainResult
from tests.support.federations import finished_run
from tests.support.tiny import Settings


@pytest.fixture
def updates(monkeypatch: pytest.MonkeyPatch) -> dict[int, dict[int, Adapter]]:
    """round -> client -> its adapter, as the server had it."""
    seen: dict[int, dict[int, Adapter]] = {}
    aggregate = CohortStrategy.aggregate_train

    def spy(self: CohortStrategy, request: RoundRequest, replies: list[Message]) -> TrainResult:
        before = self.state.adapter
        result = aggregate(self, request, replies)
        seen[request.server_round] = {update.client: complete(update, before) for update in result.updates}
        return result

    monkeypatch.setattr(CohortStrategy, "aggregate_train", spy)
    return seen


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"engine": "peft", "lora-dropout": 0.2, "fraction-clients": 0.5},
        {"rule": "flora"},
        {"rule": "fed-sb", "local-training": "lora"},
    ],
)
def test_clients_trained_again_are_those_of_the_federation(
    tiny: Settings, changes: Settings, updates: dict[int, dict[int, Adapter]], tmp_path: Path
) -> None:
    run = open_run(finished_run(tiny | changes, tmp_path / "run"))
    for server_round in (1, 2):
        again = run.clients(server_round)
        assert list(again) == sorted(updates[server_round])
        for client, adapter in updates[server_round].items():
            for name, tensor in adapter.items():
                assert torch.allclose(again[client][name], tensor, rtol=1e-5, atol=1e-6), name
    client, adapter = max(again.items())
    alone = run.clients(2, only=[client])
    assert list(alone) == [client]
    assert all(torch.allclose(alone[client][name], adapter[name], rtol=1e-5, atol=1e-6) for name in adapter)


def test_the_final_model_scores_as_in_the_summary(tiny: Settings, tmp_path: Path) -> None:
    """With a residual, so that it must be there; as plain adapters too, whatever becomes of the residual."""
    directory = finished_run(tiny | {"rule": "fedex-lora"}, tmp_path / "run")
    run, summary = open_run(directory), json.loads((directory / "summary.json").read_text())
    assert run.score([run.adapter], "test") == [pytest.approx(summary["test"], rel=1e-6)]
    assert run.score([run.adapter]) == [pytest.approx(summary["validation"], rel=1e-6)]
    tensors, _ = load_checkpoint(directory / "checkpoints" / "round-00002.safetensors")
    assert run.residual and all(torch.equal(run.residual[name], tensors[f"residual/{name}"]) for name in run.residual)
    start = run.state(0)
    (own, zero), beside = plain([run.final, start], [run.scaling] * 2)
    assert beside == {}
    assert run.score_plain([own], "test") == [pytest.approx(summary["test"], rel=1e-4)]
    assert run.score_plain([zero, own])[0] == pytest.approx(run.score([start.adapter], residual={})[0], rel=1e-4)
    same, beside = plain([run.final, State(start.adapter, run.residual)], [run.scaling] * 2)
    assert beside == run.residual
    assert run.score_plain(same, residual=beside)[0] == pytest.approx(summary["validation"], rel=1e-4)


@pytest.fixture(scope="module")
def run(tiny: Settings, tmp_path_factory: pytest.TempPathFactory) -> OpenRun:
    return open_run(finished_run(tiny, tmp_path_factory.mktemp("runs") / "run"))


def test_rounds_that_are_not_there(run: OpenRun) -> None:
    with pytest.raises(ResultsError, match="no round 3; its rounds are 0 to 2"):
        run.state(3)
    with pytest.raises(ResultsError, match="no round 0; its rounds are 1 to 2"):
        run.clients(0)


def test_what_cannot_be_probed_is_refused(run: OpenRun, tiny: Settings, tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match="no folder of a run"):
        open_run(tmp_path)

    def altered(name: str, changes: Settings, summary: bool = True) -> Path:
        directory = tmp_path / name
        directory.mkdir()
        for file in ("journal.jsonl", "provenance.json", *(["summary.json"] if summary else [])):
            (directory / file).write_bytes((run.directory / file).read_bytes())
        (directory / "config.toml").write_text(Config.from_flat(tiny | changes).to_toml())
        return directory

    with pytest.raises(ResultsError, match="is not finished: 2 of 2 rounds; --resume"):
        open_run(altered("unfinished", {}, summary=False))
    with pytest.raises(ResultsError, match="'fedsa-lora' leaves a part of each model with its client"):
        open_run(altered("personal", {"rule": "fedsa-lora", "local-training": "lora"}))
    with pytest.raises(ResultsError, match="no longer what the run was trained on"):
        open_run(altered("other-data", {"alpha": 5.0}))
    with pytest.raises(ResultsError, match="do not share the data"):
        short = altered("short", {"max-length": 8, "server-validation-examples": 30})
        (short / "provenance.json").unlink()
        open_runs([run.directory, short])
    with pytest.raises(ResultsError, match="trained again: control-variates"):
        open_run(altered("scaffold", {"control-variates": True})).clients(1)
    with pytest.raises(ResultsError, match="trained again: client-ranks"):
        open_run(altered("ranks", {"rule": "zero-pad", "client-ranks": "2,2,2,2,1,1"})).clients(1)
    with pytest.raises(ResultsError, match="there is no checkpoint .*round-00001"):
        open_run(altered("pruned", {})).state(1)
