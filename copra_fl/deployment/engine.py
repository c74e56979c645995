"""Whichever of `docker compose` and `podman-compose` there is, driven for one deployment."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass

from copra_fl.deployment.compose import GPU_NAME, NAME
from copra_fl.deployment.folder import Folder


class ComposeFailed(RuntimeError):
    """The compose program is not there, or it failed."""


@dataclass(frozen=True)
class Engine:
    """`command` is the compose program, run in the deployment's folder."""

    command: tuple[str, ...]
    folder: Folder

    def start(self, *arguments: str, gpu: bool = False, **popen: object) -> subprocess.Popen[str]:
        files = ("-f", NAME, "-f", GPU_NAME) if gpu else ("-f", NAME)
        return subprocess.Popen([*self.command, *files, *arguments], cwd=self.folder.root, text=True, **popen)  # type: ignore[call-overload, no-any-return]

    def run(self, *arguments: str, gpu: bool = False) -> None:
        """Run to the end, its output on the terminal. Raises ComposeFailed."""
        if code := self.start(*arguments, gpu=gpu).wait():
            raise ComposeFailed(f"{' '.join(self.command)} {arguments[0]} ended with exit code {code}; why is above")

    def in_superlink(self, *command: str) -> str:
        """What `command` prints in the SuperLink's container. Raises CalledProcessError."""
        process = self.start("exec", "-T", "superlink", *command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        out, err = process.communicate()
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, process.args, out, err)
        return out


def find(folder: Folder) -> Engine:
    """Docker's compose plugin if there is one, else podman-compose. Raises ComposeFailed."""
    if shutil.which("docker"):
        version = subprocess.run(["docker", "compose", "version"], capture_output=True)
        if version.returncode == 0:
            return Engine(("docker", "compose"), folder)
    if shutil.which("podman-compose"):
        os.environ.setdefault("PODMAN_IGNORE_CGROUPSV1_WARNING", "1")
        return Engine(("podman-compose",), folder)
    raise ComposeFailed("neither `docker compose` nor `podman-compose` was found; install one of them")
