"""Training of one client: layers that are off do not change, the others train as in a plain loop."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch.nn import functional as F

from copra_fl.config import Config, TrainingConfig
from copra_fl.data import federated
from copra_fl.data.federated import load_data
from copra_fl.models import adapted
from copra_fl.models.build import build_model, load_processor
from copra_fl.seeding import generator
from copra_fl.tasks.text_classification import LabeledTexts
from copra_fl.training import single
from copra_fl.training.batches import data_order
from copra_fl.training.optimizer import make_optimizer, set_learning_rates
from copra_fl.training.plan import Plan, Start, num_steps, num_trained
from copra_fl.training.single import train_client
from tests.support.tiny import NUM_LAYERS, Settings


@pytest.fixture
def model(tiny: Settings) -> adapted.AdaptedModel:
    return build_model(Config.from_flat(tiny).model, "layer", 3, seed=0)


def load(flat: Settings) -> tuple[Config, federated.FederatedData]:
    config = Config.from_flat(flat)
    return config, load_data(config, load_processor(config.model))


def batch_of(federated: federated.FederatedData) -> dict[str, torch.Tensor]:
    return federated.examples.batch(federated.train[0][:8])


def test_gates_follow_the_transformer_blocks(model: adapted.AdaptedModel) -> None:
    assert model.gates.names == [f"encoder.layer.{i}" for i in range(NUM_LAYERS)]
    assert sorted(model.group_of.values()) == sorted(list(range(NUM_LAYERS)) * 4), "query and value, A and B"


def test_a_closed_gate_equals_a_zero_product(model: adapted.AdaptedModel, tiny: Settings) -> None:
    """Oracle: B set to zero, which makes the product B A zero."""
    _, federated = load(tiny)
    batch = batch_of(federated)
    with torch.no_grad():
        for parameter in model.train_only({"A", "B"}).values():
            parameter.normal_(generator=torch.Generator().manual_seed(1))
        model.gates.set([True, False, True])
        gated = model(**batch)
        model.gates.open()
        for name, module in model.named_modules():
            if isinstance(module, LoraLayer) and ".layer.1." in name:
                module.lora_B["default"].weight.zero_()
        assert torch.allclose(model(**batch), gated, atol=1e-6)


def test_a_closed_layer_gets_no_gradient_and_nothing_below_the_lowest_open_one_is_in_the_graph(
    model: adapted.AdaptedModel, tiny: Settings
) -> None:
    _, federated = load(tiny)
    batch = batch_of(federated)
    model.gates.set([False, False, True])
    loss = F.cross_entropy(model(**batch), batch["labels"])
    loss.backward()
    for name, parameter in model.peft.named_parameters():
        if ".lora_" in name:
            assert (parameter.grad is not None) == (".layer.2." in name), name
    hidden = model.base(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
                           output_hidden_states=True).hidden_states  # fmt: skip
    assert [state.requires_grad for state in hidden] == [False, False, False, True]


def test_a_dropped_layers_tensors_moments_and_step_count_do_not_move(
    model: adapted.AdaptedModel, tiny: Settings
) -> None:
    """Two AdamW steps with weight decay; layer 1 is on in the first only."""
    config, federated = load(tiny)
    batch = batch_of(federated)
    settings = TrainingConfig(weight_decay=0.1)
    optimizer = make_optimizer(settings, model.train_only({"A", "B"}).values(), [])
    set_learning_rates(optimizer, settings, t=0.0)
    dropped = [p for n, p in model.peft.named_parameters() if ".layer.1." in n and ".lora_" in n]
    kept = [p for n, p in model.peft.named_parameters() if ".layer.2." in n and ".lora_B" in n]

    def step(mask: list[bool]) -> None:
        model.gates.set(mask)
        F.cross_entropy(model(**batch), batch["labels"]).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step([True, True, True])
    before = [(p.detach().clone(), {k: v.clone() for k, v in optimizer.state[p].items()}) for p in dropped]
    kept_before = [p.detach().clone() for p in kept]
    step([True, False, True])
    for parameter, (value, state) in zip(dropped, before, strict=True):
        assert torch.equal(parameter, value)
        assert optimizer.state[parameter]["step"] == 1
        assert all(torch.equal(optimizer.state[parameter][key], state[key]) for key in state)
    assert all(not torch.equal(p, value) for p, value in zip(kept, kept_before, strict=True))
    assert all(optimizer.state[p]["step"] == 2 for p in kept)


def train(model: adapted.AdaptedModel, flat: Settings, client: int = 0, server_round: int = 1) -> single.Update:
    config, federated = load(flat)
    start = Start(build_model(config.model, "layer", 3, seed=0).read_adapter())
    return train_client(model, federated, Plan(server_round, (client,), config), client, start)


def test_the_gradients_of_a_client_that_failed_before_are_gone(model: adapted.AdaptedModel, tiny: Settings) -> None:
    expected = train(model, tiny)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    again = train(model, tiny)
    assert all(torch.equal(tensor, expected.adapter[name]) for name, tensor in again.adapter.items())


def test_lora_training_equals_a_plain_training_loop(model: adapted.AdaptedModel, tiny: Settings) -> None:
    """Oracle: a loop on PEFT's model with one optimizer over all parameters."""
    flat = tiny | {"local-training": "lora", "max-grad-norm": 0.5, "weight-decay": 0.01, "head-learning-rate": 0.002}
    config, federated = load(flat)
    update = train(model, flat)
    plain = build_model(config.model, "layer", 3, seed=0)
    trainable = [p for p in plain.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=0.002, weight_decay=0.01)
    shuffled = generator(0, "order", 1, 0).permutation(federated.train[0])
    for step in range(3):
        batch = federated.examples.batch(shuffled[4 * step : 4 * step + 4])
        F.cross_entropy(plain(**batch), batch["labels"]).backward()
        torch.nn.utils.clip_grad_norm_(trainable, 0.5)
        optimizer.step()
        optimizer.zero_grad()
    for name, tensor in plain.read_adapter().items():
        assert torch.allclose(update.adapter[name], tensor, atol=1e-6), name


