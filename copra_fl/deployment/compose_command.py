"""Whichever of `docker compose` and `podman-compose` there is, driven for one deployment."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass

from copra_fl.deployment.compose import GPU_NAME, NAME
from copra_fl.deployment.layout import Folder


class ComposeFailed(RuntimeError):
    """The compose program is not there, or it failed."""


@dataclass(frozen=True)
class Engine:
    """`program` runs compose files; here those of one deployment."""

    program: tuple[str, ...]
    folder: Folder

    def words(self, *arguments: str, gpu: bool = False) -> list[str]:
        """The command line, to be run in the deployment's folder."""
        return [*self.program, "-f", NAME, *(["-f", GPU_NAME] if gpu else []), *arguments]

    def run(self, *arguments: str, gpu: bool = False) -> None:
        """Run to the end, its output on the terminal. Raises ComposeFailed."""
        if code := subprocess.run(self.words(*arguments, gpu=gpu), cwd=self.folder.root).returncode:
            raise ComposeFailed(f"{' '.join(self.program)} {arguments[0]} ended with exit code {code}; why is above")

    def in_superlink(self, *command: str) -> str:
        """What `command` prints in the SuperLink's container. Raises CalledProcessError."""
        words = self.words("exec", "-T", "superlink", *command)
        return subprocess.run(words, cwd=self.folder.root, capture_output=True, text=True, check=True).stdout

    def follow_in_superlink(self, *command: str) -> subprocess.Popen[str]:
        """`command` in the SuperLink's container, while it runs: what it prints comes out of the process's stdout."""
        words = self.words("exec", "-T", "superlink", *command)
        return subprocess.Popen(
            words, cwd=self.folder.root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )


def find(folder: Folder) -> Engine:
    """Docker's compose plugin if there is one, else podman-compose. Raises ComposeFailed."""
    if shutil.which("docker") and not subprocess.run(["docker", "compose", "version"], capture_output=True).returncode:
        return Engine(("docker", "compose"), folder)
    if shutil.which("podman-compose"):
        return Engine(("podman-compose",), folder)
    raise ComposeFailed("neither `docker compose` nor `podman-compose` was found; install one of them")
