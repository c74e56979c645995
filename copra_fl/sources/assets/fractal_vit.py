"""fractal-vit, a small vision transformer that comes with this package; experiments/pretrain_vit.py made it."""

from __future__ import annotations

import shutil
from pathlib import Path

from copra_fl.sources.assets.asset import Asset, Progress


def find_fractal_vit(asset: Asset, staging: Path, on_progress: Progress) -> Path:
    """Its weights, which lie beside this file: nothing is downloaded."""
    return Path(__file__).parent / asset.name / "model.safetensors"


def unpack_fractal_vit(archive: Path, folder: Path) -> None:
    """A folder for from_pretrained."""
    shutil.copytree(archive.parent, folder, dirs_exist_ok=True)
