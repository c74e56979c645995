"""Model cards of adapter folders and merged models: base, data, method, results, and code that loads the model."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import EvalResult, ModelCardData

from copra_fl.config import Config
from copra_fl.files import atomic_write
from copra_fl.models.base_reference import BaseReference
from copra_fl.records import Evaluation, RunSummary
from copra_fl.reporting.results import method_name, without_folder
from copra_fl.sources.assets import ASSETS
from copra_fl.sources.tables import dataset_name
from copra_fl.tasks import Task

#: labels that a card lists; it counts the others
MAX_LABELS = 30
#: words in the code of a card that stand for the folder of the card, and for that of a base that is not on the hub
FOLDER, BASE = "FOLDER", "BASE"


class Training(NamedTuple):
    """The finished run that a model comes from."""

    config: Config
    summary: RunSummary


@dataclass(frozen=True)
class ModelFacts:
    """Facts about a model that its card states.

    Attributes:
        task: of the model.
        labels: in the order of the logits.
        base: of the model.
        pooling: of the hidden states, for a head.
        quantization: of the base in training.
        training: None for a model whose run is not known.
        datasets: names of the data sets of a model of several; else empty.
    """

    task: Task
    labels: list[str]
    base: BaseReference
    pooling: str
    quantization: str
    training: Training | None
    datasets: Collection[str] = ()


def write_adapter_card(directory: Path, facts: ModelFacts, rank: int, classifier: str) -> None:
    """Write the card of an adapter folder. `classifier` is the class that has its head; empty if no class has it."""
    if classifier:
        code = _classifier_code(facts, classifier)
    elif facts.task.trains_head:
        code = _features_code(facts)
    else:
        code = _language_model_code(facts)
    intro = f"A LoRA adapter of rank {rank} in PEFT's format."
    if classifier:
        intro += f" Its head is in the adapter, for `{classifier}`."
    elif facts.task.trains_head:
        intro += (
            " Its head is in `head.safetensors`. No class of Transformers has this head, so `pipeline` cannot open the "
            "adapter; it opens the model that `copra-fl export --merge` writes."
        )
    if facts.training and rank != facts.training.config.model.rank:
        intro += (
            " It holds all that aggregation has added to the frozen weights; `copra-fl export --merge` writes weights "
            "with these additions instead."
        )
    if facts.datasets:
        intro += (
            f" Its labels are those of several data sets ({', '.join(facts.datasets)}): compare the scores of one data "
            "set alone, or write the model of one with `copra-fl export --dataset NAME`."
        )
    tags = ["lora", *([f"base_model:adapter:{facts.base.name}"] if facts.base.is_on_hub else []), "transformers"]
    load = f'from copra_fl import load\n\nsaved = load("{FOLDER}")  # base="PATH" if the base lies elsewhere\n'
    words = f"`{FOLDER}` stands for this folder"
    if not facts.base.is_on_hub:
        command = f" (`copra-fl assets path {facts.base.asset}` prints it)" if facts.base.asset else ""
        words += f", `{BASE}` for the folder of the base{command}"
    ways = f"{words}. With copra-fl:\n\n```python\n{load}```\n\nWith PEFT alone:\n\n```python\n{code}```"
    _write(directory, facts, "peft", tags, intro, ways)


def write_merged_card(directory: Path, facts: ModelFacts, dtype: str, needs_code: bool) -> None:
    """Write the card of a merged model in `dtype`. `needs_code`: Transformers opens it with code in the folder."""
    intro = f"A Transformers model, with the adapter merged into its weights, in {dtype}."
    if needs_code:
        intro += (
            " No class of Transformers has this head; `pooled_classifier.py` in the folder defines the model, so it "
            "needs `trust_remote_code=True`."
        )
    ways = f"`{FOLDER}` stands for this folder:\n\n```python\n{_pipeline_code(facts, needs_code)}```"
    _write(directory, facts, "transformers", [], intro, ways)


def _write(directory: Path, facts: ModelFacts, library: str, tags: list[str], intro: str, ways: str) -> None:
    base = facts.base
    is_language_model = library == "peft" and facts.task.peft_type == "CAUSAL_LM"
    pipeline = "text-generation" if is_language_model else facts.task.pipeline
    license_name = ASSETS[base.asset].license if base.asset else ""
    results = _results(facts)
    data = ModelCardData(
        base_model=base.name if base.is_on_hub else None,
        datasets=[name for name in _datasets(facts.training) if "/" in name] or None,
        eval_results=results or None,
        license=license_name.lower() or None,
        library_name=library,
        model_name=_title(facts) if results else None,
        pipeline_tag=pipeline,
        tags=[*tags, "copra-fl", "federated-learning"],
    )
    text = [
        f"---\n{data.to_yaml()}\n---\n",
        f"# {_title(facts)}\n",
        f"{intro}\n",
        "## Model\n",
        _table(_model_rows(facts)),
        *(["## Training\n", _table(_training_rows(facts.training))] if facts.training else []),
        *(["## Results\n", _table(_result_rows(facts.training.summary))] if facts.training else []),
        "## Use\n",
        f"{ways}\n",
        "## License\n",
        f"{f'The base: {license_name}.' if license_name else 'That of the base model applies.'} The terms of the "
        "training data apply too.",
    ]
    atomic_write(directory / "README.md", "\n".join(text) + "\n")


def _title(facts: ModelFacts) -> str:
    learned = f" for {', '.join(names)}" if (names := _datasets(facts.training)) else ""
    return f"{facts.base.name.rsplit('/', 1)[-1]}{learned}, fine-tuned by federated learning"


def _datasets(training: Training | None) -> list[str]:
    """Return the names of the data sets, without the folders of files."""
    if training is None:
        return []
    return [without_folder(dataset_name(dataset)) for dataset in training.config.data.datasets]


def _results(facts: ModelFacts) -> list[EvalResult]:
    """Return the accuracy on the test set of each data set in the form of the hub."""
    if facts.training is None or facts.training.summary.test is None:
        return []
    test, kind = facts.training.summary.test, facts.task.pipeline
    return [
        EvalResult(kind, name, name, "accuracy", round(evaluation.accuracy, 4), dataset_split="test")
        for name, evaluation in (test.datasets or {", ".join(_datasets(facts.training)): test}).items()
    ]


def _model_rows(facts: ModelFacts) -> dict[str, str]:
    base, task = facts.base, facts.task
    rows = {
        "base": base.name if base.is_on_hub or base.asset else f"a model in a folder called `{Path(base.name).name}`"
    }
    if base.revision:
        rows["revision of the base"] = base.revision
    if base.asset:
        difference = ASSETS[base.asset].hub_difference
        rows["base as an asset of copra-fl"] = base.asset + (
            f"; its weights differ from the hub's: {difference}" if difference else ""
        )
    rows["SHA-256 of the base's weights"] = f"`{base.sha256}`"
    if facts.quantization != "none":
        rows["base in training"] = f"quantized, {facts.quantization}"
    rows["task"] = task.name
    if facts.labels:
        listed = ", ".join(facts.labels[:MAX_LABELS])
        more = f" and {len(facts.labels) - MAX_LABELS} more" if len(facts.labels) > MAX_LABELS else ""
        rows[f"labels ({len(facts.labels)})"] = listed + more
    if task.trains_head:
        rows["pooling"] = facts.pooling
    return rows


def _training_rows(training: Training) -> dict[str, str]:
    config, summary = training
    data, model, federation = config.data, config.model, config.federation
    rows = {
        "data": ", ".join(_datasets(training)) or "the nodes' own",
        "clients": f"{data.num_clients or len(summary.clients)}, split by `partitioner = {data.partitioner}`",
        "method": f"{method_name(config)} (local training {summary.method}, rule {summary.rule})",
        "rounds": f"{summary.rounds}{f', ended early: {summary.ended_early}' if summary.ended_early else ''}",
        **_local_training(config),
        "adapter": f"rank {model.rank}, alpha {model.lora_alpha:g}, modules {model.target_modules}"
        f"{', DoRA' if model.dora else ''}",
        "seed": str(federation.seed),
        "compute": f"{model.dtype}, attention {model.attention}",
    }
    if summary.privacy:
        spent = summary.privacy
        rows["differential privacy of clients"] = f"epsilon {spent.epsilon:.3g} at delta {spent.delta:g}"
    if config.privacy.secure_aggregation:
        rows["secure aggregation"] = "yes"
    return rows


def _local_training(config: Config) -> dict[str, str]:
    """Return the rows on the work of a client in a round."""
    training = config.training
    if training.engine == "trainer":
        return {"local work": f"{training.local_steps} steps of the Trainer of {Path(training.script).name}"}
    batch, micro_batches = training.batch_size, training.gradient_accumulation
    factors = f" (batch-size {batch} x gradient-accumulation {micro_batches})" if micro_batches > 1 else ""
    steps = f"{training.local_steps} steps of {batch * micro_batches} examples{factors}"
    rate = training.head_learning_rate if config.copra.local_training == "head" else training.learning_rate
    return {
        "local work": f"{training.local_epochs} epochs" if training.local_epochs else steps,
        "optimizer": f"{training.optimizer}, learning rate {rate:g}",
    }


def _result_rows(summary: RunSummary) -> dict[str, str]:
    rows = {}
    for name, evaluation in (
        ("test set", summary.test),
        ("clients held out whole", summary.held_out),
        ("server's validation set", summary.validation),
    ):
        if evaluation is not None:
            rows[name] = _metrics(evaluation)
            rows |= {f"{name}, {dataset}": _metrics(part) for dataset, part in evaluation.datasets.items()}
    if summary.clients:
        total = sum(client.examples for client in summary.clients)
        mean = sum(client.accuracy * client.examples for client in summary.clients) / max(total, 1)
        evaluated = f"{total} examples of {len(summary.clients)} clients"
        rows["clients' validation examples"] = f"accuracy {mean:.4f} over {evaluated}"
    return rows


def _metrics(evaluation: Evaluation) -> str:
    others = "".join(f", {name} {value:.4g}" for name, value in evaluation.metrics.items())
    return f"accuracy {evaluation.accuracy:.4f}, loss {evaluation.loss:.4f}{others} over {evaluation.examples} examples"


def _table(rows: dict[str, str]) -> str:
    lines = [f"| {name} | {value.replace('|', chr(92) + '|')} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines]) + "\n"


def _source(base: BaseReference) -> str:
    """Return the place of the base in code: its name on the hub, or a word for its folder."""
    return base.name if base.is_on_hub else BASE


def _classifier_code(facts: ModelFacts, classifier: str) -> str:
    auto, processor, argument = {
        "text-classification": ("AutoModelForSequenceClassification", "AutoTokenizer", "tokenizer"),
        "image-classification": ("AutoModelForImageClassification", "AutoImageProcessor", "image_processor"),
    }[facts.task.pipeline]
    return f"""import json
