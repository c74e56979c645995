"""Updates in one flat buffer: contents, quantization errors, and error feedback."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from copra_fl.adapters.compression import CODECS, decode, encode, encode_with_feedback
from copra_fl.adapters.state import Adapter, Update, trained

GROUP_OF = {"a": 0, "b": 1}
SHAPES = {"head": (7,), "b": (3, 2), "a": (4, 5)}
GLOBAL = {name: torch.randn(shape, generator=torch.Generator().manual_seed(1)) for name, shape in SHAPES.items()}


def random_adapter(seed: int, size: float = 0.01) -> Adapter:
    """Return `GLOBAL` plus differences, of another size in each tensor: one scale for all would be too coarse."""
    rng = torch.Generator().manual_seed(seed)
    return {
        name: tensor + size * 10**-i * torch.randn(tensor.shape, generator=rng)
        for i, (name, tensor) in enumerate(GLOBAL.items())
    }


def update(client: int, active_steps: tuple[int, int], adapter: Adapter) -> Update:
    return Update(client, trained(adapter, active_steps, GROUP_OF), 10, active_steps, {"loss": 1.0})


UPDATES = [update(4, (2, 1), random_adapter(4)), update(0, (0, 3), random_adapter(0)), update(2, (0, 0), GLOBAL)]
BARE = [replace(update, adapter={}) for update in UPDATES]
STARTS = dict.fromkeys((4, 0, 2), GLOBAL)


@pytest.mark.parametrize("uplink", CODECS)
def test_a_buffer_has_the_trained_tensors_and_nothing_else(uplink: str) -> None:
    arrays = encode(UPDATES, STARTS, GROUP_OF, uplink)
    assert len(arrays["values"]) == (20 + 6 + 7) + (6 + 7) + 7
    assert arrays["values"].dtype == {"bfloat16": torch.int16}.get(uplink, getattr(torch, uplink))
    arrived = decode(arrays, BARE, STARTS, GROUP_OF, uplink)
    assert [update.client for update in arrived] == [4, 0, 2]
    for sent, decoded in zip(UPDATES, arrived, strict=True):
        assert decoded.adapter.keys() == sent.adapter.keys()
        assert all(decoded.adapter[name].shape == GLOBAL[name].shape for name in decoded.adapter)


@pytest.mark.parametrize("uplink", CODECS)
def test_a_client_without_a_head_whose_layers_were_all_off_sends_nothing(uplink: str) -> None:
    factors = {name: tensor for name, tensor in GLOBAL.items() if name != "head"}
    idle, busy = update(0, (0, 0), factors), update(4, (1, 0), factors)
    for sent in ([idle], [idle, busy]):
        arrays = encode(sent, {0: factors, 4: factors}, GROUP_OF, uplink)
        arrived = decode(arrays, sent, {0: factors, 4: factors}, GROUP_OF, uplink)
        assert [decoded.adapter.keys() for decoded in arrived] == [original.adapter.keys() for original in sent]
    assert arrived[0].adapter == {}
    assert torch.allclose(arrived[1].adapter["a"], GLOBAL["a"], rtol=2**-8 if uplink == "bfloat16" else 0, atol=0)


def test_float32_is_exact_whatever_the_order_of_names() -> None:
    """A checkpoint may have its tensors in a different order than the model."""
    arrays = encode(UPDATES, STARTS, GROUP_OF, "float32")
    arrived = decode(arrays, BARE, dict.fromkeys(STARTS, dict(sorted(GLOBAL.items()))), GROUP_OF, "float32")
    for sent, decoded in zip(UPDATES, arrived, strict=True):
        assert all(torch.equal(decoded.adapter[name], tensor) for name, tensor in sent.adapter.items())


def test_the_error_of_int8_is_at_most_half_a_scale() -> None:
    arrays = encode(UPDATES, STARTS, GROUP_OF, "int8")
    assert len(arrays["scales"]) == 3 + 2 + 1
    for sent, decoded in zip(UPDATES, decode(arrays, BARE, STARTS, GROUP_OF, "int8"), strict=True):
        for name, tensor in sent.adapter.items():
            scale = (tensor - GLOBAL[name]).abs().max() / 127
            assert (decoded.adapter[name] - tensor).abs().max() <= scale / 2 + 1e-6
    assert arrays["values"].abs().max() == 127
    assert not arrays["values"][-7:].any(), "a tensor that has not moved has scale 0 and is decoded exactly"


def test_float16_clips_values_outside_its_range() -> None:
    zeros = {0: {"head": torch.zeros(3)}}
    far = Update(0, {"head": torch.tensor([1e6, -1e6, 0.5])}, 1, (), {})
    (arrived,) = decode(encode([far], zeros, {}, "float16"), [far], zeros, {}, "float16")
    assert arrived.adapter["head"].tolist() == [65504.0, -65504.0, 0.5]


def test_error_feedback_of_int8_keeps_errors_from_accumulating() -> None:
    """200 rounds of the same difference: with feedback the sum is off by half a scale, without by up to 200 times that.

    Tensor b is sent in every second round only.
    """
    zeros = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    moved = {name: random_adapter(3)[name] - GLOBAL[name] for name in GLOBAL}
    scales = {name: tensor.abs().max() / 127 for name, tensor in moved.items()}
    true, fed, plain = dict(zeros), dict(zeros), dict(zeros)
    lost: dict[int, Adapter] = {9: {}}
    for server_round in range(200):
        sent = update(9, (1, server_round % 2), moved)
        arrays, lost = encode_with_feedback([sent], {9: zeros}, GROUP_OF, "int8", lost)
        for sums, values in (
            (true, sent),
            (fed, decode(arrays, [sent], {9: zeros}, GROUP_OF, "int8")[0]),
            (plain, decode(encode([sent], {9: zeros}, GROUP_OF, "int8"), [sent], {9: zeros}, GROUP_OF, "int8")[0]),
        ):
            sums |= {name: sums[name] + tensor for name, tensor in values.adapter.items()}
    for name, scale in scales.items():
        assert (fed[name] - true[name]).abs().max() < scale, name
        assert torch.allclose(fed[name] + lost[9][name], true[name], atol=1e-5), name
        assert (plain[name] - true[name]).abs().max() > 10 * scale, name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"values": torch.zeros(3, dtype=torch.int8)}, r"values should be 53 values of torch.int8.*shape \(3,\)"),
        ({"values": torch.zeros(53)}, "values should be 53 values of torch.int8 in a row, but is torch.float32"),
        ({"values": torch.zeros(1, 53, dtype=torch.int8)}, r"shape \(1, 53\)"),
        ({"scales": torch.zeros(5)}, "scales should be 6 values"),
        ({"scales": None}, "scales should be 6 values of torch.float32 in a row, but is missing"),
    ],
)
def test_malformed_buffers_are_refused(changes: dict[str, torch.Tensor | None], message: str) -> None:
    arrays = encode(UPDATES, STARTS, GROUP_OF, "int8") | changes
    with pytest.raises(ValueError, match=message):
        decode({k: v for k, v in arrays.items() if v is not None}, BARE, STARTS, GROUP_OF, "int8")
