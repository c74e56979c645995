"""Image classification with one label per image: logits = head(pool(encoder(patches)))."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import AutoModelForImageClassification

from copra_fl.config import DataConfig
from copra_fl.sources.tables import codes
from copra_fl.tasks.classification import Classification
from copra_fl.tasks.images import ImageProcessor, Images, encode_images, read_images

if TYPE_CHECKING:  # slow to import, and needed only if the cache is empty
    import pandas as pd


class ImageClassification(Classification):
    columns = ("image-column", "label-column")
    names_files = True
    processor_class = ImageProcessor
    classifier_class = AutoModelForImageClassification
    pipeline = "image-classification"
    version = 2

    def content(self, column: pd.Series, folder: Path) -> pd.Series:
        return read_images(column, folder)

    def processor_digest(self, processor: ImageProcessor) -> str:
        return processor.digest

    def encode(self, rows: pd.DataFrame, labels: list[str], processor: Any, data: DataConfig) -> dict[str, Tensor]:
        return {"labels": codes(rows["label-column"], labels), **encode_images(processor, rows["image-column"])}

    def examples(self, tensors: Mapping[str, Tensor], processor: Any, data: DataConfig) -> Images:
        return Images(tensors["pixels"], tensors["labels"], processor)


TASK = ImageClassification()
