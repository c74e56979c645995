"""Fashion-MNIST: 28 x 28 grey images of ten kinds of clothes. Xiao, Rasul and Vollgraf, 2017, arXiv:1708.07747.

The package has IDX files (http://yann.lecun.com/exdb/mnist); they are converted to Parquet files that Hugging Face
datasets opens with its Image feature.
"""

from __future__ import annotations

import gzip
import io
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

CLASSES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
INSIDE = "./usr/share/datasets/fashion-mnist"


def unpack_fashion_mnist(archive: Path, folder: Path) -> None:
    """Write train.parquet and test.parquet with columns `image` (PNG) and `label` (name of the class)."""
    with tarfile.open(fileobj=io.BytesIO(ar_member(archive.read_bytes(), "data.tar.xz"))) as files:
        for split, prefix in (("train", "train"), ("test", "t10k")):
            images, labels = (
                read_idx(gzip.decompress(_read(files, f"{INSIDE}/{prefix}-{name}-ubyte.gz")))
                for name in ("images-idx3", "labels-idx1")
            )
            _write_images(images, [CLASSES[label] for label in labels], folder / f"{split}.parquet")


def _read(files: tarfile.TarFile, name: str) -> bytes:
    file = files.extractfile(name)
    assert file is not None, f"{name} is not a file"
    return file.read()


def ar_member(archive: bytes, name: str) -> bytes:
    """Return the file `name` of an ar archive, the format of Debian packages (man 5 deb). Raises KeyError."""
    start = len(b"!<arch>\n")
    while start < len(archive):
        header, content = archive[start : start + 60], start + 60
        size = int(header[48:58])
        if header[:16].decode().strip() == name:
            return archive[content : content + size]
        start = content + size + size % 2
    raise KeyError(name)


def read_idx(content: bytes) -> np.ndarray:
    """Return the array in an IDX file: two zeros, type (8 for bytes), number of dimensions, their sizes, values."""
    import numpy as np

    dimensions = content[3]
    shape = np.frombuffer(content, ">u4", count=dimensions, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def _write_images(images: np.ndarray, labels: list[str], path: Path) -> None:
    import datasets  # slow to import, and only unpacking needs it
    from PIL import Image

    def png(pixels: np.ndarray) -> bytes:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "png")
        return file.getvalue()

    datasets.disable_progress_bars()
    columns = {"image": [{"bytes": png(pixels), "path": None} for pixels in images], "label": labels}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    datasets.Dataset.from_dict(columns, features).to_parquet(path)
