"""Images as pixels: the common base of tasks on images.

    file  --decode, resize-->  uint8, kept in the cache  --normalize-->  pixel_values, the input of the base

The model's own image processor does both parts, always in its Pillow version: other versions resize to other pixels.
"""

from __future__ import annotations

import io
import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from PIL import Image, ImageOps
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, AutoModel, PreTrainedConfig, PreTrainedModel

from copra_fl.config import ConfigError
from copra_fl.files import digest_of, kept_text
from copra_fl.sources.tables import TableError, path_or_bytes

if TYPE_CHECKING:  # slow to import, and needed only if the cache is empty
    import pandas as pd

NUMBER = re.compile("[1-9][0-9]*")
#: images that are resized in one call
IMAGES_PER_CALL = 256


class ImageProcessor:
    """A model's image processor, split into resizing and normalizing.

    Attributes:
        num_tokens: number of hidden states of the model for an image.
    """

    def __init__(self, source: str) -> None:
        """Raises OSError if the model has no image processor, ConfigError if it does not map an image to tokens."""
        self.num_tokens = _num_tokens(source)
        self._processor = AutoImageProcessor.from_pretrained(source, backend="pil")

    @classmethod
    def from_pretrained(cls, source: str) -> ImageProcessor:
        return cls(source)

    def save_pretrained(self, directory: Path) -> None:
        """Write the model's image processor to `directory`."""
        self._processor.save_pretrained(directory)

    def __call__(self, images: list[Image.Image]) -> dict[str, Tensor]:
        """Return ``pixel_values`` (N, C, H, W) float32 of `images`, turned as their EXIF data say."""
        return {"pixel_values": self.normalize(self.resize([ImageOps.exif_transpose(image) for image in images]))}

    @property
    def mode(self) -> str:
        """Pillow's mode of the images: grayscale for a model with one channel, else RGB."""
        return "L" if len(self._processor.image_mean) == 1 else "RGB"

    @property
    def digest(self) -> str:
        """Digest of everything that affects an image's pixels and number of tokens."""
        return digest_of(json.loads(self._processor.to_json_string()), self.num_tokens)

    def resize(self, images: list[Image.Image]) -> Tensor:
        """Return (N, C, H, W) uint8 pixels of `images`, converted and resized."""
        converted = [image.convert(self.mode) for image in images]
        resized = self._processor(converted, do_rescale=False, do_normalize=False, return_tensors="pt")
        return resized["pixel_values"].to(torch.uint8)

    def normalize(self, pixels: Tensor) -> Tensor:
        """Return the base's input (N, C, H, W) float32 from uint8 pixels, rescaled and normalized as the model asks."""
        values = pixels.float()
        if self._processor.do_rescale:
            values = values * self._processor.rescale_factor
        if self._processor.do_normalize:
            statistics = self._processor.image_mean, self._processor.image_std
            mean, deviation = (torch.tensor(numbers)[:, None, None] for numbers in statistics)
            values = (values - mean) / deviation
        return values


def _num_tokens(source: str) -> int:
    """Return the number of tokens of an image; the model is run once, and its number kept in the cache."""
    config = AutoConfig.from_pretrained(source)
    key = digest_of("image tokens", transformers.__version__, config.to_dict())
    return int(kept_text(key, NUMBER, lambda: str(_count_tokens(source, config))))


def _count_tokens(source: str, config: PreTrainedConfig) -> int:
    """Return the number of tokens of an image, from a run on torch's meta device, which computes shapes only."""
    with torch.device("meta"):
        base = AutoModel.from_config(config).eval()
        if base.main_input_name != "pixel_values":
            raise ConfigError(f"model = {source!r} expects {base.main_input_name}, so it is not an image model")
        shape = base(**blank_images(base, 1)).last_hidden_state.shape
    if len(shape) != 3:
        raise ConfigError(
            f"model = {source!r} gives hidden states of shape {tuple(shape)} for one image; (1, tokens, width) is "
            "needed, as ViT and DINOv2 give"
        )
    return shape[1]


@dataclass(frozen=True)
class Images:
    """Images with one label each.

    Attributes:
        pixels: (N, C, H, W) uint8.
        labels: (N,) int64, index of the label in the list.
        processor: the image processor that normalizes pixels.
    """

    pixels: Tensor
    labels: Tensor
    processor: ImageProcessor

    def __len__(self) -> int:
        return len(self.pixels)

    @cached_property
    def lengths(self) -> np.ndarray:
        """(N,) number of tokens, the same for all images."""
        return np.full(len(self), self.max_length)

    @cached_property
    def num_targets(self) -> np.ndarray:
        """(N,) ones: each image is one target."""
        return np.ones(len(self), int)

    @property
    def max_length(self) -> int:
        return self.processor.num_tokens

    def batch(self, indices: np.ndarray, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Return ``pixel_values`` (B, C, H, W) float32 and ``labels`` (B,) int64 of `indices`, on `device`."""
        chosen = torch.as_tensor(indices)
        batch = {"pixel_values": self.processor.normalize(self.pixels[chosen]), "labels": self.labels[chosen]}
        return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def read_images(column: pd.Series, folder: Path) -> pd.Series:
    """Return the bytes of each image file, with NA for missing ones.

    An entry is a path relative to `folder`, the bytes, or a dict of both as in Hugging Face data sets. Raises
    TableError for a file that cannot be read.
    """
    import pandas as pd

    return pd.Series([_bytes_of(entry, folder) or pd.NA for entry in column], column.index, dtype=object)


def _bytes_of(entry: Any, folder: Path) -> bytes | None:
    entry = path_or_bytes(entry)
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
    """Return ``pixels`` (N, C, H, W) uint8 of image files, given as bytes. Raises TableError for an invalid image."""
    parts = []
    for start in range(0, len(files), IMAGES_PER_CALL):
        images = [_decode(file, start + i) for i, file in enumerate(files.iloc[start : start + IMAGES_PER_CALL])]
        parts.append(processor.resize(images))
    return {"pixels": torch.cat(parts) if parts else torch.zeros(0, len(processor.mode), 1, 1, dtype=torch.uint8)}


def _decode(file: bytes, number: int) -> Image.Image:
    """Return the image in `file`, turned as its EXIF data say, as Transformers' pipelines open it.

    Raises TableError for an invalid image, and for one of more than 8 bits, whose values Pillow would cut to 255.
    """
    name = f"image {number} (counted from 0, without rows that lack image or label)"
    try:
        opened = Image.open(io.BytesIO(file))
        opened.load()
        image = ImageOps.exif_transpose(opened)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # all of them for broken files
        raise TableError(f"{name} cannot be decoded: {error}", "an image of its file cannot be decoded") from error
    if image.mode.startswith(("I", "F")):
        bits = "16" if image.mode.startswith("I;16") else "32"
        raise TableError(
            f"{name} has {bits} bits per pixel (Pillow's mode {image.mode}); convert it to 8 bits",
            f"an image of its file has {bits} bits per pixel; convert it to 8 bits",
        )
    return image


def blank_images(base: PreTrainedModel, number: int) -> dict[str, Tensor]:
    """Return `number` black images as inputs of the image model `base`."""
    size, channels = base.config.image_size, base.config.num_channels
    shape = (size, size) if isinstance(size, int) else tuple(size)
    return {"pixel_values": torch.zeros(number, channels, *shape, dtype=base.dtype, device=base.device)}