def test_accumulated_micro_batches_equal_one_large_batch(model: adapted.AdaptedModel, tiny: Settings) -> None:
    large = train(model, tiny | {"batch-size": 8, "p0": 1.0})
    accumulated = train(model, tiny | {"batch-size": 2, "gradient-accumulation": 4, "p0": 1.0})
    for name, tensor in large.adapter.items():
        assert torch.allclose(accumulated.adapter[name], tensor, atol=1e-5), name


def test_masks_do_not_shift_the_data_order(model: adapted.AdaptedModel, tiny: Settings, monkeypatch) -> None:
    def batches_seen(flat: Settings) -> list[list[int]]:
        seen = []
        original = LabeledTexts.batch

        def spy(self, indices, device="cpu"):
            seen.append(list(map(int, indices)))
            return original(self, indices, device)

        with monkeypatch.context() as patch:
            patch.setattr(LabeledTexts, "batch", spy)
            train(model, flat)
        return seen

    lora = batches_seen(tiny | {"local-training": "lora"})
    assert lora == batches_seen(tiny | {"local-training": "copra"})
    assert lora == batches_seen(tiny | {"local-training": "copra", "min-active": 1, "lora-dropout": 0.3})


def test_training_leaves_the_global_generators_alone(model: adapted.AdaptedModel, tiny: Settings) -> None:
    torch.manual_seed(5)
    np.random.seed(5)
    expected = torch.rand(1), np.random.rand()
    torch.manual_seed(5)
    np.random.seed(5)
    train(model, tiny | {"lora-dropout": 0.3})
    assert (torch.rand(1), np.random.rand()) == expected


def test_layers_never_on_are_not_sent(model: adapted.AdaptedModel, tiny: Settings) -> None:
    update = train(model, tiny | {"mask-scope": "round", "p0": 0.4}, client=1)
    assert set(update.active_steps) == {0, 3}, "the seed must have layers that are on and layers that are off"
    sent = {model.group_of[name] for name in update.adapter if name in model.group_of}
    assert sent == {group for group, steps in enumerate(update.active_steps) if steps}
    assert {"head.weight", "head.bias"} <= update.adapter.keys()


def test_rescale_divides_what_is_on_by_its_probability(model: adapted.AdaptedModel, tiny: Settings) -> None:
    """PEFT's scaling is alpha / r = 16 / 2 = 8, times 1 / p where the gate is open."""
    model.gates.set([True, True, False], scale=4.0)
    scalings = [m.scaling["default"] for m in model.modules() if isinstance(m, LoraLayer)]
    assert scalings == [32.0] * 4 + [8.0] * 2
    model.gates.open()
    assert {m.scaling["default"] for m in model.modules() if isinstance(m, LoraLayer)} == {8.0}


def test_group_module_has_a_gate_per_linear_module(tiny: Settings) -> None:
    model = build_model(Config.from_flat(tiny).model, "module", 3, seed=0)
    assert len(model.gates.names) == 2 * NUM_LAYERS


def test_bf16_base_keeps_adapters_in_float32(tiny: Settings) -> None:
    flat = tiny | {"dtype": "bfloat16"}
    model = build_model(Config.from_flat(flat).model, "layer", 3, seed=0)
    update = train(model, flat)
    assert {tensor.dtype for tensor in update.adapter.values()} == {torch.float32}
    assert model.peft.base_model.model.embeddings.word_embeddings.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("pooling", ["mean", "cls", "pooler"])
def test_poolings_and_all_linear(tiny: Settings, pooling: str) -> None:
    flat = tiny | {"pooling": pooling, "target-modules": "all-linear", "local-training": "lora"}
    model = build_model(Config.from_flat(flat).model, "layer", 3, seed=0)
    assert any("pooler" in name for name in model.group_of) == (pooling == "pooler")
    assert np.isfinite(train(model, flat).metrics["loss"])


def order(indices: np.ndarray, settings: TrainingConfig, lengths: np.ndarray | None = None) -> list[list[np.ndarray]]:
    lengths = np.ones(len(indices), int) if lengths is None else lengths
    return list(data_order(indices, lengths, settings, np.random.default_rng(0), np.random.default_rng(0)))


