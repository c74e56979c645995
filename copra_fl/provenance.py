"""Provenance of results: versions of packages, digests of sources, and the machine."""

from __future__ import annotations

import hashlib
import os
import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("copra-fl", "flwr", "ray", "torch", "transformers", "peft", "numpy", "datasets", "flwr-datasets")


def source_digest(*folders: Path) -> str:
    """Return the SHA-256 over names and contents of the Python files in `folders`, sorted by name.

    A single file stands for a folder that has this file alone. Server and nodes compare the digest, so that no node
    runs other code unnoticed.
    """
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(folder.rglob("*.py")) if folder.is_dir() else [folder]:
            digest.update(f"{folder.name}/{path.relative_to(folder).as_posix()}\0".encode())
            digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()


@cache
def library_digest(clients: Path) -> str:
    """Return the `source_digest` of this library and of the folder ``clients``, computed once per process."""
    return source_digest(Path(__file__).parent, clients)


def pip_install(extra: str) -> str:
    """Return the command that installs an extra of copra-fl, which is on no package index."""
    checkout = Path(__file__).parent.parent
    source = checkout if (checkout / "pyproject.toml").exists() else "PATH-OF-COPRA-FL"
    return f"pip install '{source}[{extra}]'"


def versions() -> dict[str, str]:
    """Return the versions of Python and of `PACKAGES`."""
    return {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def machine() -> dict[str, str | int]:
    """Return a description of this machine, for results that contain times."""
    return {
        "system": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count() or 1,
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
