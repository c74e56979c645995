"""Pruned adapters: the values kept, by hand; a module with B = 0 equals one that PEFT disables."""

from __future__ import annotations

import pytest
import torch
from peft.tuners.lora import LoraLayer

from copra_fl.adapters.state import Adapter
from copra_fl.config import Config
from copra_fl.models import adapted
from copra_fl.models.build import build_model
from copra_fl.probes import pruned_adapters
from copra_fl.training.stacked import StackedModel
from tests.support.worlds import jitter

BLOCK = "base_model.model.encoder.layer"


def small_adapter(layers: int = 12) -> Adapter:
    """Return `layers` blocks with query and value, in alphabetical order of names (10 before 2); values 1, 2, 3, ..."""
    names = sorted(
        f"{BLOCK}.{layer}.attention.self.{kind}.lora_{part}.weight"
        for layer in range(layers)
        for kind in ("query", "value")
        for part in "AB"
    )
    adapter = {name: torch.arange(4 * i + 1.0, 4 * i + 5).view(2, 2) for i, name in enumerate(names)}
    return adapter | {"head.weight": torch.ones(3, 2), "head.bias": torch.ones(3)}


def active_layers(adapter: Adapter) -> set[int]:
    """Return the layers with an active module."""
    return {int(name.split(".")[4]) for name, tensor in adapter.items() if "lora_B" in name and tensor.any()}


def test_layers_are_in_the_order_of_their_numbers() -> None:
    modules_by_layer = pruned_adapters.layers(small_adapter())
    assert list(modules_by_layer) == [f"{BLOCK}.{layer}" for layer in range(12)]
    assert [pruned_adapters.kind(module, f"{BLOCK}.3") for module in modules_by_layer[f"{BLOCK}.3"]] == [
        "attention.self.query",
        "attention.self.value",
    ]


def test_a_module_outside_the_blocks_is_a_layer_by_itself() -> None:
    pooler = "base_model.model.pooler.dense"
    adapter = small_adapter(2) | {f"{pooler}.lora_{part}.weight": torch.ones(2, 2) for part in "AB"}
    assert list(pruned_adapters.layers(adapter)) == [f"{BLOCK}.0", f"{BLOCK}.1", pooler]
    assert [pruned.name for pruned in pruned_adapters.single_modules(adapter)][-1] == f"{pooler} only"


def test_whole_and_empty_adapter() -> None:
    adapter = small_adapter()
    whole, empty = pruned_adapters.ends(adapter)
    assert all(torch.equal(whole.adapter[name], adapter[name]) for name in adapter) and whole.kept == 1
    assert active_layers(empty.adapter) == set() and empty.kept == 0
    assert torch.equal(empty.adapter["head.weight"], adapter["head.weight"])


def test_layer_sets() -> None:
    sets = {pruned.name: pruned for pruned in pruned_adapters.layer_sets(small_adapter())}
    assert {name: active_layers(pruned.adapter) for name, pruned in sets.items()} == {
        "every other layer": {0, 2, 4, 6, 8, 10},
        "every other layer, from the second": {1, 3, 5, 7, 9, 11},
        "low third": {0, 1, 2, 3},
        "middle third": {4, 5, 6, 7},
        "high third": {8, 9, 10, 11},
    }
    assert sets["every other layer"].kept == 0.5 and sets["low third"].kept == pytest.approx(1 / 3)


def test_one_layer_has_no_empty_sets() -> None:
    assert [pruned.name for pruned in pruned_adapters.layer_sets(small_adapter(1))] == [
        "every other layer",
        "low third",
    ]


def test_single_modules() -> None:
    query, value = pruned_adapters.single_modules(small_adapter())
    assert query.name == "attention.self.query only" and query.kept == 0.5
    assert all(tensor.any() == ("value" not in name) for name, tensor in query.adapter.items() if "lora_B" in name)
    assert all(tensor.any() == ("query" not in name) for name, tensor in value.adapter.items() if "lora_B" in name)
    only_query = {name: tensor for name, tensor in small_adapter().items() if "value" not in name}
    assert list(pruned_adapters.single_modules(only_query)) == []


def test_layers_in_the_order_of_their_values() -> None:
    values = {f"{BLOCK}.0": 0.1, f"{BLOCK}.1": -0.2, f"{BLOCK}.2": 0.3}
    prunings = list(pruned_adapters.in_order(small_adapter(3), values))
    assert [active_layers(pruned.adapter) for pruned in prunings] == [{0, 2}, {2}]
    assert [pruned.kept for pruned in prunings] == pytest.approx([2 / 3, 1 / 3])
    assert prunings[1].name == "1 layer of largest value"


