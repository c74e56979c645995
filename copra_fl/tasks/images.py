"""Images as pixels: what tasks on images have in common.

    file  --decode, resize-->  uint8, kept in the cache  --normalise-->  pixel_values, what the base sees

The model's own image processor does both parts, always its Pillow version: others resize to other pixels.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, AutoModel, PreTrainedModel

from copra_fl.config import ConfigError
from copra_fl.files import digest_of
from copra_fl.sources.tables import TableError

if TYPE_CHECKING:  # slow to import, and needed only where the cache is empty
    import pandas as pd

IMAGES_PER_CALL = 256


class ImageProcessor:
    """A model's image processor, in its two parts.

    Attributes:
        num_tokens: hidden states that the model has of an image.
    """

    def __init__(self, source: str) -> None:
        """Raises OSError where there is none, ConfigError for a model that does not see an image as a row of tokens."""
        self.num_tokens = _num_tokens(source)
        self._whole = AutoImageProcessor.from_pretrained(source, backend="pil")

    @classmethod
    def from_pretrained(cls, source: str) -> ImageProcessor:
        return cls(source)

    def __call__(self, images: list[Image.Image]) -> dict[str, Tensor]:
        """``pixel_values`` (N, C, H, W) float32 of `images`."""
        return {"pixel_values": self.normalise(self.resize(images))}

    @property
    def mode(self) -> str:
        """What images are converted to: grey for a model of one channel, else RGB."""
        return "L" if len(self._whole.image_mean) == 1 else "RGB"

    @property
    def digest(self) -> str:
        """Names all that decides what pixels an image gives, and how many tokens."""
        return digest_of(json.loads(self._whole.to_json_string()), self.num_tokens)

    def resize(self, images: list[Image.Image]) -> Tensor:
        """(N, C, H, W) uint8."""
        converted = [image.convert(self.mode) for image in images]
        resized = self._whole(converted, do_rescale=False, do_normalize=False, return_tensors="pt")
        return resized["pixel_values"].to(torch.uint8)

    def normalise(self, pixels: Tensor) -> Tensor:
        """uint8 pixels (N, C, H, W) as the base takes them, in float32."""
        mean, deviation = (torch.tensor(x)[:, None, None] for x in (self._whole.image_mean, self._whole.image_std))
        return (pixels * self._whole.rescale_factor - mean) / deviation


def _num_tokens(source: str) -> int:
    """Found by running the model on torch's meta device, which computes shapes and no numbers."""
    with torch.device("meta"):
        base = AutoModel.from_config(AutoConfig.from_pretrained(source)).eval()
        if base.main_input_name != "pixel_values":
            raise ConfigError(f"model = {source!r} takes {base.main_input_name}, no images")
        shape = base(**blank_images(base, 1)).last_hidden_state.shape
    if len(shape) != 3:
        raise ConfigError(
            f"model = {source!r} makes hidden states of shape {tuple(shape)} of an image; it must make (1, tokens, "
            "width), as ViT and DINOv2 do"
        )
    return shape[1]


@dataclass(frozen=True)
class Images:
    """
    Attributes:
        pixels: (N, C, H, W) uint8.
        labels: (N,) int64, its label's place in the list.
        processor: what makes of pixels what the base sees.
    """

    pixels: Tensor
    labels: Tensor
    processor: ImageProcessor

    def __len__(self) -> int:
        return len(self.pixels)

    @cached_property
    def lengths(self) -> np.ndarray:
        """(N,) tokens of an image, the same for all."""
        return np.full(len(self), self.max_length)

    @cached_property
    def num_targets(self) -> np.ndarray:
        """(N,) ones: an image is one target."""
        return np.ones(len(self), int)

    @property
    def max_length(self) -> int:
        return self.processor.num_tokens

    def batch(self, indices: np.ndarray, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """``pixel_values`` (B, C, H, W) float32 and ``labels`` (B,) int64 of `indices`, on `device`."""
        chosen = torch.as_tensor(indices)
        batch = {"pixel_values": self.processor.normalise(self.pixels[chosen]), "labels": self.labels[chosen]}
        return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def read_images(column: pd.Series, folder: Path) -> pd.Series:
    """The bytes of each image's file, NA for what is missing.

    An entry is a path, from `folder` on; the bytes; or, as Hugging Face data sets write it, a dict of both.
    Raises TableError for a file that cannot be read.
    """
    import pandas as pd

    return pd.Series([_bytes_of(entry, folder) or pd.NA for entry in column], column.index, dtype=object)


def _bytes_of(entry: Any, folder: Path) -> bytes | None:
    if isinstance(entry, dict):
        entry = entry.get("bytes") or entry.get("path")
    if not isinstance(entry, str):
        return entry if isinstance(entry, bytes) else None
    if not entry.strip():
        return None
    try:
        return (folder / entry).read_bytes()
    except OSError as error:
        raise TableError(
            f"cannot read the image {folder / entry}: {error.strerror}",
            f"an image of its file cannot be read: {error.strerror}",
        ) from error


def encode_images(processor: ImageProcessor, files: pd.Series) -> dict[str, Tensor]:
    """``pixels`` (N, C, H, W) uint8 of the images in `files`, bytes. Raises TableError for one that is no image."""
    parts = []
    for start in range(0, len(files), IMAGES_PER_CALL):
        images = [_decode(file, start + i) for i, file in enumerate(files.iloc[start : start + IMAGES_PER_CALL])]
        parts.append(processor.resize(images))
    return {"pixels": torch.cat(parts) if parts else torch.zeros(0, len(processor.mode), 1, 1, dtype=torch.uint8)}


def _decode(file: bytes, number: int) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(file))
        image.load()
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises for files that are no images, or broken
        told = f"image number {number} (from 0; rows without image or label not counted) is none: {error}"
        raise TableError(told, "an image of its file cannot be decoded") from error
    return image


def blank_images(base: PreTrainedModel, number: int) -> dict[str, Tensor]:
    """Black images, as the model `base` of images takes them."""
    size, channels = base.config.image_size, base.config.num_channels
    shape = (size, size) if isinstance(size, int) else tuple(size)
    return {"pixel_values": torch.zeros(number, channels, *shape, dtype=base.dtype, device=base.device)}
