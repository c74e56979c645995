"""Serialization of updates: the tensors of several clients in one flat buffer, exact or quantized.

    float32   the tensors themselves
    bfloat16  the tensors themselves, rounded; for moments, whose small values float16 does not have
    float16   the difference d from the client's start, cast to float16
    int8      the difference as codes: s = max |d| / 127 for each tensor, code = round(d / s)

A buffer has no names and no lengths. Both sides know the start and the active steps of each client, which determine
the layout. The tensors of a start are those that the client may send.

Error feedback (Seide et al., Interspeech 2014; Karimireddy et al., arXiv 1901.09847): the quantization error of a
client's update is added to its next one, so that errors do not accumulate over rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from copra_fl.adapters.state import Adapter, Layout, Update, difference, trained

#: arrays of a message by name: ``values``, and for int8 ``scales``
Arrays = dict[str, Tensor]

#: client -> the tensors that it may send, before its training
Starts = Mapping[int, Adapter]

#: values of uplink-dtype with error feedback: nodes store the quantization error of each client
FEEDBACK = {"int8"}


@dataclass(frozen=True)
class Codec:
    """Encoding of flat values as arrays, and its inverse.

    Attributes:
        encode: (values, values of the start, length of each tensor) -> arrays
        decode: (arrays, values of the start, length of each tensor) -> values in float32;
            raises ValueError for arrays of a wrong dtype or length
    """

    encode: Callable[[Tensor, Tensor, Sequence[int]], Arrays]
    decode: Callable[[Arrays, Tensor, Sequence[int]], Tensor]


def take(arrays: Arrays, name: str, dtype: torch.dtype, size: int) -> Tensor:
    """Return ``arrays[name]``. Raises ValueError unless it has shape (size,) and type `dtype`."""
    array = arrays.get(name)
    if array is None or array.dtype != dtype or array.shape != (size,):
        actual = "missing" if array is None else f"{array.dtype} of shape {tuple(array.shape)}"
        raise ValueError(f"{name} should be {size} values of {dtype} in a row, but is {actual}")
    return array


def _encode_float32(values: Tensor, start: Tensor, sizes: Sequence[int]) -> Arrays:
    return {"values": values}


def _decode_float32(arrays: Arrays, start: Tensor, sizes: Sequence[int]) -> Tensor:
    return take(arrays, "values", torch.float32, len(start))


def _encode_bfloat16(values: Tensor, start: Tensor, sizes: Sequence[int]) -> Arrays:
    """Cast; the bits travel as int16, because NumPy has no bfloat16."""
    return {"values": values.bfloat16().view(torch.int16)}


def _decode_bfloat16(arrays: Arrays, start: Tensor, sizes: Sequence[int]) -> Tensor:
    return take(arrays, "values", torch.int16, len(start)).view(torch.bfloat16).float()


def _encode_float16(values: Tensor, start: Tensor, sizes: Sequence[int]) -> Arrays:
    """Clip values to float16's range and cast."""
    largest = torch.finfo(torch.float16).max
    return {"values": (values - start).clamp(-largest, largest).half()}


def _decode_float16(arrays: Arrays, start: Tensor, sizes: Sequence[int]) -> Tensor:
    return start + take(arrays, "values", torch.float16, len(start)).float()


def _encode_int8(values: Tensor, start: Tensor, sizes: Sequence[int]) -> Arrays:
    """Round to multiples of the scale: the error is at most scale / 2. A tensor that has not moved has scale 0."""
    moved = values - start
    scales = torch.tensor([float(part.abs().max()) for part in moved.split(list(sizes))]) / 127
    codes = moved / _spread(scales.where(scales > 0, 1.0), sizes)
    return {"values": codes.round().clamp(-127, 127).to(torch.int8), "scales": scales}


def _decode_int8(arrays: Arrays, start: Tensor, sizes: Sequence[int]) -> Tensor:
    scales = take(arrays, "scales", torch.float32, len(sizes))
    return start + take(arrays, "values", torch.int8, len(start)).float() * _spread(scales, sizes)


def _spread(scales: Tensor, sizes: Sequence[int]) -> Tensor:
    return scales.repeat_interleave(torch.tensor(sizes, dtype=torch.int64))


#: value of uplink-dtype or moments-dtype -> codec
CODECS = {
    "float32": Codec(_encode_float32, _decode_float32),
    "bfloat16": Codec(_encode_bfloat16, _decode_bfloat16),
    "float16": Codec(_encode_float16, _decode_float16),
    "int8": Codec(_encode_int8, _decode_int8),
}


def encode(updates: Sequence[Update], starts: Starts, group_of: Mapping[str, int], uplink: str) -> Arrays:
    """Return the tensors of `updates` as one buffer, client by client."""
    layouts, start, sizes = _frame(updates, starts, group_of)
    values = torch.cat([layout.flatten(update.adapter) for layout, update in zip(layouts, updates, strict=True)])
    return CODECS[uplink].encode(values, start, sizes)


def decode(
    arrays: Arrays, updates: Sequence[Update], starts: Starts, group_of: Mapping[str, int], uplink: str
) -> list[Update]:
    """Return `updates` with the tensors that `encode` wrote into `arrays`; their active steps must be known.

    Raises ValueError for arrays that cannot be the result of `encode` for such updates.
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
    errors: Mapping[int, Adapter],
) -> tuple[Arrays, dict[int, Adapter]]:
    """Encode `updates` after adding the quantization errors so far; return the buffer and the new errors.

    `errors` and the result are client -> quantization error. The error of a gate group is kept until the client sends
    that group again.
    """
    corrected = [
        replace(update, adapter={n: tensor + errors[update.client].get(n, 0) for n, tensor in update.adapter.items()})
        for update in updates
    ]
    arrays = encode(corrected, starts, group_of, uplink)
    decoded = decode(arrays, corrected, starts, group_of, uplink)
    return arrays, {
        before.client: errors[before.client] | difference(before.adapter, after.adapter)
        for before, after in zip(corrected, decoded, strict=True)
    }


def _frame(
    updates: Sequence[Update], starts: Starts, group_of: Mapping[str, int]
) -> tuple[list[Layout], Tensor, list[int]]:
    """Return the buffer's structure: the layout of each client, the start's values, the length of each tensor."""
    parts = [trained(starts[update.client], update.active_steps, group_of) for update in updates]
    layouts = [Layout.by_name(part) for part in parts]
    start = torch.cat([layout.flatten(part) for layout, part in zip(layouts, parts, strict=True)])
    return layouts, start, [shape.numel() for layout in layouts for shape in layout.shapes.values()]