def test_magnitudes_counted_by_hand() -> None:
    """Values 1 to 16 with signs: at 50 % the 8 smallest are zero, and the head is unchanged."""
    adapter = small_adapter(1)
    adapter = {name: -tensor if "value" in name else tensor for name, tensor in adapter.items()}
    half = pruned_adapters.by_magnitude(adapter, 0.5)
    values = torch.cat([tensor.flatten() for name, tensor in half.items() if "lora" in name])
    assert values.tolist() == [0.0] * 8 + [-9.0, -10.0, -11.0, -12.0, -13.0, -14.0, -15.0, -16.0]
    assert torch.equal(half["head.weight"], adapter["head.weight"])
    assert adapter[f"{BLOCK}.0.attention.self.query.lora_A.weight"].all(), "the original is unchanged"
    counts = [
        sum(int(tensor.count_nonzero()) for name, tensor in pruned.adapter.items() if "lora" in name)
        for pruned in pruned_adapters.magnitudes(small_adapter(5))  # 80 values
    ]
    assert counts == [72, 64, 56, 48, 40, 32, 24, 16, 8]


def test_equal_values_are_pruned_to_the_exact_share() -> None:
    adapter = {name: torch.ones_like(tensor) for name, tensor in small_adapter(1).items()}
    pruned = pruned_adapters.by_magnitude(adapter, 0.25)
    assert sum(int(tensor.count_nonzero()) for name, tensor in pruned.items() if "lora" in name) == 12


def random_adapter(rank: int, heads: int = 0) -> Adapter:
    """Return an adapter with a block of R for each head; no R without heads."""
    stream = torch.Generator().manual_seed(0)
    shapes = {"A": (rank, 9), "B": (7, rank)} | ({"R": (rank, rank // heads)} if heads else {})
    return {
        f"{BLOCK}.{layer}.query.lora_{part}.weight": torch.randn(shape, generator=stream)
        for layer in range(2)
        for part, shape in shapes.items()
    }


def product(adapter: Adapter, layer: int) -> torch.Tensor:
    """Return B A or B R A of a layer."""
    b, right = right_side(adapter, layer)
    return b @ right


def right_side(adapter: Adapter, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return B, and A or R A, of a layer."""
    b, r, a = (adapter.get(f"{BLOCK}.{layer}.query.lora_{part}.weight") for part in "BRA")
    return b, a if r is None else torch.block_diag(*r.split(r.shape[1])) @ a


@pytest.mark.parametrize("heads", [0, 1, 2])
def test_prefixes_of_the_rank(heads: int) -> None:
    """Oracles: the sum of the first components as stored, and torch's SVD of the product."""
    adapter = random_adapter(8, heads)
    prunings = list(pruned_adapters.rank_prefixes(adapter))
    assert [(pruned.family, pruned.kept) for pruned in prunings] == [
        (family, kept) for kept in (0.75, 0.5, 0.25) for family in ("rank as stored", "rank in SVD order")
    ]
    for pruned in prunings:
        size = round(8 * pruned.kept)
        assert {name: tensor.shape for name, tensor in pruned.adapter.items()} == {
            name: tensor.shape for name, tensor in adapter.items()
        }
        for layer in range(2):
            if pruned.family == "rank as stored":
                b, right = right_side(adapter, layer)
                expected = sum(torch.outer(b[:, j], right[j]) for j in range(size))
            else:
                u, s, v = torch.linalg.svd(product(adapter, layer), full_matrices=False)
                expected = u[:, :size] * s[:size] @ v[:size]
            assert torch.allclose(product(pruned.adapter, layer), expected, atol=1e-4)


def test_a_small_rank_has_fewer_prefixes() -> None:
    """Of rank 2, 3/4 is the whole rank, and 1/2 and 1/4 are one component."""
    assert [pruned.name for pruned in pruned_adapters.rank_prefixes(random_adapter(2))] == [
        "first 1 of 2 components, as stored",
        "first 1 of 2 components, SVD order",
    ]
    assert list(pruned_adapters.rank_prefixes(random_adapter(1))) == []


@pytest.fixture(scope="module")
def model(tiny: dict[str, object]) -> adapted.AdaptedModel:
    return build_model(Config.from_flat(tiny | {"target-modules": "all-linear"}).model, "layer", 3, seed=0)


@pytest.mark.parametrize("dropped", [0, 1, 2])
def test_a_dropped_layer_equals_one_that_peft_disables(model: adapted.AdaptedModel, dropped: int) -> None:
    adapter = jitter(model.read_adapter(), 0, size=0.3)
    modules_by_layer = list(pruned_adapters.layers(adapter).values())
    kept = [module for layer, modules in enumerate(modules_by_layer) if layer != dropped for module in modules]
    pruned = pruned_adapters.keep(adapter, kept)
    tokens = torch.randint(5, 41, (7, 9), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    lora_modules = {name: module for name, module in model.peft.named_modules() if isinstance(module, LoraLayer)}
    switched = [module for name, module in lora_modules.items() if f"layer.{dropped}." in name]
    with torch.inference_mode():
        (plain,) = model.predictor([pruned])(batch)
        whole, stacked = StackedModel(model).predictor([adapter, pruned])(batch)
        model.write_adapter(adapter)
        for module in switched:
            module.enable_adapters(False)
        disabled = model(**batch)
        for module in switched:
            module.enable_adapters(True)
    assert torch.allclose(plain, disabled, atol=1e-6) and torch.allclose(stacked, disabled, atol=1e-5)
    assert not torch.allclose(whole, disabled, atol=1e-2)
