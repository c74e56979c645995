"""Server and nodes must have the same base model, wherever each stores it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModel

from copra_fl.config import ConfigError
from copra_fl.models.base_weights import weights_digest
from server.errors import FederationError
from tests.support.federations import assert_equal, final_adapter
from tests.support.local_grid import LocalGrid, run_federation
from tests.support.tiny import Settings


def test_a_node_may_store_the_base_elsewhere(tiny: Settings, tmp_path: Path) -> None:
    copy = str(shutil.copytree(str(tiny["model"]), tmp_path / "mounted"))
    grid = LocalGrid(2, node_configs=[{}, {"model-path": copy}])
    same_path, other_path = run_federation(tiny, tmp_path / "same"), run_federation(tiny, tmp_path / "copy", grid=grid)
    assert_equal(final_adapter(same_path), final_adapter(other_path))


def test_a_node_with_another_base_is_rejected_with_both_digests(tiny: Settings, tmp_path: Path) -> None:
    """The models differ in one value."""
    other = Path(shutil.copytree(str(tiny["model"]), tmp_path / "other"))
    model = AutoModel.from_pretrained(other)
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1e-3
    model.save_pretrained(other)
    server_digest, node_digest = weights_digest(str(tiny["model"])), weights_digest(str(other))
    grid = LocalGrid(2, node_configs=[{}, {"model-path": str(other)}])
    with pytest.raises(FederationError) as error:
        run_federation(tiny, tmp_path / "run", grid=grid)
    assert str(error.value).startswith("node 101 (partition-id 1) rejected the run: the base differs")
    assert server_digest in str(error.value) and node_digest in str(error.value) and server_digest != node_digest


def test_a_node_without_the_base_is_rejected(tiny: Settings, tmp_path: Path) -> None:
    grid = LocalGrid(2, node_configs=[{"model-path": str(tmp_path / "nothing")}, {}])
    with pytest.raises(FederationError, match=r"node 100 .* rejected the run: model = 'model-path' is not an") as error:
        run_federation(tiny, tmp_path / "run", grid=grid)
    assert str(tmp_path) not in str(error.value), "no path of a node leaves it"


def test_the_servers_base_must_have_the_configured_digest(tiny: Settings, tmp_path: Path) -> None:
    digest = weights_digest(str(tiny["model"]))
    run_federation(tiny | {"model-sha256": digest, "num-rounds": 1}, tmp_path / "right")
    with pytest.raises(ConfigError, match=f"have SHA-256 {digest} here, not 0123"):
        run_federation(tiny | {"model-sha256": "0123"}, tmp_path / "wrong")
