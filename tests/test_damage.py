"""Damaged run folders: a resume goes on from what is whole, bitwise as the undisturbed run, and names what is not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from flwr.app import Message

from copra_fl import events
from copra_fl.files import DamagedFile
from copra_fl.tensor_files import read_tensors
from tests.support.federations import Stop, assert_equal, final_adapter, journal
from tests.support.local_grid import LocalGrid, run_federation
from tests.support.tiny import Settings

#: rounds of the undisturbed run; the damaged ones were interrupted after one less
NUM_ROUNDS = 4


@pytest.fixture
def flat(tiny: Settings) -> Settings:
    return tiny | {"num-rounds": NUM_ROUNDS}


@pytest.fixture
def whole(flat: Settings, tmp_path: Path) -> Path:
    return run_federation(flat, tmp_path / "whole")


@pytest.fixture
def interrupted(whole: Path, tmp_path: Path) -> Path:
    """Return the folder of the run as it was before its last round."""
    directory = shutil.copytree(whole, tmp_path / "interrupted")
    (directory / "summary.json").unlink()
    checkpoint(directory, NUM_ROUNDS).unlink()
    lines = (directory / "journal.jsonl").read_text().splitlines(keepends=True)
    (directory / "journal.jsonl").write_text("".join(lines[:-1]))
    return directory


def checkpoint(directory: Path, number: int) -> Path:
    return directory / "checkpoints" / f"round-{number:05d}.safetensors"


def without_seconds(directory: Path) -> list[object]:
    """Return the journal without times, which differ between equal runs."""
    timeless = [{**row, "seconds": 0} for row in journal(directory)]
    for row in timeless:
        row["clients"] = [{**client, "seconds": 0} for client in row["clients"]]
    return timeless


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-10] ^= 1
    path.write_bytes(content)


def tear_a_line(path: Path) -> None:
    """Cut the second line in half, behind a brace."""
    first, second, *others = path.read_text().splitlines(keepends=True)
    half = second[: second.index("}", len(second) // 2) + 1] + "\n"
    path.write_text("".join([first, half, *others]))


NEWEST = f"checkpoints/round-{NUM_ROUNDS - 1:05d}.safetensors"


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("journal.jsonl", Path.unlink),
        ("journal.jsonl", empty),
        ("journal.jsonl", cut),
        ("journal.jsonl", tear_a_line),
        (NEWEST, empty),
        (NEWEST, cut),
        (NEWEST, flip_a_bit),
        ("provenance.json", empty),
        ("provenance.json", cut),
    ],
)
def test_a_damaged_file_costs_at_most_a_round(
    file: str,
    damage: Callable[[Path], None],
    flat: Settings,
    whole: Path,
    interrupted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(events.VARIABLE, str(tmp_path / "events"))
    run_id = json.loads((whole / "provenance.json").read_text())["run"]
    damage(interrupted / file)
    run_federation(flat, interrupted)
    assert_equal(final_adapter(interrupted), final_adapter(whole))
    assert without_seconds(interrupted) == without_seconds(whole)
    assert json.loads((interrupted / "provenance.json").read_text())["run"] == run_id
    told = [json.loads(line) for line in (tmp_path / "events").read_text().splitlines()]
    notes = [event["text"] for event in told if event["event"] == "note"]
    if damage not in (Path.unlink, empty) or file != "journal.jsonl":  # an empty journal has no damaged line
        assert any(str(interrupted / file) in note for note in notes)


def test_a_run_goes_on_from_the_last_round_that_has_all_lines_before_it(
    flat: Settings, whole: Path, interrupted: Path
) -> None:
    """The line of round 2 is lost and its checkpoint too, so the run goes on after round 1."""
    (interrupted / "journal.jsonl").unlink()
    checkpoint(interrupted, 2).unlink()
    run_federation(flat, interrupted)
    assert_equal(final_adapter(interrupted), final_adapter(whole))
    assert without_seconds(interrupted) == without_seconds(whole)
    origins = json.loads((interrupted / "provenance.json").read_text())["resumes"]
    assert [origin["after_round"] for origin in origins] == [1]


def test_a_run_without_a_whole_checkpoint_is_left_as_it_is(flat: Settings, interrupted: Path) -> None:
    for path in (interrupted / "checkpoints").iterdir():
        flip_a_bit(path)
    before = {path.name: path.read_bytes() for path in interrupted.rglob("*") if path.is_file()}
    with pytest.raises(DamagedFile, match=r"interrupted/checkpoints is damaged: .*start it anew with --overwrite"):
        run_federation(flat, interrupted)
    assert {path.name: path.read_bytes() for path in interrupted.rglob("*") if path.is_file()} == before


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Yield a file with an ext4 file system that is mounted on the folder `disk`."""
    image, folder = tmp_path / "disk.img", tmp_path / "disk"
    with image.open("wb") as file:
        file.truncate(32 << 20)
    folder.mkdir()
    try:
        subprocess.run(["mkfs.ext4", "-q", image], check=True)
        subprocess.run(["mount", "-o", "loop", image, folder], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"cannot mount a file system here: {error}")
    yield image
    subprocess.run(["umount", folder], check=True)


class PowerCut(LocalGrid):
    """Copies the disk in the middle of a round, without what the system has not written to it yet; then stops."""

    def __init__(self, disk: Path, copy: Path) -> None:
        super().__init__(2)
        self.disk, self.copy = disk, copy
        self.num_training_messages = 0

    def answer(self, message: Message) -> Message:
        if message.metadata.message_type == "train":
            self.num_training_messages += 1
            if self.num_training_messages == 2 * (NUM_ROUNDS - 1) + 1:
                shutil.copyfile(self.disk, self.copy)
                raise Stop
        return super().answer(message)


def test_a_power_failure_loses_no_finished_round(flat: Settings, whole: Path, disk: Path, tmp_path: Path) -> None:
    """The disk is copied in the middle of round 4; the copy goes on after round 3."""
    with pytest.raises(Stop):
        run_federation(flat, tmp_path / "disk" / "run", grid=PowerCut(disk, tmp_path / "copy.img"))
    subprocess.run(["umount", tmp_path / "disk"], check=True)
    subprocess.run(["mount", "-o", "loop", tmp_path / "copy.img", tmp_path / "disk"], check=True)
    run = tmp_path / "disk" / "run"
    assert os.listdir(run / "checkpoints") and len(journal(run)) == NUM_ROUNDS - 1
    read_tensors(checkpoint(run, NUM_ROUNDS - 1))
    run_federation(flat, run)
    assert_equal(final_adapter(run), final_adapter(whole))
    assert without_seconds(run) == without_seconds(whole)
