"""Checks of a single update: the valid one passes, every deviation is rejected with its reason."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from copra_fl.adapters.state import Update
from copra_fl.aggregation.checking import BadUpdate, Expected, check_grams, check_update
from tests.support.updates import GLOBAL, GROUP_OF, VALID

#: `VALID` has moved by sqrt(6 + 14)
EXPECTED = Expected(num_groups=2, num_examples=12, num_steps=3, max_norm=20**0.5 + 1e-6)


def tensors(**changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """The tensors of `VALID` with changes; `x` and `head` stand for their full names, None removes a tensor."""
    full_names = {"x": "x.lora_A.weight", "head": "head.weight"}
    changed = VALID.adapter | {full_names.get(name, name): value for name, value in changes.items()}
    return {name: value for name, value in changed.items() if value is not None}


def test_a_valid_update_passes() -> None:
    check_update(VALID, GLOBAL, GROUP_OF, EXPECTED)


START = {"x.lora_B.weight": torch.zeros(3, 2), "y.lora_B.weight": torch.zeros(3, 2)}
GRAM = torch.tensor([[2.0, 1.0], [1.0, 0.5 + 1e-7]])  # singular up to rounding


@pytest.mark.parametrize(
    ("grams", "reason"),
    [
        ({"x": GRAM}, ""),
        ({}, r"Gram matrices for \['x.lora_B.weight'\] are missing"),
        ({"x": GRAM, "y": GRAM}, r"\['y.lora_B.weight'\] are not known"),
        ({"x": torch.eye(3)}, r"is torch.float32 of shape \(3, 3\)"),
        ({"x": GRAM.double()}, "is torch.float64 of shape"),
        ({"x": torch.full((2, 2), math.nan)}, "not finite"),
        ({"x": torch.tensor([[2.0, 1.0], [0.9, 2.0]])}, "is not symmetric"),
        ({"x": torch.tensor([[1.0, 2.0], [2.0, 1.0]])}, "has the eigenvalue -1 below 0"),
    ],
)
def test_a_gram_matrix_is_symmetric_without_negative_eigenvalues(grams: dict[str, torch.Tensor], reason: str) -> None:
    """Group y was off, so the client has no matrix for it."""
    sent = replace(VALID, grams={f"{module}.lora_B.weight": gram for module, gram in grams.items()})
    group_of = {"x.lora_B.weight": 0, "y.lora_B.weight": 1}
    with pytest.raises(BadUpdate, match=reason) if reason else nullcontext():
        check_grams(sent, START, group_of)


@pytest.mark.parametrize(
    ("update", "reason"),
    [
        (replace(VALID, num_examples=0), "claims 0 examples"),
        (replace(VALID, num_examples=9999), "claims 9999 examples; at the start it had 12"),
        (replace(VALID, active_steps=(3,)), "not 2 counts"),
        (replace(VALID, active_steps=(3, -1)), "not 2 counts"),
        (replace(VALID, active_steps=(3, 1)), r"tensors \['y.lora_A.weight'\] are missing"),
        (replace(VALID, active_steps=(0, 0)), r"\['x.lora_A.weight'\] are not known or not trained"),
        (replace(VALID, adapter=tensors(head=None)), r"tensors \['head.weight'\] are missing"),
        (replace(VALID, adapter=tensors(evil=torch.ones(1))), r"\['evil'\] are not known"),
        (
            replace(VALID, adapter=tensors(x=torch.ones(3, 2))),
            r"float32 of shape \(3, 2\), not torch.float32 of \(2, 3",
        ),
        (replace(VALID, adapter=tensors(x=torch.ones(2, 3).double())), "float64"),
        (replace(VALID, adapter=tensors(x=torch.full((2, 3), math.nan))), "not finite"),
        (replace(VALID, adapter=tensors(head=torch.tensor([0, 1, math.inf, 0]))), "not finite"),
        (replace(VALID, active_steps=(4, 0)), "claims 4 active steps of a layer; a round has 3"),
        (replace(VALID, active_steps=(math.nan, 0)), "claims nan active steps"),
        (
            replace(VALID, adapter=tensors(head=torch.arange(4.0) * 1.01)),
            "has moved by 4.50., more than max-update-norm",
        ),
        (replace(VALID, metrics={"loss": math.nan}), "loss of nan"),
        (replace(VALID, metrics={"loss": 1.0, "steps": math.inf}), "reports steps = inf"),
        (replace(VALID, metrics={"loss": 1.0, "client": 3.0}), "reports client; known are distance, flops, loss"),
        (replace(VALID, metrics={}), "loss of None"),
    ],
)
def test_an_invalid_update_is_rejected(update: Update, reason: str) -> None:
    with pytest.raises(BadUpdate, match=reason):
        check_update(update, GLOBAL, GROUP_OF, EXPECTED)
