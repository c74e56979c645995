"""A round with secure aggregation that is done again after its nodes have revealed shares: the same sum, or none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from flwr.app import Message, RecordDict

from clients.revealed_rounds import RevealedRounds
from copra_fl.files import DamagedFile, cache_dir
from server.errors import FederationError
from server.journal import Journal
from tests.support.federations import assert_equal, final_adapter, journal
from tests.support.local_grid import LocalGrid, run_federation
from tests.support.tiny import Settings

SECURE = {"secure-aggregation": True, "updates": "pooled", "merge-gap-clients": 0, "path-pairs": 0,
          "max-update-ratio": 0.0, "local-steps": 2, "num-clients": 3, "num-rounds": 2, "failures": "tolerant",
          "secure-threshold": 0.6, "client-eval-examples": 4}  # fmt: skip


class Killed(BaseException):
    """The end of the server app between the nodes' shares and the checkpoint."""


@pytest.fixture
def interrupted(tiny: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Return a function that runs the nodes of `grid`, by default three, up to the unmasking of round 2."""

    def run(grid: LocalGrid | None = None, **changes: object) -> Path:
        recorded = Journal.record

        def killed_in_round_2(self: Journal, record: object, *rest: object) -> None:
            if len(self.records) == 1:
                raise Killed
            recorded(self, record, *rest)  # type: ignore[arg-type]

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(Journal, "record", killed_in_round_2)
            run_federation(tiny | SECURE | changes, tmp_path / "run", grid=grid or LocalGrid(3))
        assert [row["round"] for row in journal(tmp_path / "run")] == [1]
        return tmp_path / "run"

    return run


class ChangedGrid(LocalGrid):
    """Three nodes, of which `gone` do not answer messages of type `kind`, and `change` is made to training messages."""

    def __init__(
        self, gone: tuple[int, ...] = (), kind: str = "", change: Callable[[RecordDict], None] = lambda content: None
    ) -> None:
        super().__init__(3)
        self.gone, self.kind, self.change = gone, kind, change

    def answer(self, message: Message) -> Message:
        if message.metadata.message_type == self.kind and message.metadata.dst_node_id - 100 in self.gone:
            return Message(RecordDict(), reply_to=message)
        if message.metadata.message_type == "train":
            self.change(message.content)
        return super().answer(message)


class SilentInRound2(LocalGrid):
    """Three nodes, of which the last does not answer in round 2."""

    def __init__(self) -> None:
        super().__init__(3)
        self.rounds = 0

    def answer(self, message: Message) -> Message:
        is_last = message.metadata.dst_node_id == 102
        self.rounds += is_last and message.metadata.message_type == "query.keys"
        if is_last and self.rounds == 2 and message.metadata.message_type == "query.keys":
            return Message(RecordDict(), reply_to=message)
        return super().answer(message)


@pytest.mark.parametrize("changes", [{}, {"optimizer-state": "client"}])
def test_with_all_nodes_the_run_ends_as_if_it_had_not_been_killed(
    tiny: Settings, interrupted: Callable[..., Path], tmp_path: Path, changes: Settings
) -> None:
    settings = tiny | SECURE | changes
    directory = interrupted(**changes)
    run_federation(settings, directory, num_nodes=3)
    whole = run_federation(settings, tmp_path / "whole", num_nodes=3)
    assert_equal(final_adapter(directory), final_adapter(whole))
    assert journal(directory)[1]["notes"] == journal(whole)[1]["notes"]


@pytest.mark.parametrize("kind", ["query.keys", "query.shares", "train"])
def test_without_a_node_of_the_sum_the_round_is_refused_by_its_name(
    tiny: Settings, interrupted: Callable[..., Path], tmp_path: Path, kind: str
) -> None:
    """Two of three nodes would be enough: a sum of theirs would tell the update of the third."""
    directory = interrupted()
    reason = (
        r"nodes 0, 1, 2 were asked before to unmask their sum, and reveal shares for the same sum only; node 1 is "
        r"missing now\. Start it again, or start the run anew with --overwrite; client 1: .*--resume does the round"
    )
    with pytest.raises(FederationError, match=reason):
        run_federation(tiny | SECURE, directory, grid=ChangedGrid((1,), kind))
    run_federation(tiny | SECURE, directory, num_nodes=3)
    whole = run_federation(tiny | SECURE, tmp_path / "whole", num_nodes=3)
    assert_equal(final_adapter(directory), final_adapter(whole))


@pytest.mark.parametrize("kind", ["query.keys", "query.shares", "train"])
def test_nodes_refuse_a_server_that_forgets_which_sum_it_asked_for(
    tiny: Settings, interrupted: Callable[..., Path], kind: str
) -> None:
    directory = interrupted()
    (directory / "unmaskings.jsonl").unlink()
    reason = "node 0 has revealed its shares of round 2 already, for the sum of nodes 0, 1, 2.*: node 1 is missing now"
    with pytest.raises(FederationError, match=reason):
        run_federation(tiny | SECURE, directory, grid=ChangedGrid((1,), kind))


def test_nodes_refuse_another_vector_in_the_same_round(tiny: Settings, interrupted: Callable[..., Path]) -> None:
    directory = interrupted()

    def other_adapter(content: RecordDict) -> None:
        content["adapter"] = content["adapter"].from_torch_state_dict(  # type: ignore[union-attr]
            {name: 2 * tensor for name, tensor in content["adapter"].to_torch_state_dict().items()}  # type: ignore[union-attr]
        )

    with pytest.raises(FederationError, match="revealed its shares of round 2 already, with another vector"):
        run_federation(tiny | SECURE, directory, grid=ChangedGrid(change=other_adapter))


def test_a_node_that_was_not_in_the_sum_stays_out_of_the_round(
    tiny: Settings, interrupted: Callable[..., Path], tmp_path: Path
) -> None:
    """Killed with node 2 missing, resumed with it: bitwise the run in which it is missing in round 2."""
    directory = interrupted(SilentInRound2())
    run_federation(tiny | SECURE, directory, num_nodes=3)
    whole = run_federation(tiny | SECURE, tmp_path / "whole", grid=SilentInRound2())
    assert_equal(final_adapter(directory), final_adapter(whole))
    (missing,) = journal(directory)[1]["missing"]
    assert missing["client"] == 2 and "was not there when the nodes were asked to unmask" in missing["reason"]


def test_a_client_does_not_go_back_behind_a_sum_that_it_was_in(tiny: Settings, tmp_path: Path) -> None:
    """The difference to its update with the kept moments would be its own."""
    rounds: list[int] = []

    def without_state(content: RecordDict) -> None:
        rounds.append(content["plan"]["server-round"])  # type: ignore[index, arg-type]
        if rounds[-1] == 2 and content["plan"]["clients"] == [0]:
            content["plan"]["clients-with-state"] = content["plan"]["last-rounds"] = []  # type: ignore[index]

    settings = tiny | SECURE | {"optimizer-state": "client", "secure-threshold": 1.0}
    reason = "client 0 is to go on from its state after round 0, but its update of round 1 is in a sum"
    with pytest.raises(FederationError, match=reason):
        run_federation(settings, tmp_path / "run", grid=ChangedGrid(change=without_state))


def test_a_damaged_list_of_revealed_rounds_is_named(tmp_path: Path) -> None:
    RevealedRounds("damaged", 0).add(1, [0, 1], b"vector")
    RevealedRounds("damaged", 0).add(2, [0, 1], b"vector")
    assert RevealedRounds("damaged", 0).newest([1, 2, 3]) == 2
    (path,) = (cache_dir() / "clients" / "damaged").iterdir()
    path.write_text(path.read_text()[:-20])
    with pytest.raises(DamagedFile, match="node-0-revealed"):
        RevealedRounds("damaged", 0)


def test_the_id_of_a_run_is_no_path() -> None:
    with pytest.raises(ValueError, match=r"run = .*\.\./\.\./home.* must be letters, digits, - and _"):
        RevealedRounds("../../home", 0)
