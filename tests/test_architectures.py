"""The table in docs/how-to/choose-a-model.md holds: plain PEFT and stacked engine agree on each architecture."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from copra_fl import events
from copra_fl.adapters.state import Adapter
from copra_fl.config import Config
from copra_fl.copra.gates import Gates
from copra_fl.data.federated import load_data
from copra_fl.models.adapted import AdaptedModel
from copra_fl.models.build import build_model, load_processor
from copra_fl.models.fed_sb_init import base_gradients
from copra_fl.tasks.text_classification import TextClassification
from copra_fl.training.stacked import NotStackable, StackedModel
from copra_fl.training.stacked.step import Stack, Step
from tests.support.local_grid import run_federation
from tests.support.tiny import Settings

NUM_BLOCKS, NUM_LABELS = 3, 3
#: a batch of 8 rows: equal to the number of tokens and of DeBERTa's relative positions, so that confusing them fails
NUM_CLIENTS, ROWS_EACH, NUM_TOKENS = 4, 2, 8
SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": NUM_BLOCKS,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
TEXT = SIZES | {"vocab_size": 30, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
IMAGE = SIZES | {"image_size": 8, "patch_size": 4}
DEBERTA = TEXT | {
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_buckets": NUM_TOKENS // 2,
    "max_relative_positions": 16,
}
GROUPED_QUERIES = TEXT | {"num_key_value_heads": 1}
T5 = {"vocab_size": 30, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": NUM_BLOCKS, "num_heads": 2}
BASES: dict[str, Callable[[], Any]] = {
    "BERT": lambda: tf.BertModel(tf.BertConfig(**TEXT)),
    "RoBERTa": lambda: tf.RobertaModel(tf.RobertaConfig(**TEXT)),
    "DistilBERT": lambda: tf.DistilBertModel(
        tf.DistilBertConfig(vocab_size=30, dim=16, n_layers=NUM_BLOCKS, n_heads=2, hidden_dim=24)
    ),
    "DeBERTa-v2, v3": lambda: tf.DebertaV2Model(tf.DebertaV2Config(**DEBERTA)),
    "Llama": lambda: tf.LlamaModel(tf.LlamaConfig(**GROUPED_QUERIES)),
    "Qwen2": lambda: tf.Qwen2Model(tf.Qwen2Config(**GROUPED_QUERIES)),
    "Qwen3": lambda: tf.Qwen3Model(tf.Qwen3Config(**GROUPED_QUERIES, head_dim=8)),
    "ViT": lambda: tf.ViTModel(tf.ViTConfig(**IMAGE)),
    "DINOv2": lambda: tf.Dinov2Model(tf.Dinov2Config(**IMAGE)),
    "CLIP, vision tower": lambda: tf.CLIPVisionModel(tf.CLIPVisionConfig(**IMAGE)),
    "CLIP, text tower": lambda: tf.CLIPTextModel(tf.CLIPTextConfig(**TEXT)),
    "CLIP": lambda: tf.CLIPModel(tf.CLIPConfig(text_config=TEXT, vision_config=IMAGE, projection_dim=16)),
    "GPT-2": lambda: tf.GPT2Model(
        tf.GPT2Config(vocab_size=30, n_embd=16, n_layer=NUM_BLOCKS, n_head=2, bos_token_id=1, eos_token_id=2)
    ),
    "ModernBERT": lambda: tf.ModernBertModel(tf.ModernBertConfig(**TEXT, cls_token_id=1, sep_token_id=2)),
    "T5": lambda: tf.T5Model(tf.T5Config(**T5)),
}
TABLE = {
    name: (groups.replace("`", "").split(", "), targets.split(","), engine)
    for name, groups, targets, engine in re.findall(
        r"^\| ([^|]+) \| (`[^|]+`) \| `([^|]+)` \| (\w+) \|$",
        (Path(__file__).parent.parent / "docs" / "how-to" / "choose-a-model.md").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
}
STACKED = [name for name, (_, _, engine) in TABLE.items() if engine == "stacked"]


class Mean(TextClassification):
    """Classification of texts or images by the mean of their hidden states."""

    def features(self, output: Any, batch: Any, pooling: str) -> Tensor:
        return output.last_hidden_state.mean(1)


def adapted(base: Any, targets: list[str], use_dora: bool = False) -> Any:
    """Return PEFT's model on `base` in float64, with random adapters, because initially B = 0."""
    lora = LoraConfig(r=2, lora_alpha=6, target_modules=targets, use_dora=use_dora)
    peft = get_peft_model(base, lora).double().eval()
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    return peft


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def make_inputs(base: Any, rows: int) -> dict[str, Tensor]:
    """Return random images, or texts of different lengths, or both."""
    modalities = base.input_modalities
    images = {"pixel_values": torch.randn(rows, 3, 8, 8, dtype=torch.float64)}
    tokens = torch.randint(3, 30, (rows, NUM_TOKENS))
    mask = (torch.arange(NUM_TOKENS) <= torch.arange(rows)[:, None] % 5 + 3).long()
    texts = {"input_ids": tokens * mask, "attention_mask": mask}
    if isinstance(base, tf.T5Model):
        texts["decoder_input_ids"] = tokens[:, :4]
    return (images if "image" in modalities else {}) | (texts if "text" in modalities else {})


