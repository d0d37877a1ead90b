"""MessagePack in place of JSON: nothing is lost, and nothing is believed."""

from __future__ import annotations

import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.msgpack_bodies import MsgpackStream, array_head, map_head, pack, unpack

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(json_values)
def test_json_values_survive_the_way_there_and_back(value: object) -> None:
    assert unpack(pack(value)) == value


@given(st.lists(json_values, max_size=4), st.integers(1, 9))
def test_a_stream_may_be_cut_anywhere(values: list[object], size: int) -> None:
    body = b"".join(map(pack, values))
    stream = MsgpackStream()
    pieces = (body[start : start + size] for start in range(0, len(body), size))
    assert [value for piece in pieces for value in stream.feed(piece)] == values


def test_a_map_can_be_put_together_from_packed_parts() -> None:
    parts = [map_head(2), pack("a"), array_head(2), pack(1), pack(None), pack("b"), pack({"c": 2})]
    assert unpack(b"".join(parts)) == {"a": [1, None], "b": {"c": 2}}


def test_announcements_reserve_no_memory() -> None:
    """Each header promises as many items as there are bytes, which by itself could be true."""
    num_bytes = 1 << 20
    header = b"\xdd" + num_bytes.to_bytes(4, "big")
    body = header * 40 + bytes(num_bytes)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="cut short"):
            unpack(body)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 8 * num_bytes


@pytest.mark.parametrize("item", [b"\x80", b"\x90", b"\x91\x90", b"\x81\xa0\x80"])
def test_containers_that_take_more_than_their_bytes_are_bounded(item: bytes) -> None:
    num_items = 1 << 18
    body = b"\xdd" + num_items.to_bytes(4, "big") + item * num_items
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="more than 1000 maps and arrays"):
            unpack(body, max_containers=1000)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 10 * len(body)
    assert unpack(pack([{}] * 999), max_containers=1000) == [{}] * 999


def test_what_is_no_json_value_is_not_packed() -> None:
    with pytest.raises(TypeError, match="set is not a JSON value"):
        pack({"a": {1}})
