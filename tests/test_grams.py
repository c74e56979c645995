"""The Gram mean against least squares on stacked data, and collected Gram matrices against Transformers' own states."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from copra_fl.adapters.state import Adapter, Update
from copra_fl.aggregation.grams import shrunk
from copra_fl.aggregation.pooling import pool
from copra_fl.training.batches import plan_steps
from copra_fl.training.grams import GramSums
from tests.support.rounds import GROUP_OF, MODULES, K, aggregate, make_round, random_adapter, update
from tests.support.tiny import Settings
from tests.support.worlds import World, relative_error

B, A = (f"{MODULES[0]}.lora_{part}.weight" for part in "BA")
SHARED = random_adapter(9)[A]


def client(number: int, tokens: int, inputs: Tensor | None = None, active: tuple[int, int] = (1, 1)) -> Update:
    """Return an update with random B's and, for the first module, the Gram matrix of `tokens` random inputs."""
    sent = update(number, random_adapter(number) | {A: SHARED}, 10 * number + 10, active)
    x = inputs_of(number, tokens) if inputs is None else inputs
    gram = SHARED @ x.T @ x @ SHARED.T / len(x)
    return replace(sent, grams={B: (gram + gram.T) / 2} if active[0] else {})


def inputs_of(number: int, tokens: int) -> Tensor:
    return torch.randn(tokens, K, generator=torch.Generator().manual_seed(number)) * (1 + number)


def mean_of(updates: list[Update], weighting: str = "examples") -> Tensor:
    return aggregate("ffa-lora-gram", make_round(random_adapter(9), updates, weighting=weighting)).adapter[B]


def test_the_gram_mean_is_least_squares_on_all_inputs() -> None:
    """Oracle: `lstsq` on the rows sqrt(p_i / T_i) A x_t and their outputs sqrt(p_i / T_i) B_i A x_t."""
    sizes = {0: 5, 1: 20, 2: 9}
    left, right = [], []
    for number, tokens in sizes.items():
        root = ((10 * number + 10) / 60 / tokens) ** 0.5
        reduced = root * inputs_of(number, tokens).double() @ SHARED.double().T
        left.append(reduced)
        right.append(reduced @ random_adapter(number)[B].double().T)
    expected = torch.linalg.lstsq(torch.cat(left), torch.cat(right)).solution.T
    updates = [client(number, tokens) for number, tokens in sizes.items()]
    torch.testing.assert_close(mean_of(updates).double(), expected, atol=1e-5, rtol=1e-5)
    average = aggregate("ffa-lora", make_round(random_adapter(9), updates)).adapter[B]
    assert (average - expected).norm() > 0.1 * expected.norm(), "the plain average is another one"


def test_equal_gram_matrices_give_the_plain_average() -> None:
    x = inputs_of(7, 30)
    updates = [client(number, 30, x) for number in range(3)]
    average = aggregate("ffa-lora", make_round(random_adapter(9), updates)).adapter[B]
    torch.testing.assert_close(mean_of(updates), average)


def test_a_direction_without_inputs_gets_the_plain_average() -> None:
    """One input per client, all parallel: outputs are known in one direction of two."""
    x = inputs_of(7, 1)
    updates = [client(number, 1, x * (number + 1)) for number in range(3)]
    average = aggregate("ffa-lora", make_round(random_adapter(9), updates)).adapter[B]
    seen = (SHARED @ x[0])[:, None]
    unseen = torch.tensor([[-seen[1, 0]], [seen[0, 0]]])
    mean = mean_of(updates)
    torch.testing.assert_close(mean @ unseen, average @ unseen, atol=1e-4, rtol=1e-4)
    weights = torch.tensor([(10 * number + 10) * (number + 1) ** 2 for number in range(3)]).float()
    outputs = torch.stack([random_adapter(number)[B] @ seen for number in range(3)])
    torch.testing.assert_close(
        mean @ seen, torch.einsum("i,ijk->jk", weights / weights.sum(), outputs), atol=1e-4, rtol=1e-4
    )


def test_a_client_that_did_not_train_the_module_does_not_count() -> None:
    updates = [client(0, 20), client(1, 20, active=(0, 1))]
    torch.testing.assert_close(mean_of(updates), updates[0].adapter[B])
    assert torch.equal(mean_of([client(0, 9, active=(0, 1))]), random_adapter(9)[B])