def result(output: Any) -> Tensor:
    """Return an output that depends on all blocks."""
    return output.logits_per_image if "logits_per_image" in output else output.last_hidden_state


def switched_off(peft: Any, groups: Sequence[str], mask: Sequence[bool]) -> Any:
    """Return a copy of PEFT's model with B = 0 in the groups that are off, where W0 + s B A is then W0."""
    twin = copy.deepcopy(peft)
    for name, parameter in twin.named_parameters():
        if "lora_B" in name and any(f".{group}." in name for group, on in zip(groups, mask, strict=True) if not on):
            nn.init.zeros_(parameter)
    return twin


def expected_groups(name: str) -> list[str]:
    return [path.replace("N", str(i)) for path in TABLE[name][0] for i in range(NUM_BLOCKS)]


def test_the_table_has_every_architecture() -> None:
    assert TABLE.keys() == BASES.keys()


@pytest.mark.parametrize("name", BASES)
def test_gates_follow_the_blocks_and_switch_adapters_off(name: str) -> None:
    """There is one group per block, in the order in which they run (the order between towers is arbitrary).

    Oracle for groups that are off: plain PEFT with B = 0.
    """
    base, groups = BASES[name](), expected_groups(name)
    peft = adapted(base, TABLE[name][1])
    gates, inputs, order = Gates(base, "layer"), make_inputs(base, 3), list[str]()
    assert gates.names == groups
    for group in groups:
        base.get_submodule(group).register_forward_pre_hook(lambda *_, group=group: order.append(group))
    with torch.no_grad():
        whole = result(base(**inputs))
        for path in TABLE[name][0]:
            assert [group for group in order if group.startswith(path[:-1])] == [
                group for group in groups if group.startswith(path[:-1])
            ]
        for mask in np.random.default_rng(0).permuted([[True, False, True] * (len(groups) // 3)] * 3, axis=1):
            gates.open()
            expected = result(switched_off(peft, groups, mask)(**inputs))
            gates.set(mask)
            torch.testing.assert_close(result(base(**inputs)), expected, rtol=0, atol=1e-12)
            assert (expected - whole).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("name", "attention"),
    [(name, "eager") for name in STACKED] + [(name, "sdpa") for name in STACKED if not name.startswith("DeBERTa")],
)
def test_stacked_clients_get_the_gradients_of_plain_peft(name: str, attention: str) -> None:
    """Four clients, with their lowest active adapters in blocks 0, 1, 2 and none."""
    base, groups, targets = BASES[name](), expected_groups(name), TABLE[name][1]
    base.set_attn_implementation(attention)
    peft, head = adapted(base, targets), nn.Linear(16, NUM_LABELS).double()
    model = AdaptedModel(Mean(), peft, head, "mean", "layer", torch.device("cpu"))
    stacked = StackedModel(model)
    on = np.array([[True, False, True], [False, True, True], [False, False, True], [False, False, False]])
    assert stacked.depth(on).tolist() == [0, 1, 2, 3]
    batch = make_inputs(base, NUM_CLIENTS * ROWS_EACH) | {"labels": torch.arange(8) % NUM_LABELS}
    stack = Stack(stacked.layout, 0.3 * torch.randn(NUM_CLIENTS, stacked.layout.size).double(), {"A", "B", "head"})
    adapters = [stacked.layout.unflatten(values) for values in stack.values.detach().clone()]
    step = Step(stack, on, stacked.depth(on), torch.ones(NUM_CLIENTS).double())
    losses = model.task.losses(stacked(step, batch), batch).view(NUM_CLIENTS, ROWS_EACH).mean(1)
    stack.backward(losses.sum())
    for client, (adapter, mask) in enumerate(zip(adapters, on, strict=True)):
        client_batch = {key: tensor[client * ROWS_EACH : (client + 1) * ROWS_EACH] for key, tensor in batch.items()}
        loss, gradients = alone(peft, adapter, groups, mask, client_batch)
        torch.testing.assert_close(losses[client], loss, rtol=1e-9, atol=0)
        got = stacked.layout.unflatten(stack.grads[client])
        for key, expected in gradients.items():
            torch.testing.assert_close(got[key], expected, rtol=1e-9, atol=1e-12)
        assert all(not got[key].any() for key in got.keys() - gradients.keys())


def alone(
    peft: Any, adapter: Adapter, groups: list[str], mask: np.ndarray, batch: dict[str, Tensor]
) -> tuple[Tensor, Adapter]:
    """Return a client's loss and the gradients of its active adapters with PEFT's model, B = 0 in inactive groups."""
    model = copy.deepcopy(peft)
    parameters = {name.replace(".default.", "."): tensor for name, tensor in model.named_parameters()}
    for name in adapter.keys() & parameters.keys():
        parameters[name].data.copy_(adapter[name])
    model = switched_off(model, groups, mask)
    open_groups = [group for group, on in zip(groups, mask, strict=True) if on]
    trained = {
        name.replace(".default.", "."): tensor
        for name, tensor in model.named_parameters()
        if "lora_" in name and any(f".{group}." in name for group in open_groups)
    } | {name: adapter[name].clone().requires_grad_() for name in ("head.weight", "head.bias")}
    inputs = {key: tensor for key, tensor in batch.items() if key != "labels"}
    features = model(**inputs).last_hidden_state.mean(1)
    loss = F.cross_entropy(F.linear(features, trained["head.weight"], trained["head.bias"]), batch["labels"])
    return loss, dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))


