"""fractal-vit, a small vision transformer in this package, pretrained by experiments/pretrain_vit.py."""

from __future__ import annotations

import shutil
from pathlib import Path

from copra_fl.sources.assets.asset import Asset, DownloadProgress


def find_fractal_vit(asset: Asset, staging: Path, on_progress: DownloadProgress) -> Path:
    """Return the path of its weights in this package; nothing is downloaded."""
    return Path(__file__).parent / asset.name / "model.safetensors"


def unpack_fractal_vit(archive: Path, folder: Path) -> None:
    """Copy the model folder, for from_pretrained."""
    shutil.copytree(archive.parent, folder, dirs_exist_ok=True)
