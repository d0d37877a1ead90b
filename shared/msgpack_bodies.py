"""MessagePack for what JSON bodies say, value for value, on both ends of the wire.

A MessagePack body is the JSON body in another notation: maps, arrays, strings, numbers, booleans
and nil. Integers beyond 64 bits, which callers' metadata may hold and MessagePack cannot, travel as
extension type 1 with their decimal digits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

import msgpack

BIG_INTEGER_TYPE = 1

ContainerT = TypeVar("ContainerT")


def pack(value: object) -> bytes:
    """A JSON value as MessagePack."""
    packed = msgpack.packb(value, default=_pack_big_integer)
    assert isinstance(packed, bytes)
    return packed


def map_head(num_pairs: int) -> bytes:
    """What comes before the packed keys and values of a map."""
    head = msgpack.Packer().pack_map_header(num_pairs)
    assert isinstance(head, bytes)
    return head


def array_head(num_items: int) -> bytes:
    """What comes before the packed items of an array."""
    head = msgpack.Packer().pack_array_header(num_items)
    assert isinstance(head, bytes)
    return head


def unpack(body: bytes, max_containers: int | None = None) -> Any:
    """The value of a body that need not be trusted.

    Args:
        max_containers: an empty map or array takes one byte in the body and seventy in memory.

    Raises:
        ValueError: not one MessagePack value, nested too deeply, or with too many maps and arrays.
    """
    num_containers = 0

    def count(container: ContainerT) -> ContainerT:
        nonlocal num_containers
        num_containers += 1
        if max_containers is not None and num_containers > max_containers:
            raise ValueError(f"it has more than {max_containers} maps and arrays")
        return container

    hook = None if max_containers is None else count
    # Skipping allocates nothing and ends only if every element that a header announces is there:
    # otherwise a few bytes could make the reader reserve gigabytes.
    skipper = msgpack.Unpacker(max_buffer_size=0)
    skipper.feed(body)
    try:
        skipper.skip()
        if skipper.tell() != len(body):
            raise ValueError(f"{len(body) - skipper.tell()} bytes follow the value")
        return msgpack.unpackb(
            body,
            strict_map_key=False,
            ext_hook=_unpack_extension,
            object_hook=hook,
            list_hook=hook,
        )
    except msgpack.OutOfData as exc:
        raise ValueError("the value is cut short") from exc
    except TypeError as exc:  # a key that is a map or an array
        raise ValueError(str(exc)) from exc


class MsgpackStream:
    """Values one after the other, cut into pieces anywhere. Only for servers that are trusted."""

    def __init__(self) -> None:
        self._unpacker = msgpack.Unpacker(
            max_buffer_size=0, strict_map_key=False, ext_hook=_unpack_extension
        )

    def feed(self, piece: bytes) -> Iterator[Any]:
        """The values that are complete with this piece."""
        self._unpacker.feed(piece)
        yield from self._unpacker


def _pack_big_integer(value: object) -> msgpack.ExtType:
    if not isinstance(value, int):
        raise TypeError(f"{type(value).__name__} is not a JSON value")
    return msgpack.ExtType(BIG_INTEGER_TYPE, str(value).encode())


def _unpack_extension(code: int, data: bytes) -> int:
    if code != BIG_INTEGER_TYPE:
        raise ValueError(f"extension type {code} is not known")
    return int(data)  # Python refuses more than 4300 digits, as it does in JSON