from pathlib import Path

from peft import PeftModel
from transformers import {auto}, {processor}, pipeline

labels = json.loads(Path("FOLDER/task.json").read_text())["labels"]
names = {{"id2label": dict(enumerate(labels)), "label2id": {{label: i for i, label in enumerate(labels)}}}}
base = {auto}.from_pretrained("{_source(facts.base)}", **names)  # a {classifier}
model = PeftModel.from_pretrained(base, "FOLDER").eval()
run = pipeline("{facts.task.pipeline}", model=model, {argument}={processor}.from_pretrained("FOLDER"))
"""


def _features_code(facts: ModelFacts) -> str:
    mean = "hidden.mean(1)"
    if facts.task.pipeline == "text-classification":
        mean = '(hidden * (mask := inputs["attention_mask"].unsqueeze(-1))).sum(1) / mask.sum(1)'
    features = {"mean": mean, "cls": "hidden[:, 0]", "pooler": "output.pooler_output.float()"}[facts.pooling]
    return f"""from peft import PeftModel
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModel

encoder = PeftModel.from_pretrained(AutoModel.from_pretrained("{_source(facts.base)}"), "FOLDER").eval()
head = load_file("FOLDER/head.safetensors")


def logits(**inputs):
    output = encoder(**inputs)
    hidden = output.last_hidden_state.float()
    features = {features}
    return F.linear(features, **head)
"""


def _language_model_code(facts: ModelFacts) -> str:
    return f"""from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{_source(facts.base)}"), "FOLDER").eval()
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
"""


def _pipeline_code(facts: ModelFacts, needs_code: bool) -> str:
    argument = ", trust_remote_code=True" if needs_code else ""
    call = {
        "text-classification": 'run("a text", truncation=True)',
        "image-classification": 'run("image.png")',
        "text-generation": 'run("a prompt")',
    }[facts.task.pipeline]
    return f"""from transformers import pipeline

run = pipeline("{facts.task.pipeline}", "FOLDER"{argument})
print({call})
"""