@pytest.mark.parametrize("num_examples", [2, 10, 17])
@pytest.mark.parametrize("epochs", [0, 1, 3])
def test_expected_work_is_the_number_of_examples_in_the_data_order(num_examples: int, epochs: int) -> None:
    settings = TrainingConfig(local_steps=4, local_epochs=epochs, batch_size=5, gradient_accumulation=2)
    steps = order(np.arange(num_examples), settings)
    assert num_trained(settings, num_examples) == sum(len(batch) for step in steps for batch in step)


def test_data_order_in_steps_and_epochs() -> None:
    indices = np.arange(10)
    by_steps = TrainingConfig(local_steps=4, batch_size=3, gradient_accumulation=2)
    steps = order(indices, by_steps)
    assert [[len(batch) for batch in step] for step in steps] == [[3, 3]] * 4
    seen = np.concatenate([batch for step in steps for batch in step])
    assert sorted(seen[:10]) == sorted(seen[10:20]) == list(range(10)), "each pass has every example once"
    by_epochs = TrainingConfig(local_epochs=2, batch_size=3, gradient_accumulation=2)
    steps = order(indices, by_epochs)
    assert len(steps) == num_steps(by_epochs, 10) == 4
    assert [len(batch) for batch in steps[-1]] == [2]
    assert sorted(np.concatenate([batch for step in steps for batch in step])) == sorted([*indices, *indices])
    small_client = order(np.arange(2), TrainingConfig(local_steps=2, batch_size=5))
    assert [len(batch) for step in small_client for batch in step] == [5, 5], "fewer examples than a batch"


@pytest.mark.parametrize("settings", [{"local_steps": 8}, {"local_epochs": 2}, {"local_epochs": 1, "batch_size": 7}])
def test_bucketed_batches_have_the_same_examples_and_less_padding(settings: dict[str, int]) -> None:
    """Each window of 4 batches has the examples of the shuffled order there, in batches of similar length."""
    lengths = np.random.default_rng(1).integers(1, 60, 100)
    plain = TrainingConfig(**({"batch_size": 4} | settings))
    bucketed = dataclasses.replace(plain, bucket_batches=4)
    shuffled, sorted_ = (
        [batch for step in order(np.arange(30), t, lengths) for batch in step] for t in (plain, bucketed)
    )
    assert [len(batch) for batch in shuffled] == [len(batch) for batch in sorted_]
    for start in range(0, len(shuffled), 4):
        window = slice(start, start + 4)
        assert sorted(np.concatenate(shuffled[window])) == sorted(np.concatenate(sorted_[window]))

    def padded(batches: list[np.ndarray]) -> int:
        return sum(len(batch) * lengths[batch].max() for batch in batches)

    assert padded(sorted_) < 0.85 * padded(shuffled)


def test_a_short_last_batch_has_the_examples_that_it_has_without_buckets() -> None:
    """Not always the longest ones: 10 examples of 1 to 10 tokens, in batches of 4, 4 and 2."""
    plain, lasts = TrainingConfig(local_epochs=1, batch_size=4), []
    bucketed = dataclasses.replace(plain, bucket_batches=3)
    for seed in range(10):
        lengths = np.random.default_rng(seed).permutation(10) + 1
        (drawn,), (last,) = (order(np.arange(10), settings, lengths)[-1] for settings in (plain, bucketed))
        assert sorted(last) == sorted(drawn)
        lasts.append(sorted(lengths[last]))
    assert len({tuple(last) for last in lasts}) > 5


def test_clients_have_short_and_long_batches_at_the_same_steps() -> None:
    """Batches of a cohort are then similar in length in each step."""
    lengths, settings = np.arange(200) % 50, TrainingConfig(batch_size=4, bucket_batches=5, local_steps=10)
    one, other = (
        [int(np.mean(lengths[batch])) for (batch,) in order(indices, settings, lengths)]
        for indices in (np.arange(0, 100), np.arange(100, 200))
    )
    assert list(np.argsort(one[:5])) == list(np.argsort(other[:5]))
    assert list(np.argsort(one[5:])) == list(np.argsort(other[5:]))


def test_cosine_rates_fall_to_zero_over_the_federation() -> None:
    cosine = TrainingConfig(lr_schedule="cosine", learning_rate=0.2, head_learning_rate=0.4)
    optimizer = make_optimizer(cosine, [torch.zeros(1)], [torch.zeros(1)])
    for t, expected in ((0.0, [0.2, 0.4]), (0.5, [0.1, 0.2]), (1.0, [0.0, 0.0])):
        set_learning_rates(optimizer, cosine, t)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(expected)


def test_sgd_makes_one_pass_in_an_epoch(model: adapted.AdaptedModel, tiny: Settings) -> None:
    update = train(model, tiny | {"optimizer": "sgd", "momentum": 0.9, "local-epochs": 1, "local-training": "lora"})
    assert update.metrics["steps"] == -(-update.num_examples // 4)