#: base, target, and the reason why it cannot be stacked
REFUSED: dict[str, tuple[Callable[[], Any], str, str]] = {
    "GPT-2": (BASES["GPT-2"], "c_attn", r"h\.0\.attn\.c_attn is a Conv1D in PEFT's Linear"),
    "T5": (BASES["T5"], "q", r"in 2 lists: decoder\.block, encoder\.block"),
    "CLIP": (BASES["CLIP"], "q_proj", r"in 2 lists: text_model\.encoder\.layers, vision_model"),
    "ModernBERT": (BASES["ModernBERT"], "Wqkv", r"layers\.1 and layers\.0 get different inputs"),
    "T5 encoder": (
        lambda: tf.T5EncoderModel(tf.T5Config(**T5)),
        "q",
        r"encoder\.block\.1 and encoder\.block\.0 get different inputs",
    ),
    "Qwen2 with sliding windows": (
        lambda: tf.Qwen2Model(
            tf.Qwen2Config(**GROUPED_QUERIES, use_sliding_window=True, sliding_window=4, max_window_layers=1)
        ),
        "q_proj",
        r"layers\.1 and layers\.0 get different inputs \(attention_mask\)",
    ),
    "DeBERTa with a convolution": (
        lambda: tf.DebertaV2Model(tf.DebertaV2Config(**DEBERTA, conv_kernel_size=3)),
        "query_proj",
        r"the input of encoder\.layer\.1 is not the output of encoder\.layer\.0",
    ),
    "Bloom": (
        lambda: tf.BloomModel(tf.BloomConfig(vocab_size=30, hidden_size=16, n_layer=3, n_head=2)),
        "query_key_value",
        r"its blocks in h return more than hidden states",
    ),
    "XLNet": (
        lambda: tf.XLNetModel(tf.XLNetConfig(vocab_size=30, d_model=16, n_layer=3, n_head=2, d_inner=24)),
        "layer_1",
        r"an input of its blocks \(0\) is \(4, 1, 16\) for one example and \(4, 2, 16\) for two",
    ),
}


