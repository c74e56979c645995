"""How adapters travel: the tensors of many clients as one flat buffer, as they are or rounded.

    float32   the tensors themselves
    float16   the difference d from the client's start, cast
    int8      the difference in codes: s = max |d| / 127 for each tensor, code = round(d / s)

A buffer has no names and no lengths. Both sides know what each client started from and its active steps,
and from them what lies where. The tensors of a start are those that the client may send.

Error feedback (Seide et al., Interspeech 2014; Karimireddy et al., arXiv 1901.09847): what
rounding lost is added to the client's next difference, so that losses do not add up over rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from copra_fl.adapters.state import Adapter, Layout, Update, difference, trained

#: what travels, by name: ``values``, and for int8 the ``scales``
Arrays = dict[str, Tensor]

#: client -> the tensors that it may send, as they were before its training
Starts = Mapping[int, Adapter]

#: uplinks with error feedback: a node keeps what was lost of its clients
FEEDBACK = {"int8"}


@dataclass(frozen=True)
class Codec:
    """Flat values to arrays and back.

    Attributes:
        encode: (values, values of the start, length of each tensor) -> arrays
        decode: (arrays, values of the start, length of each tensor) -> values in float32;
            raises ValueError for arrays of another dtype or length
    """

    encode: Callable[[Tensor, Tensor, Sequence[int]], Arrays]
    decode: Callable[[Arrays, Tensor, Sequence[int]], Tensor]


def take(arrays: Arrays, name: str, dtype: torch.dtype, size: int) -> Tensor:
    """``arrays[name]``. Raises ValueError unless it is a row of `size` values of type `dtype`."""
    got = arrays.get(name)
    if got is None or got.dtype != dtype or got.shape != (size,):
        what = "missing" if got is None else f"{got.dtype} of shape {tuple(got.shape)}"
        raise ValueError(f"{name} should be {size} values of {dtype} in a row, but is {what}")
    return got


def _encode_float32(values: Tensor, start: Tensor, sizes: Sequence[int]) -> Arrays:
    return {"values": values}


def _decode_float32(arrays: Arrays, start: Tensor, sizes: Sequence[int]) -> Tensor:
    return take(arrays, "values", torch.float32, len(start))


def _encode_float16(values: Tensor, start: Tensor, sizes: Sequence[int]) -> Arrays:
    """Values outside float16's range are clipped to it."""
    largest = torch.finfo(torch.float16).max
    return {"values": (values - start).clamp(-largest, largest).half()}


def _decode_float16(arrays: Arrays, start: Tensor, sizes: Sequence[int]) -> Tensor:
    return start + take(arrays, "values", torch.float16, len(start)).float()


def _encode_int8(values: Tensor, start: Tensor, sizes: Sequence[int]) -> Arrays:
    """Off by at most half a scale; a tensor that has not moved has scale 0."""
    moved = values - start
    scales = torch.tensor([float(part.abs().max()) for part in moved.split(list(sizes))]) / 127
    codes = moved / _spread(scales.where(scales > 0, 1.0), sizes)
    return {"values": codes.round().clamp(-127, 127).to(torch.int8), "scales": scales}


def _decode_int8(arrays: Arrays, start: Tensor, sizes: Sequence[int]) -> Tensor:
    scales = take(arrays, "scales", torch.float32, len(sizes))
    return start + take(arrays, "values", torch.int8, len(start)).float() * _spread(scales, sizes)


def _spread(scales: Tensor, sizes: Sequence[int]) -> Tensor:
    return scales.repeat_interleave(torch.tensor(sizes, dtype=torch.int64))


#: uplink -> codec
CODECS = {
    "float32": Codec(_encode_float32, _decode_float32),
    "float16": Codec(_encode_float16, _decode_float16),
    "int8": Codec(_encode_int8, _decode_int8),
}


def encode(updates: Sequence[Update], starts: Starts, group_of: Mapping[str, int], uplink: str) -> Arrays:
    """The tensors of `updates` as one buffer, client by client."""
    layouts, start, sizes = _frame(updates, starts, group_of)
    values = torch.cat([layout.flatten(update.adapter) for layout, update in zip(layouts, updates, strict=True)])
    return CODECS[uplink].encode(values, start, sizes)


def decode(
    arrays: Arrays, updates: Sequence[Update], starts: Starts, group_of: Mapping[str, int], uplink: str
) -> list[Update]:
    """`updates`, whose active steps are known, with the tensors that `encode` put into `arrays`.

    Raises ValueError for arrays that are not what `encode` makes of such updates.
    """
    layouts, start, sizes = _frame(updates, starts, group_of)
    rows = CODECS[uplink].decode(arrays, start, sizes).split([layout.size for layout in layouts])
    return [
        replace(update, adapter=layout.unflatten(row))
        for update, layout, row in zip(updates, layouts, rows, strict=True)
    ]


def encode_with_feedback(
    updates: Sequence[Update],
    starts: Starts,
    group_of: Mapping[str, int],
    uplink: str,
    lost: Mapping[int, Adapter],
) -> tuple[Arrays, dict[int, Adapter]]:
    """`encode`, with what was `lost` of each client so far added to it first; and what is lost now.

    What is lost of a gate group waits until the client sends that group again.
    """
    wanted = [
        replace(update, adapter={n: tensor + lost[update.client].get(n, 0) for n, tensor in update.adapter.items()})
        for update in updates
    ]
    arrays = encode(wanted, starts, group_of, uplink)
    arrived = decode(arrays, wanted, starts, group_of, uplink)
    return arrays, {
        before.client: lost[before.client] | difference(before.adapter, after.adapter)
        for before, after in zip(wanted, arrived, strict=True)
    }


def _frame(
    updates: Sequence[Update], starts: Starts, group_of: Mapping[str, int]
) -> tuple[list[Layout], Tensor, list[int]]:
    """A buffer of `updates`: each client's layout, its start's values in it, the length of each tensor."""
    parts = [trained(starts[update.client], update.active_steps, group_of) for update in updates]
    layouts = [Layout.by_name(part) for part in parts]
    start = torch.cat([layout.flatten(part) for layout, part in zip(layouts, parts, strict=True)])
    return layouts, start, [shape.numel() for layout in layouts for shape in layout.shapes.values()]
