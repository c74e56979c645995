"""`docker compose` or `podman-compose`, whichever is installed, run in the folder of one deployment."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass

from copra_fl.deployment.compose import GPU_NAME, NAME
from copra_fl.deployment.layout import DeploymentLayout


class ComposeFailed(RuntimeError):
    """No compose program is installed, or it ended with an error."""


@dataclass(frozen=True)
class ComposeCommand:
    """The compose program and the deployment that it works on."""

    program: tuple[str, ...]
    layout: DeploymentLayout

    def command_line(self, *arguments: str, gpu: bool = False) -> list[str]:
        """Return the command line, which must be run in the deployment's folder."""
        return [*self.program, "-f", NAME, *(["-f", GPU_NAME] if gpu else []), *arguments]

    def run(self, *arguments: str, gpu: bool = False) -> None:
        """Run to the end, with the output on the terminal. Raises ComposeFailed."""
        if code := subprocess.run(self.command_line(*arguments, gpu=gpu), cwd=self.layout.root).returncode:
            raise ComposeFailed(
                f"`{' '.join(self.program)} {arguments[0]}` failed with exit code {code}; its output is above"
            )

    def run_in_superlink(self, *command: str) -> str:
        """Run `command` in the SuperLink's container and return its output. Raises CalledProcessError."""
        command_line = self.command_line("exec", "-T", "superlink", *command)
        return subprocess.run(command_line, cwd=self.layout.root, capture_output=True, text=True, check=True).stdout

    def start_in_superlink(self, *command: str) -> subprocess.Popen[str]:
        """Start `command` in the SuperLink's container; its output and errors are the process's stdout."""
        command_line = self.command_line("exec", "-T", "superlink", *command)
        return subprocess.Popen(
            command_line, cwd=self.layout.root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace",
        )  # fmt: skip


def find_compose(layout: DeploymentLayout) -> ComposeCommand:
    """Return Docker's compose plugin if it is installed, else podman-compose. Raises ComposeFailed."""
    if shutil.which("docker") and not subprocess.run(["docker", "compose", "version"], capture_output=True).returncode:
        return ComposeCommand(("docker", "compose"), layout)
    if shutil.which("podman-compose"):
        return ComposeCommand(("podman-compose",), layout)
    raise ComposeFailed("neither `docker compose` nor `podman-compose` is installed; install one of them")