def stacking_error(base: Any, target: str, use_dora: bool = False) -> str:
    peft, head = adapted(base, [target], use_dora), nn.Linear(16, NUM_LABELS).double()
    with pytest.raises(NotStackable) as caught:
        StackedModel(AdaptedModel(Mean(), peft, head, "mean", "layer", torch.device("cpu")))
    return str(caught.value)


@pytest.mark.parametrize("name", REFUSED)
def test_a_base_that_cannot_be_stacked_gives_the_reason(name: str) -> None:
    make, target, reason = REFUSED[name]
    assert re.search(reason, stacking_error(make(), target))


def test_dora_cannot_be_stacked() -> None:
    assert stacking_error(BASES["BERT"](), "query", use_dora=True).endswith(
        "query has DoraLinearVariant, not plain LoRA"
    )


@pytest.fixture(scope="module")
def gpt2(tiny: Settings, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Settings of a federation on a GPT-2, whose linear layers store transposed weights."""
    directory = str(tmp_path_factory.mktemp("tiny-gpt2"))
    tf.AutoTokenizer.from_pretrained(str(tiny["model"])).save_pretrained(directory)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tf.GPT2Model(tf.GPT2Config(vocab_size=41, n_embd=16, n_layer=2, n_head=2)).save_pretrained(directory)
    return tiny | {"model": directory, "target-modules": "c_attn,c_proj", "local-steps": 2, "num-rounds": 1}


def test_a_run_that_cannot_stack_notes_it_and_trains_with_plain_peft(
    gpt2: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(events.VARIABLE, str(tmp_path / "events"))
    runs = [run_federation(gpt2 | {"engine": engine}, tmp_path / engine) for engine in ("stacked", "peft")]
    line = "clients train one by one: engine = 'stacked' cannot take this model: h.0.attn.c_attn is a Conv1D"
    noted, plain = (json.loads((run / "provenance.json").read_text())["start"]["engine"] for run in runs)
    assert noted.startswith(line) and plain == "peft"
    sent = [json.loads(event) for event in (tmp_path / "events").read_text().splitlines()]
    assert [event["text"] for event in sent if event["event"] == "note"] == [noted]
    adapters = [load_file(run / "adapter" / "adapter_model.safetensors") for run in runs]
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])
    assert any(tensor.any() for name, tensor in adapters[0].items() if "lora_B" in name)


def test_gradients_of_gpt2s_transposed_weights_have_the_shape_of_a_linear_layer(gpt2: Settings) -> None:
    """With B = 0, PEFT's gradient of B is s G A^T for the gradient G (d, k) of W0."""
    config = Config.from_flat(gpt2)
    examples = load_data(config, load_processor(config.model)).examples
    model, indices = build_model(config.model, "layer", 3, seed=0), np.arange(6)
    gradients = base_gradients(model, examples, indices, 6)
    parameters = model.train_only({"A", "B"})
    model.losses(examples.batch(indices)).mean().backward()
    for module, gradient in gradients.items():
        a, b = (parameters[f"{module}.lora_{part}.weight"] for part in "AB")
        torch.testing.assert_close(b.grad, config.model.scaling(2) * gradient @ a.T)
