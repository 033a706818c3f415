# SPDX-License-Identifier: Apache-2.0
"""Mutated files and messages are refused with an error made for it, whatever is wrong with them.

The long form is ``python -m benchmarks.fuzz``.
"""

import msgpack
import pytest

from attncache_vllm.store import checks
from benchmarks import fuzz


@pytest.mark.parametrize("name", fuzz.targets())
def test_what_is_not_mutated_is_accepted(name: str) -> None:
    """Without this the refusals below could come from a mistake in the framing."""
    target = fuzz.targets()[name]
    for sample in target.samples:
        target.read(target.frame(msgpack.packb(sample)))


def test_mutations_are_refused_without_other_errors_or_much_memory() -> None:
    fed = fuzz.fuzz(20_000, seed=0)
    for name in fuzz.targets():
        assert fed[f"{name}, refused"] > 100, name


@pytest.mark.parametrize("opening", [b"\x91", b"\x81\xa1k"])
def test_nesting_is_bounded(opening: bytes) -> None:
    assert checks.unpack(opening * (checks.MAX_NESTING - 1) + b"\xc0") is not None
    for depth in (checks.MAX_NESTING, 1000, 5000):
        with pytest.raises(ValueError, match=r"nested at most 64 deep|not well-formed"):
            checks.unpack(opening * depth + b"\xc0")


def test_a_wrong_answer_is_told_with_what_is_needed_to_see_it_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def crash(data: bytes) -> None:
        raise TypeError("of a bug")

    def fill(data: bytes) -> bytes:
        return bytes(8 * fuzz.MOST_MEMORY)

    for read, told in ((crash, "TypeError: of a bug"), (fill, "took")):
        broken = {"record": fuzz.Target(({},), bytes, read)}
        monkeypatch.setattr(fuzz, "targets", lambda broken=broken: broken)
        with pytest.raises(AssertionError, match=f"record, input 0 of seed 5.*{told}"):
            fuzz.fuzz(10, seed=5)
