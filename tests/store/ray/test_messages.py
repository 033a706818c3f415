# SPDX-License-Identifier: Apache-2.0
"""Frames between server and gateway: read back as written, and anything odd is a ValueError."""

from __future__ import annotations

import contextlib
import os
import socket
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from store_samples import NAMESPACE

from attncache_vllm.store.ray import messages
from attncache_vllm.store.ray.channel import Channel, close_all, mapped, sealed
from attncache_vllm.store.ray.messages import Kind

FEATURES = np.arange(6, dtype=np.float32).reshape(2, 3)
LENGTHS = np.array([[1, 5], [2, 7]])
SKETCHES = [np.array([1, 1 << 63], dtype=np.uint64), np.array([], dtype=np.uint64)]
REQUESTS = [
    messages.Open(NAMESPACE, None),
    messages.Open(None, "0f" * 32),
    messages.Lookup(["", "ab"], FEATURES, LENGTHS, 8, 12.5),
    messages.Overlaps(["", "ab"], SKETCHES, 4, 12.5),
    messages.TokenIds([0, (1 << 63) - 1], 12.5),
    messages.Load([7], 12.5),
    messages.Put("ab", 7, FEATURES[0]),
]
NEWS = messages.News(
    {"entries": 3, "bytes": 4, "damaged": 0}, 1 << 60, {2: "it hangs"}, {"late": 3}
)


def plain(value: Any) -> Any:
    """Arrays as lists, so that requests can be compared."""
    if isinstance(value, np.ndarray):
        return [str(value.dtype), value.tolist()]
    return [plain(item) for item in value] if isinstance(value, list) else value


def travelled(body: object) -> Any:
    return msgpack.unpackb(msgpack.packb(body))


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda r: type(r).__name__)
def test_a_request_is_read_back_as_it_was_written(request_: messages.Request) -> None:
    found = messages.parse_request(travelled(messages.request_body(request_)))
    assert type(found) is type(request_)
    for name, value in vars(request_).items():
        assert plain(getattr(found, name)) == plain(value)


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda r: type(r).__name__)
def test_a_request_that_lacks_or_has_a_field_more_is_refused(request_: messages.Request) -> None:
    body = messages.request_body(request_)
    for name in body:
        with pytest.raises(ValueError):
            messages.parse_request({key: value for key, value in body.items() if key != name})
    with pytest.raises(ValueError):
        messages.parse_request(body | {"more": 1})


@pytest.mark.parametrize(
    ("request_", "change"),
    [
        (REQUESTS[1], {"edition": "f" * 65}),
        (REQUESTS[2], {"tenants": [""]}),
        (REQUESTS[2], {"tenants": ["", "x" * 129]}),
        (REQUESTS[2], {"features": [[2, 3], b"\0" * 23]}),
        (REQUESTS[2], {"features": [[2, 1 << 40], b""]}),
        (REQUESTS[2], {"features": [[2, 3.0], b"\0" * 24]}),
        (REQUESTS[2], {"lengths": [[2, 3], b"\0" * 48]}),
        (REQUESTS[2], {"neighbours": 1025}),
        (REQUESTS[2], {"deadline": float("nan")}),
        (REQUESTS[2], {"deadline": float("inf")}),
        (REQUESTS[2], {"deadline": 12}),
        (REQUESTS[3], {"sketches": [b"\0" * 8, b"\0" * 2056]}),
        (REQUESTS[3], {"sketches": [b"\0" * 8, b"\0" * 7]}),
        (REQUESTS[4], {"ids": [-1]}),
        (REQUESTS[4], {"ids": [True]}),
        (REQUESTS[5], {"ids": [1] * 65}),
        (REQUESTS[6], {"tenant": 1}),
        (REQUESTS[6], {"method": "Forget"}),
        (REQUESTS[6], {"method": ["Put"]}),
    ],
)
def test_a_request_out_of_bounds_is_refused(
    request_: messages.Request, change: dict[str, Any]
) -> None:
    with pytest.raises(ValueError):
        messages.parse_request(messages.request_body(request_) | change)


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats()
    | st.text(max_size=9) | st.binary(max_size=40),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=12,
)  # fmt: skip


@given(st.sampled_from(REQUESTS), st.data(), values)
def test_whatever_a_field_holds_it_is_a_request_or_a_value_error(
    request_: messages.Request, data: st.DataObject, value: object
) -> None:
    body = messages.request_body(request_)
    body[data.draw(st.sampled_from(sorted(body)))] = value
    with contextlib.suppress(ValueError):
        messages.parse_request(travelled(body))


@given(values)
def test_whatever_an_answer_is_it_is_read_or_a_value_error(body: object) -> None:
    for parse in (
        lambda: messages.parse_request(body),
        lambda: messages.parse_found(body, 2, 3, np.float32),
        lambda: messages.parse_token_ids(body, 2),
        lambda: messages.parse_loaded(body, 2, 1),
        lambda: messages.parse_fault(body),
        lambda: messages.parse_news(body),
    ):
        with contextlib.suppress(ValueError):
            parse()


