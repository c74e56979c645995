"""The classifier of Transformers that computes what an adapted model computes, if there is one.

Transformers' classifiers differ in the path from hidden states to labels: BERT's has the pooler and a linear layer,
RoBERTa's one layer more, none takes the mean over tokens. No table of models is needed: a classifier can take a body
and a head if it has no further weights, and if its features equal the task's.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from copra_fl.models.adapted import AdaptedModel
from copra_fl.tasks.images import blank_images


@dataclass(frozen=True)
class Classifier:
    """A classifier of Transformers that shares body and head with an adapted model.

    Attributes:
        model: the classifier; on the meta device, except for body and head.
        body: name of the module in it that gives the hidden states.
        head: name of its linear layer on the features.
        weights: names of the tensors that a file with its weights has; `body` can have more.
    """

    model: PreTrainedModel
    body: str
    head: str
    weights: frozenset[str]


def stock_classifier(model: AdaptedModel, head: nn.Linear | None, labels: Sequence[str]) -> Classifier | None:
    """Return the classifier of Transformers with the body of `model` and `head`; None if no class computes the same.

    The gates of `model` must be open.
    """
    if head is None or model.task.classifier_class is None:
        return None
    body: Any = model.base.base_model
    config = copy.deepcopy(body.config)
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: number for number, label in enumerate(labels)}
    if model.task.labels == "several":
        config.problem_type = "multi_label_classification"
    try:
        with torch.device("meta"):
            classifier = model.task.classifier_class.from_config(config)
        name = classifier.base_model_prefix
        places = [path for path, module in classifier.named_modules() if _is_head(path, module, name, head)]
        others = {path for path, _ in classifier.named_parameters() if not path.startswith(f"{name}.")}
        if type(getattr(classifier, name)) is not type(body) or len(places) != 1:
            return None
        (place,) = places
        if others != {f"{place}.{path}" for path, _ in head.named_parameters()}:
            return None
        weights = frozenset(classifier.state_dict())
        setattr(classifier, name, body)
        classifier.set_submodule(place, nn.Identity())
        if not has_the_features(classifier.eval(), model):
            return None
        classifier.set_submodule(place, head)
    except Exception:  # a class that cannot be built or run like this raises errors of many types
        return None
    return Classifier(classifier, name, place, weights)


def _is_head(path: str, module: nn.Module, body: str, head: nn.Linear) -> bool:
    is_outside = not f"{path}.".startswith(f"{body}.")
    return is_outside and isinstance(module, nn.Linear) and module.weight.shape == head.weight.shape


@torch.inference_mode()
def has_the_features(classifier: Any, model: AdaptedModel) -> bool:
    """Return whether `classifier`, without its head, gives the features of the task for two examples, one padded."""
    batch = _two_examples(model)
    if "input_ids" in batch:
        classifier.config.pad_token_id = _padding(model)
    features = model.task.features(model.base.base_model(**model.task.inputs(batch)), batch, model.pooling)
    others = classifier(**batch).logits
    return features.shape == others.shape and torch.allclose(features.to(others.dtype), others, rtol=1e-4, atol=1e-5)


def _padding(model: AdaptedModel) -> int:
    padding = model.base.config.pad_token_id if hasattr(model.base.config, "pad_token_id") else None
    return 0 if padding is None else int(padding)


def _two_examples(model: AdaptedModel) -> dict[str, Tensor]:
    if model.base.main_input_name == "pixel_values":
        images = blank_images(model.base, 2)["pixel_values"]
        ramp = torch.linspace(-1, 1, images.numel(), dtype=images.dtype, device=images.device)
        return {"pixel_values": ramp.view(images.shape)}
    padding = _padding(model)
    tokens = [number for number in range(13) if number != padding][:12]
    input_ids = torch.tensor([tokens[:6], [*tokens[6:10], padding, padding]], device=model.device)
    return {"input_ids": input_ids, "attention_mask": (input_ids != padding).long()}