@pytest.mark.parametrize("weighting", ["examples", "activity"])
def test_pooled_updates_have_the_effect_of_individual_updates(weighting: str) -> None:
    """Three nodes; one client on the first and all of the last did not train the module; one has a single input."""
    nodes = [
        [client(0, 20), client(1, 1, active=(2, 1)), client(2, 9, active=(0, 1))],
        [client(3, 9, active=(3, 2))],
        [client(4, 5, active=(0, 2)), client(5, 5, active=(0, 1))],
    ]
    pooled = [pool(random_adapter(9), updates, weighting, GROUP_OF) for updates in nodes]
    assert [list(update.grams) for update in pooled] == [[B], [B], []]
    individual = mean_of([update for updates in nodes for update in updates], weighting)
    torch.testing.assert_close(mean_of(pooled, weighting), individual, atol=1e-5, rtol=1e-5)


def test_shrinkage_by_hand() -> None:
    """30 tokens and shrinkage 10: values off the diagonal times 3/4."""
    gram = torch.tensor([[2.0, 4.0], [4.0, 6.0]])
    assert shrunk(gram, 30, 10).tolist() == [[2, 3], [3, 6]]
    assert torch.equal(shrunk(gram, 30, 0), gram)


def test_padding_and_unused_rows_are_left_out() -> None:
    """Two clients of two rows: one has padding, the other a single row; a module may get one input per row."""
    values = torch.arange(1.0, 9.0).view(2, 4, 1)
    is_token = torch.tensor([[[True, True], [True, False]], [[True, True], [False, False]]])
    sums = GramSums(3)
    sums.add("tokens", torch.tensor([2, 0]), values, is_token)
    sums.add("rows", torch.tensor([2, 0]), values[:, :2], is_token)
    of = {
        client: {name.partition(".")[0]: float(g) for name, g in sums.matrices(client, 0).items()} for client in (0, 2)
    }
    assert of[2] == pytest.approx({"tokens": (1 + 4 + 9) / 3, "rows": (1 + 4) / 2})
    assert of[0] == pytest.approx({"tokens": (25 + 36) / 2, "rows": 25})
    assert sums.matrices(1, 0) == {}


@pytest.fixture(scope="module")
def unequal(tiny: Settings, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Settings with texts of 3 to 8 words, so that batches have padding."""
    texts = pd.read_csv(str(tiny["dataset"]))
    texts["text"] = [" ".join(text.split()[: 3 + row % 6]) for row, text in enumerate(texts["text"])]
    path = tmp_path_factory.mktemp("unequal") / "texts.csv"
    texts.to_csv(path, index=False)
    return tiny | {"dataset": str(path), "local-training": "lora", "gram-shrinkage": 0.0, "rule": "ffa-lora-gram"}


@pytest.mark.parametrize("recompute", [False, True])
def test_collected_matrices_are_those_of_the_hidden_states(unequal: Settings, recompute: bool) -> None:
    """Oracle: Transformers' hidden states of the step's texts, one text at a time, so without padding."""
    flat = unequal | {"local-steps": 1, "gradient-accumulation": 2, "gradient-checkpointing": recompute}
    world = World(flat, double=True)
    updates = {update.client: [update.grams] for update in world.together(*range(6))}
    for number in (0, 3):
        grams = [*updates[number], world.alone(number).grams]
        world.plain.write_adapter(world.start)
        steps = plan_steps(world.plan, world.data, number, 3)
        states: dict[int, list[Tensor]] = {layer: [] for layer in range(3)}
        for index in np.concatenate(steps.batches[0]):
            batch = world.data.examples.batch(np.array([index]))
            with torch.no_grad():
                hidden = world.plain.base.base_model(**world.plain.task.inputs(batch), output_hidden_states=True)
            for layer in states:
                states[layer].append(hidden.hidden_states[layer][0])
        expected: Adapter = {}
        for layer, parts in states.items():
            for module in ("query", "value"):
                name = f"base_model.model.encoder.layer.{layer}.attention.self.{module}.lora"
                reduced = torch.cat(parts) @ world.start[f"{name}_A.weight"].T
                expected[f"{name}_B.weight"] = reduced.T @ reduced / len(reduced)
        for collected in grams:
            assert collected.keys() == expected.keys()
            assert relative_error(collected, expected) < 1e-12


def test_only_rounds_that_train_b_have_gram_matrices(unequal: Settings) -> None:
    for server_round, rule, number in ((1, "rolora-gram", 6), (2, "rolora-gram", 0), (1, "rolora", 0)):
        world = World(unequal | {"rule": rule, "local-steps": 1}, server_round)
        assert len(world.alone(0).grams) == len(world.together(0)[0].grams) == number
