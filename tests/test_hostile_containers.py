"""Containers that were taken over: links in their folders lead nowhere, and apps find no key."""

from __future__ import annotations

import ctypes
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest

from copra_fl.cli.deploy_run import read_runs
from copra_fl.deployment import hidden_keys
from copra_fl.deployment.layout import DeploymentLayout
from copra_fl.deployment.runs import share_assets
from copra_fl.files import atomic_write
from copra_fl.sources import assets
from tests.support.command_line import run_command

ROOT = Path(__file__).parent.parent


def init(directory: Path, *options: str) -> None:
    run_command("deploy", "init", directory, *options)


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A folder of the host with a file, both of which only their owner may read."""
    (tmp_path / "victim").mkdir(mode=0o700)
    (tmp_path / "victim" / "file").write_text("of the host")
    (tmp_path / "victim" / "file").chmod(0o600)
    return tmp_path / "victim"


def status_of(folder: Path) -> list[tuple[str, int, int, int, int]]:
    """Return name, owner, mode, size and time of change of a folder and all files in it."""
    paths = [folder, *sorted(folder.iterdir())]
    return [(path.name, s.st_uid, s.st_mode, s.st_size, s.st_ctime_ns) for path in paths for s in [path.lstat()]]


@pytest.mark.parametrize(
    ("link", "target"),
    [
        ("clients/client-0/state/innocent", "file"),
        ("server/state/flower", ""),
        ("server/state/superlink.db", "file"),
        ("runs/mine", ""),
    ],
)
def test_a_link_made_by_a_container_changes_nothing_on_the_host(
    tmp_path: Path, victim: Path, link: str, target: str
) -> None:
    """The container puts a link into a folder that it may write; then the host's user repeats `init`."""
    directory = tmp_path / "d"
    init(directory)
    (directory / link).symlink_to(victim / target)
    before = status_of(victim)
    init(directory, "--clients", "3", "--metrics-port", "9464", "--host", "fl.example.org")
    run_command("deploy", "rotate", directory, "--certificate", "--node", "client-0")
    list(read_runs(DeploymentLayout.open(directory)))
    assert status_of(victim) == before


def test_init_leaves_files_of_containers_to_their_owner(tmp_path: Path) -> None:
    """Modes that somebody has set, and files in writable folders, stay: `init` changes what it has just made."""
    directory = tmp_path / "d"
    init(directory)
    (directory / "server/state").chmod(0o750)
    (directory / "runs/file").write_text("of the container")
    before = status_of(directory / "runs") + status_of(directory / "server/state")
    init(directory, "--clients", "3")
    assert status_of(directory / "runs") + status_of(directory / "server/state") == before


def test_a_file_is_replaced_without_following_links(tmp_path: Path, victim: Path) -> None:
    """A report in a run's folder, where a container has guessed the name of the partial file."""
    folder = tmp_path / "run"
    folder.mkdir()
    before = status_of(victim)
    for name in ("report.html", f".report.html.{os.getpid()}"):
        (folder / name).symlink_to(victim / "file")
    atomic_write(folder / "report.html", "a report")
    assert (folder / "report.html").read_text() == "a report" and not (folder / "report.html").is_symlink()
    assert status_of(victim) == before


def has_landlock() -> bool:
    """Return True if the kernel knows Landlock: it then returns the version of its interface."""
    return ctypes.CDLL(None).syscall(hidden_keys.CREATE_RULESET, None, ctypes.c_size_t(0), 1) > 1


@pytest.mark.skipif(not has_landlock(), reason="this kernel has no Landlock")
def test_an_app_cannot_read_the_key_of_its_node(tmp_path: Path) -> None:
    """A process that hides its key has it in memory; a process of the same user that it starts finds it nowhere.

    Both can still move files from folder to folder, as a download into a cache does.
    """
    tls = tmp_path / "tls"
    tls.mkdir()
    (tls / "node.key").write_text("secret")
    (tls / "ca.crt").write_text("public")
    (tls / "link").symlink_to("node.key")
    (tmp_path / "state" / "part").mkdir(parents=True)
    (tmp_path / "state" / "part" / "file").touch()
    if os.getuid() == 0:
        for path in tmp_path.rglob("*"):
            os.lchown(path, 10001, 10001)
        for path in (tmp_path, *tmp_path.parents):
            if path.is_relative_to(tempfile.gettempdir()):
                path.chmod(path.stat().st_mode | 0o055)
    (tls / "node.key").chmod(0o644)
    app = f"""
        cat {tls}/ca.crt
        for file in {tls}/node.key {tls}/link /proc/self/fd/[3-9] /proc/$PPID/fd/[3-9] /proc/$PPID/root{tls}/node.key
        do timeout 5 head -c 99 $file; done
    """
    node = f"""
        import ctypes, os, subprocess
        from copra_fl.deployment.hidden_keys import SET_DUMPABLE, hide
        if os.getuid() == 0:
            os.setgroups([])
            os.setresgid(*[10001] * 3)
            os.setresuid(*[10001] * 3)
            ctypes.CDLL(None).prctl(SET_DUMPABLE, 1, 0, 0, 0)  # as after the start of a program
        subprocess.run(["sh", "-c", {app!r}])
        other, option = hide(["--port=1", "--key={tls}/node.key"], "--key")
        print(other, open(option.removeprefix("--key=")).read().replace("secret", "in memory"), flush=True)
        subprocess.run(["sh", "-c", {app!r}])
        os.rename("{tmp_path}/state/part/file", "{tmp_path}/state/file")
    """
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(node)], env=environment, capture_output=True, text=True,
        stdin=subprocess.DEVNULL, check=True,
    )  # fmt: skip
    before, after = ran.stdout.split("--port=1 in memory\n")
    assert before == "public" + "secret" * 3, "the file, the link, and by way of the parent's root"
    assert after == "public", ran.stdout + ran.stderr


def test_assets_are_shared_with_containers_read_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_cache: Path
) -> None:
    init(tmp_path / "d")
    layout = DeploymentLayout.open(tmp_path / "d")
    asset = assets.find_asset("minilm")
    cached = empty_cache / "assets" / f"{asset.name}-{asset.sha256[:12]}"
    cached.mkdir(parents=True)
    (cached / "config.json").write_text("{}")
    (cached / "config.json").chmod(0o600)
    share_assets(layout, ["minilm"])
    shared = layout.assets / cached.name
    assert stat.S_IMODE(shared.stat().st_mode) == 0o755
    assert stat.S_IMODE((shared / "config.json").stat().st_mode) == 0o644
    (shared / "config.json").write_text("damaged")
    share_assets(layout, ["minilm"])
    assert (shared / "config.json").read_bytes() == (cached / "config.json").read_bytes()
    shutil.rmtree(cached)
    with pytest.raises(assets.AssetError):
        assets.asset_path("minilm")
    monkeypatch.setenv("COPRA_FL_ASSETS", str(layout.assets))
    assert assets.asset_path("minilm") == shared
