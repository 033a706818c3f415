# SPDX-License-Identifier: Apache-2.0
"""Plain data in and out: untrusted msgpack is read strictly typed and within bounds."""

import reprlib
from collections.abc import Sequence
from typing import Any

import msgpack

from attncache_vllm.errors import StoreError


class _Shortened(reprlib.Repr):
    """What a message quotes of data that may be crafted, and large."""

    def __init__(self) -> None:
        super().__init__()
        self.maxdict = self.maxlist = 20
        self.maxstring = self.maxother = 200

    def repr_bytes(self, value: bytes, level: int) -> str:
        return repr(value) if len(value) <= self.maxother else f"{value[: self.maxother]!r}..."


shown = _Shortened().repr

MAX_NESTING = 64


def unpack(data: bytes | memoryview) -> Any:
    """Decode exactly one msgpack value, nested 64 deep at most, or raise ``ValueError``.

    msgpack bounds every length it reads by the size of ``data``, so a forged length cannot make it
    allocate more than the input could hold.
    """
    try:
        value = msgpack.unpackb(data)
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        raise ValueError(f"not well-formed msgpack: {error or type(error).__name__}") from error
    inside = [value]
    for _ in range(MAX_NESTING):
        inside = [
            item
            for outer in inside
            if isinstance(outer, list | dict)
            for item in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not inside:
            return value
    # Whoever quotes or walks it next would be stopped by the limit of recursion.
    raise ValueError(f"msgpack must be nested at most {MAX_NESTING} deep, got deeper")


def plain(value: dict[str, Any], what: str) -> dict[str, Any]:
    """A deep copy of ``value`` as it will be read back; ``StoreError`` if it is not plain data."""
    try:
        return fields(unpack(msgpack.packb(value)), list(value), what)
    except (TypeError, ValueError, OverflowError) as error:
        raise StoreError(f"{what} must be plain data with string keys: {error}") from error


def fields(value: object, names: Sequence[str], what: str) -> dict[str, Any]:
    """``value`` as a dict with exactly the keys ``names``."""
    if not isinstance(value, dict) or set(value) != set(names):
        got = sorted(map(str, value)) if isinstance(value, dict) else value
        raise ValueError(f"{what} must have exactly the fields {sorted(names)}, got {shown(got)}")
    return value


def items(value: object, count: int | None, what: str) -> list[Any]:
    """``value`` as a list, of ``count`` items unless that is ``None``."""
    if not isinstance(value, list) or (count is not None and len(value) != count):
        size = "" if count is None else f" of {count} items"
        raise ValueError(f"{what} must be a list{size}, got {shown(value)}")
    return value


def integer(value: object, low: int, high: int, what: str) -> int:
    """``value`` as an int (not a bool) with ``low <= value <= high``."""
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{what} must be an integer from {low} to {high}, got {shown(value)}")
    return value


def text(value: object, what: str, *, longest: int = 1024) -> str:
    """``value`` as a non-empty string of at most ``longest`` characters."""
    if not isinstance(value, str) or not 0 < len(value) <= longest:
        raise ValueError(
            f"{what} must be a string of 1 to {longest} characters, got {shown(value)}"
        )
    return value


def digest(value: object, what: str) -> bytes:
    """``value`` as 32 bytes."""
    if not isinstance(value, bytes) or len(value) != 32:
        raise ValueError(f"{what} must be 32 bytes, got {shown(value)}")
    return value
