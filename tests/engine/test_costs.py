# SPDX-License-Identifier: Apache-2.0
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attncache_vllm.engine.costs import Cost, Costs, Manner, lengths_up_to, log_line

# Two layers: the first pays from 64 tokens, the second from 128.
MEASURED: dict[tuple[int, Manner], list[Cost]] = {
    (1, "template"): [Cost(32, 2, 2), Cost(64, 3, 1), Cost(128, 4, 1)],
    (2, "template"): [Cost(32, 2, 3), Cost(64, 3, 4), Cost(128, 4, 1)],
    (1, "aligned"): [Cost(32, 2, 5), Cost(64, 3, 1), Cost(128, 4, 1)],
}


@pytest.mark.parametrize(
    ("length", "first", "second"),
    [
        (1, False, False),
        (32, False, False),
        (63, False, False),
        (64, True, False),
        (127, True, False),
        (128, True, True),
        (4096, True, True),
    ],
)
def test_between_two_lengths_those_of_the_shorter_one_count(
    length: int, first: bool, second: bool
) -> None:
    costs = Costs(MEASURED)
    assert (costs.pays(1, "template", length), costs.pays(2, "template", length)) == (first, second)


def test_what_was_not_measured_of_an_engine_that_was_does_not_pay() -> None:
    assert not Costs(MEASURED).pays(2, "aligned", 128)
    assert not Costs(MEASURED).worth("neighbour", 128)
    assert Costs({}).pays(2, "aligned", 1) and Costs({}).worth("neighbour", 1)


def test_layers_that_do_not_pay_take_nothing_from_those_that_do() -> None:
    costs = Costs(MEASURED)
    assert [costs.saved("template", length) for length in (32, 64, 128)] == [0, 2, 6]


def test_a_source_is_worth_it_if_its_layers_save_more_than_the_lookup_takes() -> None:
    assert not Costs(MEASURED, lookup=2.5).worth("aligned", 64)
    assert Costs(MEASURED, lookup=2.5).worth("aligned", 128)
    assert Costs(MEASURED, lookup=1.5).worth("aligned", 64)
    # Templates are not looked up.
    assert Costs(MEASURED, lookup=100).worth("template", 64)
    assert not Costs(MEASURED).worth("template", 32), "what saves nothing is not worth it"


def test_a_batch_is_parted_only_for_more_than_that_costs() -> None:
    kinds: list[tuple[Manner, int]] = [("neighbour", 64), ("neighbour", 128)]
    points = [Cost(64, 3, 1, parting=1), Cost(128, 6, 1, parting=3)]
    costs = Costs({(1, "neighbour"): points})
    assert costs.pays_in_batch(1, kinds[:1], 64), "nothing is parted"
    # One of 64 tokens saves 2; parting costs 1 for 128 tokens, and in proportion for more.
    assert costs.pays_in_batch(1, kinds[:1], 128)
    assert costs.pays_in_batch(1, kinds[:1], 160)
    assert not costs.pays_in_batch(1, kinds[:1], 256)
    # Two save 7; beyond what was measured it goes on in proportion: 3 for 256, 9 for 768.
    assert costs.pays_in_batch(1, kinds, 512)
    assert not costs.pays_in_batch(1, kinds, 768)
    assert Costs({}).pays_in_batch(1, kinds, 10_000)


saved = st.lists(st.integers(-5, 5), min_size=1, max_size=7)


@given(saved, st.integers(0, 4))
def test_from_its_least_length_on_a_source_is_worth_it_and_just_before_it_is_not(
    saved: list[int], lookup: int
) -> None:
    lengths = lengths_up_to(1024)[: len(saved)]
    points = [Cost(n, 10, 10 - amount) for n, amount in zip(lengths, saved, strict=True)]
    costs = Costs({(0, "neighbour"): points}, float(lookup))
    least = costs.least_length("neighbour")
    worth = {length: costs.worth("neighbour", length) for length in lengths}
    if least is None:
        assert not worth[lengths[-1]]
        assert "neighbour never" in log_line(costs, 1.0)
        return
    assert all(worth[length] for length in lengths if length >= least)
    before = [length for length in lengths if length < least]
    assert not before or not worth[before[-1]]
    assert f"neighbour from {least} tokens" in log_line(costs, 1.0)


def test_lengths_are_no_longer_than_a_sequence_can_be() -> None:
    assert lengths_up_to(100) == [16, 32, 64]
    assert lengths_up_to(7) == [7]
