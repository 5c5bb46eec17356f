"""What the process that leads tells the others: MessagePack (msgspec), over a pipe."""

from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from server.attention.layout import BlockCopy, ChunkLayout
from steering.column import Column

# Of a batch: the serial of each handle in the process that leads, with the multipliers of its columns.
Row = tuple[tuple[int, tuple[float, ...]], ...]


class Message(msgspec.Struct, array_like=True, tag=True):
    """Tagged by its class."""


class AddColumns(Message):
    """To the bank."""

    serial: int
    columns: list[Column]


class RemoveColumns(Message):
    serial: int


class CopyBlocks(Message):
    copies: list[BlockCopy]


class Forward(Message):
    """A pass; see `ForwardInputs`. Its tokens come through the group, from device to device."""

    chunks: list[ChunkLayout]
    num_rows: list[int]
    rows: list[Row]
    token_rows: bytes  # int64
    token_lines: bytes | None  # int64
    num_lines: int
    traced: bool


ToFollower = AddColumns | RemoveColumns | CopyBlocks | Forward


def to_bytes(array: NDArray[np.int64]) -> bytes:
    return array.tobytes()


def from_bytes(data: bytes) -> NDArray[np.int64]:
    """[N]"""
    return np.frombuffer(data, dtype=np.int64)


def _encode_other(value: Any) -> Any:
    if isinstance(value, Tensor):  # of a column: [D] float32, on the CPU
        return value.numpy().tobytes()
    raise NotImplementedError(f"{type(value).__name__} is no plain data")


def _decode_other(kind: type, value: Any) -> Any:
    if kind is Tensor:
        return torch.frombuffer(bytearray(value), dtype=torch.float32)
    raise NotImplementedError(f"{kind.__name__} is no plain data")


encode = msgspec.msgpack.Encoder(enc_hook=_encode_other).encode
decode = msgspec.msgpack.Decoder(ToFollower, dec_hook=_decode_other).decode
