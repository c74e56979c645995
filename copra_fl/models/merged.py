"""Write a model with its adapter merged into the weights, for Transformers alone.

task with a head, and Transformers has a class with the same head    that class, as BertForSequenceClassification
task with another head                                               `PooledClassifier`, with its code in the folder
language model                                                       its own class
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from copra_fl.config import ConfigError
from copra_fl.files import copy_permissions
from copra_fl.models.adapted import AdaptedModel
from copra_fl.models.card import ModelFacts, Training, write_merged_card
from copra_fl.models.classifier import has_the_features, stock_classifier
from copra_fl.models.export import load, require_dataset
from copra_fl.models.own_logits import logit_cap, logit_factor
from copra_fl.models.pooled_classifier import PooledClassifier, PooledClassifierConfig


def export_merged(
    adapter: Path,
    directory: Path,
    dtype: str,
    base: str = "",
    training: Training | None = None,
    dataset: str = "",
) -> PreTrainedModel:
    """Merge the adapter folder `adapter` into its base, write the model to the folder `directory`, and return it.

    The weights are safetensors in `dtype`. Those of a quantized base are the ones that it computed with, dequantized.

    Args:
        base: as in `load`.
        training: of the model, for its card.
        dataset: as in `load`; a model of several data sets needs one.

    Raises ConfigError as `load` and `require_dataset` do, and for features or logits that no class computes.
    """
    require_dataset(adapter, dataset)
    saved = load(adapter, "cpu", base, dtype, dataset)
    model, source = saved.model, str(saved.model.base.name_or_path)
    facts = ModelFacts(model.task, saved.labels, saved.base, model.pooling, saved.quantization, training)
    if model.task.trains_head:
        head, processor = model.head, model.task.processor_class.from_pretrained(source)
    else:
        head = _own_head(model, saved.processor)
        processor = saved.processor
    merged: PreTrainedModel = model.base
    weights: Collection[str] | None = None
    if head is not None:
        merged, weights = _classifier(model, head, saved.labels)
        processor = model.task.classifier_processor(processor, int(saved.data.get("max-length", 0)))
        merged.config.pad_token_id = getattr(processor, "pad_token_id", None)
    _untie_adapted_output(model.base)
    model.peft.merge_and_unload(safe_merge=True)  # safe: W0, which other processes map, is not written to
    merged.to(getattr(torch, dtype))
    merged.config.use_cache = getattr(AutoConfig.from_pretrained(source), "use_cache", True)
    tensors = merged.state_dict()
    merged.save_pretrained(directory, state_dict={name: tensors[name] for name in weights} if weights else None)
    processor.save_pretrained(directory)
    write_merged_card(directory, facts, dtype, isinstance(merged, PooledClassifier))
    copy_permissions(directory / "README.md", directory.glob("*.safetensors"))
    return merged


def _untie_adapted_output(base: PreTrainedModel) -> None:
    """Give an output layer that has an adapter its own weights, so that merging leaves the input embedding as it is."""
    output: Any = base.get_output_embeddings()
    if isinstance(output, LoraLayer) and output.weight is base.get_input_embeddings().weight:
        output.get_base_layer().weight = nn.Parameter(output.weight.detach().clone(), requires_grad=False)
        base.config.tie_word_embeddings = False


def _own_head(model: AdaptedModel, processor: Any) -> nn.Linear | None:
    """Return the task's rows of the base's own output layer (`Task.frozen_head`) as they give the base's own logits.

    Raises ConfigError for rows of a base that caps its logits, which no classifier does.
    """
    head = model.task.frozen_head(model.base.get_output_embeddings(), processor)
    if head is None:
        return None
    if cap := logit_cap(model.base.config):
        raise ConfigError(
            f"this model caps its logits at {cap:g} (tanh), as no classifier of Transformers does; leave out --merge: "
            "copra_fl.load opens the adapter"
        )
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.mul_(logit_factor(model.base.config))
    return head


def _classifier(
    model: AdaptedModel, head: nn.Linear, labels: Sequence[str]
) -> tuple[PreTrainedModel, Collection[str] | None]:
    """Return the classifier with the body of `model` and `head`, and the names of its weights; None: all of them."""
    if stock := stock_classifier(model, head, labels):
        return stock.model, stock.weights
    settings = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    if model.task.labels == "several":
        settings["problem_type"] = "multi_label_classification"
    base = {key: value for key, value in model.base.config.to_dict().items() if key != "_name_or_path"}
    config = PooledClassifierConfig(base=base, pooling=model.pooling, **settings)
    with torch.device("meta"):
        pooled: Any = PooledClassifier(config)
    pooled.base, pooled.classifier = model.base, nn.Identity()
    if not model.task.trains_head or not has_the_features(pooled.eval(), model):
        raise ConfigError(
            f"task = {model.task.name!r} pools the hidden states of this model as no class of Transformers does; leave "
            "out --merge: copra_fl.load opens the adapter"
        )
    pooled.classifier = head
    PooledClassifierConfig.register_for_auto_class()
    PooledClassifier.register_for_auto_class(model.task.classifier_class.__name__)
    return pooled, None
