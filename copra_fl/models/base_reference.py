"""The reference to a base in an adapter folder, which holds on every machine: its name, revision and SHA-256."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from transformers.utils import cached_file

from copra_fl.config import ConfigError
from copra_fl.models.base_weights import weights_digest
from copra_fl.sources import assets
from copra_fl.sources.assets import ASSETS, asset_in

#: the commit of a file in the cache of the Hugging Face hub
SNAPSHOT = re.compile(r"/snapshots/([0-9a-f]{40})/")


@dataclass(frozen=True)
class BaseReference:
    """A base model, as an adapter folder names it.

    Attributes:
        name: its name on the Hugging Face hub, the path that the user has given, or an asset without a model there.
        revision: its commit on the hub; None for an asset or a path.
        asset: name of the asset that holds it; empty for another model.
        sha256: digest of its weights (`weights_digest`); empty in folders of earlier versions.
    """

    name: str
    revision: str | None = None
    asset: str = ""
    sha256: str = ""

    @property
    def is_on_hub(self) -> bool:
        """True if `name` is that of a model on the Hugging Face hub."""
        return bool(self.revision or (self.asset and ASSETS[self.asset].hub))

    @classmethod
    def of(cls, source: str) -> BaseReference:
        """Return the reference to the base that Transformers opens as `source`, a folder or a name on the hub."""
        digest = weights_digest(source)
        if asset := asset_in(source):
            return cls(asset.hub or asset.name, asset=asset.name, sha256=digest)
        snapshot = None if Path(source).is_dir() else SNAPSHOT.search(str(cached_file(source, "config.json")))
        return cls(source, snapshot[1] if snapshot else None, sha256=digest)

    @classmethod
    def of_earlier_version(cls, name: str) -> BaseReference:
        """Return the reference in an adapter folder of an earlier version, which has a name or a path and no digest."""
        asset = asset_in(name)
        return cls(asset.hub or asset.name, asset=asset.name) if asset else cls(name)

    def find(self, given: str = "") -> str:
        """Return the folder or name from which Transformers opens the base, after a check of its digest.

        `given` is another place for it: an asset, a folder or a name on the hub. Without one it is the asset, or the
        model called `name`, or a fetched asset with its digest. Raises ConfigError for a base that is not there or has
        another digest, AssetError for an asset that cannot be fetched.
        """
        source = given or (self.asset if self.asset in ASSETS else self.name)
        if source in ASSETS:
            source = str(assets.fetch(source))
        try:
            digest = weights_digest(source)
        except (OSError, ValueError) as error:
            if not given and (fetched := self._fetched_asset()):
                return fetched
            subject = f"base {given!r}" if given else f"the base {self.name!r} of the adapter"
            digest_hint = f" whose weights have SHA-256 {self.sha256}" if self.sha256 else ""
            raise ConfigError(
                f"{subject} is not an asset ({', '.join(_model_assets())}) or a folder with a Transformers model, and "
                f"could not be loaded from the Hugging Face hub: {str(error).splitlines()[0]} Set base to the folder "
                f"with the model{digest_hint}"
            ) from error
        if self.sha256 not in ("", digest):
            revision = f" (revision {self.revision})" if self.revision else ""
            raise ConfigError(
                f"the base differs: the weights of {given or self.name!r} have SHA-256 {digest}, but the adapter was "
                f"trained on weights with {self.sha256}{revision}; set base to the folder or name of that model"
            )
        return source

    def _fetched_asset(self) -> str | None:
        """Return the folder of a fetched asset with the same weights."""
        folders = [str(assets.asset_path(name)) for name in _model_assets() if assets.is_fetched(name)]
        return next((folder for folder in folders if weights_digest(folder) == self.sha256), None)


def _model_assets() -> list[str]:
    return [name for name, asset in ASSETS.items() if asset.kind == "model"]