def test_answers_and_news_are_read_back_as_they_were_written() -> None:
    ids, lengths = np.array([[3, -1]]), np.array([[9, 0]])
    values = np.array([[0.5, 0.0]], dtype=np.float32)
    body = travelled(messages.found_body((ids, values, lengths)))
    found = messages.parse_found(body, 1, 2, np.float32)
    assert [plain(part) for part in found] == [plain(part) for part in (ids, values, lengths)]
    token_ids = [np.array([1, 2], dtype=np.int32), None]
    found = messages.parse_token_ids(travelled(messages.token_ids_body(token_ids)), 2)
    assert plain(found) == plain(token_ids)
    assert messages.parse_news(travelled(messages.news_body(NEWS))) == NEWS


def test_answers_of_another_size_are_refused() -> None:
    ids = np.array([[3, -1]])
    body = messages.found_body((ids, ids, ids))
    for queries, most in ((1, 3), (2, 2)):
        with pytest.raises(ValueError):
            messages.parse_found(body, queries, most, np.int64)
    with pytest.raises(ValueError, match="ids must be -1 or more"):
        messages.parse_found(messages.found_body((ids - 1, ids, ids)), 1, 2, np.int64)
    with pytest.raises(ValueError, match="each of 1 files"):
        messages.parse_loaded([True, True], 2, 1)


def test_a_head_is_read_back_and_any_other_bytes_are_refused() -> None:
    frame = messages.frame(Kind.ANSWER, 7, ["body"], files=2)
    head = messages.parse_head(frame[: messages.HEAD_BYTES])
    assert (head.kind, head.number, head.files) == (Kind.ANSWER, 7, 2)
    assert head.size == len(frame) - messages.HEAD_BYTES
    for place in (0, 4, 5, 6, 15):
        bad = bytearray(frame[: messages.HEAD_BYTES])
        bad[place] ^= 0xFF
        with pytest.raises(ValueError):
            messages.parse_head(bytes(bad))
    with pytest.raises(ValueError, match="ask for less"):
        messages.frame(Kind.ANSWER, 1, bytes(messages.MAX_BODY))


# -- the channel -------------------------------------------------------------------------------


@pytest.fixture
def ends() -> tuple[Channel, Channel]:
    ours, theirs = socket.socketpair()
    return Channel(ours, 1.0), Channel(theirs, 1.0)


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_frame_arrives_whole_with_its_files(ends: tuple[Channel, Channel]) -> None:
    files = [sealed(b"first"), sealed(b"second")]
    ends[0].send(messages.frame(Kind.ANSWER, 1, ["a" * 50_000], len(files)), files)
    ends[0].send(messages.frame(Kind.NEWS, 0, []))
    close_all(files)
    _head, body, found = ends[1].receive()
    assert msgpack.unpackb(body) == ["a" * 50_000]
    assert [bytes(mapped(file, 100)) for file in found] == [b"first", b"second"]
    assert ends[1].receive()[0].kind is Kind.NEWS
    close_all(found)


def test_files_that_were_not_announced_are_refused_and_closed(
    ends: tuple[Channel, Channel],
) -> None:
    file = sealed(b"more")
    before = open_files()
    ends[0].send(messages.frame(Kind.ANSWER, 1, []), [file])
    with pytest.raises(ValueError, match="its 0 files"):
        ends[1].receive()
    assert open_files() == before
    close_all([file])


def test_the_end_of_the_other_side_is_an_end_of_file(ends: tuple[Channel, Channel]) -> None:
    ends[0].close()
    with pytest.raises(EOFError):
        ends[1].receive()
    with pytest.raises(OSError):
        ends[1].send(messages.frame(Kind.NEWS, 0, []))


def test_who_does_not_read_is_not_waited_for() -> None:
    ours, theirs = socket.socketpair()
    channel = Channel(ours, 0.1)
    with pytest.raises(OSError):
        channel.send(messages.frame(Kind.ANSWER, 1, bytes(1 << 22)))
    theirs.close()


def test_a_sealed_file_cannot_be_changed() -> None:
    file = sealed(b"record")
    with pytest.raises(OSError):
        os.pwrite(file, b"x", 0)
    with pytest.raises(OSError):
        os.ftruncate(file, 0)
    assert bytes(mapped(file, 6)) == b"record"
    with pytest.raises(ValueError, match="1 to 5 bytes"):
        mapped(file, 5)
    close_all([file])


def test_a_file_that_could_still_change_is_refused() -> None:
    file = os.memfd_create("open", os.MFD_ALLOW_SEALING)
    os.write(file, b"record")
    with pytest.raises(ValueError, match="must be sealed"):
        mapped(file, 100)
    os.close(file)
    with open(__file__, "rb") as stream, pytest.raises(ValueError, match="must be in memory"):
        mapped(stream.fileno(), 1 << 30)
