# SPDX-License-Identifier: Apache-2.0
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from map_samples import product, visible
from safetensors.torch import save as save_tensors
from torch import Tensor

from attncache_vllm.reuse.apply import apply_map
from attncache_vllm.reuse.codec import encode_map
from attncache_vllm.reuse.layout import MapLayout, Mask
from attncache_vllm.reuse.maps import RowBlocks
from attncache_vllm.reuse.template import MIN_TEXTS, Templates, TemplateSums, bucket_of, resize

LAYER = 2
CAUSAL = MapLayout(4, 2, Mask())
CAUSAL_WINDOW = MapLayout(4, 2, Mask(window=9))
BIDIRECTIONAL = MapLayout(4, 4, Mask(causal=False))
BIDIRECTIONAL_WINDOW = MapLayout(2, 1, Mask(causal=False, window=9))
LAYOUTS = [CAUSAL, CAUSAL_WINDOW, BIDIRECTIONAL, BIDIRECTIONAL_WINDOW]
# Maps are kept in bfloat16.
ROUNDING = 2**-8


def random_map(seed: int, length: int, layout: MapLayout) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + length)
    scores = 3 * torch.randn(layout.num_heads, length, length, generator=generator)
    return scores.masked_fill(~visible(layout.mask, length), float("-inf")).softmax(-1)


def templates_of(layout: MapLayout, longest: int, lengths: list[int], least: int = 1) -> Templates:
    sums = TemplateSums({LAYER: layout}, longest)
    for seed, length in enumerate(lengths):
        sums.add(LAYER, random_map(seed, length, layout))
    return sums.means(least)


def dense(blocks: RowBlocks | None, length: int | None = None) -> Tensor:
    """What a template serves to a text of this length."""
    assert blocks is not None
    probs = blocks.to_dense().float()
    return probs if length is None else probs[:, :length, :length]


def served(templates: Templates, length: int, layout: MapLayout) -> Tensor:
    """The map a text is answered with, read off through the product that serves it."""
    blocks = templates.get(LAYER, length)
    assert blocks is not None
    eye = torch.eye(length)[:, None, :].expand(length, layout.num_kv_heads, length).contiguous()
    out = torch.empty(length, layout.num_heads * length)
    apply_map(blocks, eye, out)
    return out.view(length, layout.num_heads, length).transpose(0, 1)


# -- buckets -----------------------------------------------------------------------------------


@given(st.integers(1, 10_000))
def test_a_bucket_holds_lengths_from_an_eighth_below_its_own(length: int) -> None:
    bucket = bucket_of(length)
    assert length <= bucket <= max(32, length * 9 / 8)
    assert bucket_of(bucket) == bucket
    assert bucket <= bucket_of(length + 1)


def test_short_texts_have_buckets_of_their_own() -> None:
    assert [bucket_of(length) for length in range(1, 33)] == list(range(1, 33))
    assert bucket_of(33) == bucket_of(36) == 36


# -- resizing ----------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(1, 12))
def test_a_resized_map_keeps_both_ends_and_its_rows_sum_to_one(old: int, new: int) -> None:
    probs = random_map(1, old, BIDIRECTIONAL)
    found = resize(probs, new)
    assert found.shape == (4, new, new)
    torch.testing.assert_close(found.sum(-1), torch.ones(4, new))
    if new == old:
        assert torch.equal(found, probs)
    # Where each new token is in the old map: the halves keep their distance to their ends.
    first = (new + 1) // 2
    places = [min(i, old // 2) if i < first else max(old - new + i, old // 2) for i in range(new)]
    if new <= old:
        assert places == [*range(first), *range(old - new + first, old)]
    expected = probs[:, places][:, :, places]
    torch.testing.assert_close(found, expected / expected.sum(-1, keepdim=True))


def test_a_row_of_which_nothing_is_left_stays_empty() -> None:
    probs = torch.zeros(1, 3, 3)
    probs[:, :, 1] = 1.0  # all look at the token that is cut out
    assert not resize(probs, 2).any()


@pytest.mark.parametrize("length", [0, -1])
def test_a_map_is_not_resized_to_nothing(length: int) -> None:
    with pytest.raises(ValueError, match="length must be at least 1, got"):
        resize(random_map(1, 4, BIDIRECTIONAL), length)


# -- means -------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(
    st.sampled_from([CAUSAL, CAUSAL_WINDOW]),
    st.lists(st.integers(1, 24), min_size=3, max_size=7),
    st.integers(1, 3),
)
def test_a_row_of_a_causal_template_is_the_mean_of_that_row_of_the_texts_that_reach_it(
    layout: MapLayout, lengths: list[int], least: int
) -> None:
    longest = 20
    templates = templates_of(layout, longest, lengths, least)
    # The rows that at least so many texts have, and a few of those that some have.
    length = min(longest, sorted(lengths)[-least])
    assert templates.longest == min(longest, max(lengths), length + length // 8)
    assert templates.get(LAYER, templates.longest + 1) is None
    found = dense(templates.get(LAYER, length))
    for row in range(length):
        rows = [
            random_map(seed, size, layout)[:, row, : row + 1]
            for seed, size in enumerate(lengths)
            if size > row
        ]
        mean = torch.stack(rows).mean(0)
        torch.testing.assert_close(found[:, row, : row + 1], mean, rtol=ROUNDING, atol=0)


@pytest.mark.parametrize("layout", [CAUSAL, CAUSAL_WINDOW], ids=str)
@pytest.mark.parametrize(("reached", "longest"), [(83, 83), (90, 90), (91, 90), (200, 90)])
def test_rows_that_few_texts_reach_continue_the_mean_for_an_eighth_of_it(
    layout: MapLayout, reached: int, longest: int
) -> None:
    enough = templates_of(layout, 200, [80, 80], least=2)
    templates = templates_of(layout, 200, [80, 80, reached], least=2)
    assert (enough.longest, templates.longest) == (80, longest)
    found = dense(templates.get(LAYER, longest))
    assert not found[:, ~visible(layout.mask, longest)].any()
    torch.testing.assert_close(found.sum(-1), torch.ones(4, longest), rtol=0.01, atol=0)
    last = found[:, 79]
    for row in range(80, longest):
        ends = found[:, row, [0, row - 1, row]]
        expected = last[:, [0, 78, 79]]
        torch.testing.assert_close(
            ends / ends[:, -1:], expected / expected[:, -1:], rtol=0.03, atol=1e-6
        )


@settings(deadline=None, max_examples=25)
@given(
    st.sampled_from([BIDIRECTIONAL, BIDIRECTIONAL_WINDOW]),
    st.lists(st.integers(30, 40), min_size=1, max_size=6),
    st.integers(1, 3),
)
def test_a_bidirectional_template_is_the_mean_of_its_bucket(
    layout: MapLayout, lengths: list[int], least: int
) -> None:
    sums = TemplateSums({LAYER: layout}, 60)
    buckets: dict[int, list[Tensor]] = {}
    for seed, length in enumerate(lengths):
        probs = random_map(seed, length, layout)
        sums.add(LAYER, probs)
        bucket = bucket_of(length)
        widened = resize(probs, bucket) * visible(layout.mask, bucket)
        widened /= widened.sum(-1, keepdim=True)
        buckets.setdefault(bucket, []).append(widened)
    buckets = {bucket: maps for bucket, maps in buckets.items() if len(maps) >= least}
    if not buckets:
        with pytest.raises(ValueError, match=f"needs at least {least} texts of similar length"):
            sums.means(least)
        return
    templates = sums.means(least)
    assert templates.longest == max(buckets)
    for bucket, maps in buckets.items():
        mean = torch.stack(maps).mean(0)
        found = dense(templates.get(LAYER, bucket))
        torch.testing.assert_close(found, mean, rtol=ROUNDING, atol=1e-6)


def test_a_mean_needs_some_texts() -> None:
    sums = TemplateSums({LAYER: CAUSAL}, 8)
    for seed in range(MIN_TEXTS):
        with pytest.raises(ValueError, match=f"layer 2 needs at least {MIN_TEXTS} texts"):
            sums.means()
        sums.add(LAYER, random_map(seed, 5, CAUSAL))
    assert sums.means().longest == 5


def test_bidirectional_texts_beyond_the_longest_bucket_are_left_out() -> None:
    templates = templates_of(BIDIRECTIONAL, 40, [40, 41, 50])
    assert templates.longest == 40


@pytest.mark.parametrize("shape", [(3, 5, 5), (4, 5, 6), (4, 5), (4, 6, 5)])
def test_a_map_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    sums = TemplateSums({LAYER: CAUSAL}, 8)
    with pytest.raises(ValueError, match=r"a map of layer 2 must be \[4, L, L\], got"):
        sums.add(LAYER, torch.zeros(shape))


# -- serving -----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [CAUSAL, CAUSAL_WINDOW], ids=str)
def test_a_causal_template_serves_every_text_up_to_its_length_by_its_leading_block(
    layout: MapLayout,
) -> None:
    templates = templates_of(layout, 140, [140, 140])
    whole = dense(templates.get(LAYER, 140))
    for length in (1, 2, 9, 63, 64, 65, 100, 139, 140):
        assert templates.get(LAYER, length) is templates.get(LAYER, 140)
        assert torch.equal(served(templates, length, layout), whole[:, :length, :length])


@pytest.mark.parametrize("layout", [BIDIRECTIONAL, BIDIRECTIONAL_WINDOW], ids=str)
def test_a_bidirectional_template_is_cut_to_the_text_in_the_middle(layout: MapLayout) -> None:
    templates = templates_of(layout, 60, [40, 39, 45])
    of_bucket = dense(templates.get(LAYER, 40))
    for length in (5, 17, 38, 40, 41, 45):
        blocks = templates.get(LAYER, length)
        assert blocks is not None
        assert blocks.length == length
        # Of the shortest bucket that is long enough.
        template = of_bucket if length <= 40 else dense(templates.get(LAYER, 45))
        expected = resize(template, length) * visible(layout.mask, length)
        expected = expected / expected.sum(-1, keepdim=True)
        found = served(templates, length, layout)
        torch.testing.assert_close(found, expected, rtol=2 * ROUNDING, atol=0)
        torch.testing.assert_close(found.sum(-1), torch.ones(found.shape[:2]), rtol=0, atol=0.02)
        assert templates.get(LAYER, length) is blocks  # made once
    assert templates.get(LAYER, 46) is None


def test_the_template_of_one_text_answers_as_its_own_map_does() -> None:
    for layout in LAYOUTS:
        length = 36
        templates = templates_of(layout, length, [length])
        value = torch.randn(length, layout.num_kv_heads, 8)
        out = torch.empty(length, layout.num_heads * 8)
        blocks = templates.get(LAYER, length)
        assert blocks is not None
        apply_map(blocks, value, out)
        expected = product(random_map(0, length, layout), value)
        torch.testing.assert_close(out.double(), expected, rtol=0, atol=0.02)


def test_a_layer_without_a_template_is_served_by_none() -> None:
    templates = templates_of(CAUSAL, 8, [8])
    assert templates.get(LAYER + 1, 4) is None
    assert (Templates({}).longest, Templates({}).layers, Templates({}).nbytes) == (0, (), 0)


def test_the_longest_text_is_that_which_every_layer_serves() -> None:
    sums = TemplateSums({1: CAUSAL, 2: CAUSAL}, 8)
    sums.add(1, random_map(1, 8, CAUSAL))
    sums.add(2, random_map(1, 5, CAUSAL))
    assert sums.means(1).longest == 5


@pytest.mark.parametrize("layout", [CAUSAL, BIDIRECTIONAL], ids=str)
def test_only_the_chosen_groups_of_the_chosen_layers_are_served(layout: MapLayout) -> None:
    sums = TemplateSums({1: layout, 2: layout}, 40)
    for layer in (1, 2):
        sums.add(layer, random_map(layer, 40, layout))
    every = sums.means(1)
    chosen = every.select({2: (1,)})
    assert chosen.layers == (2,)
    assert chosen.get(1, 30) is None
    assert chosen.nbytes * 2 * layout.num_kv_heads == every.nbytes
    for length in (40, 30):  # as it is, and cut
        blocks = chosen.get(2, length)
        assert blocks is not None
        assert (blocks.groups, blocks.lse) == ((1,), None)
        expected = dense(every.get(2, length))
        other = [h for h in range(layout.num_heads) if h // layout.group != 1]
        expected[other] = 0
        assert torch.equal(dense(blocks), expected)
        again = chosen.select({2: (1,)}).get(2, length)
        assert torch.equal(dense(again), expected)


def test_what_has_no_template_cannot_be_chosen() -> None:
    templates = templates_of(CAUSAL, 8, [8])
    with pytest.raises(ValueError, match=r"layer 3 has no template, only \(2,\) have"):
        templates.select({3: (0,)})
    with pytest.raises(ValueError, match=r"only the KV groups \(1,\) have a template, got \(0,\)"):
        templates.select({LAYER: (1,)}).select({LAYER: (0,)})


# -- bytes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("part", [False, True])
def test_templates_survive_their_bytes(layout: MapLayout, part: bool) -> None:
    templates = templates_of(layout, 60, [33, 40, 45])
    if part:
        templates = templates.select({LAYER: (layout.num_kv_heads - 1,)})
    found = Templates.from_bytes(templates.to_bytes(), {LAYER: layout, 7: CAUSAL})
    assert found.layers == templates.layers
    assert (found.longest, found.nbytes) == (templates.longest, templates.nbytes)
    for length in (1, 20, 36, 37, 45):
        ours, theirs = templates.get(LAYER, length), found.get(LAYER, length)
        if ours is None or theirs is None:
            assert ours is theirs
            continue
        assert (theirs.layout, theirs.length) == (layout, ours.length)
        assert (theirs.groups, theirs.lse) == (ours.groups, None)
        assert torch.equal(theirs.to_dense(), ours.to_dense())


def crafted(groups: object, **tensors: Tensor) -> bytes:
    data: bytes = save_tensors(tensors, {"groups": json.dumps(groups)})
    return data


def encoded(length: int = 8, layout: MapLayout = CAUSAL) -> Tensor:
    """One encoded map, as the bytes of templates hold it."""
    probs = random_map(1, length, layout)
    return encode_map(probs, torch.zeros(probs.shape[:2]), layout.mask)


EVERY = {"2": [0, 1]}


def test_what_is_crafted_below_would_be_read_if_it_were_sound() -> None:
    data = crafted(EVERY, **{"2.8": encoded()})
    assert Templates.from_bytes(data, {LAYER: CAUSAL}).longest == 8


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"x" * 100,
        (1 << 60).to_bytes(8, "little") + b"{}",
        save_tensors({"2.8": encoded()}),
        save_tensors({"2.8": encoded()}, {"other": "{}"}),
        save_tensors({"2.8": encoded()}, {"groups": "no json"}),
        save_tensors({"2.8": encoded()}, {"groups": "[" * 100_000}),
        crafted([], **{"2.8": encoded()}),
        crafted(None, **{"2.8": encoded()}),
        crafted({}, **{"2.8": encoded()}),
        crafted({"2": None}, **{"2.8": encoded()}),
        crafted({"2": []}, **{"2.8": encoded()}),
        crafted({"2": [0]}, **{"2.8": encoded()}),
        crafted({"2": [0, 2]}, **{"2.8": encoded()}),
        crafted({"2": [1, 0]}, **{"2.8": encoded()}),
        crafted({"2": [0, 0]}, **{"2.8": encoded()}),
        crafted({"2": [0.0, 1.0]}, **{"2.8": encoded()}),
        crafted({"2": [False, True]}, **{"2.8": encoded()}),
        crafted({"2": [[0], [1]]}, **{"2.8": encoded()}),
        crafted({"2": ["0", "1"]}, **{"2.8": encoded()}),
        crafted({"3": [0, 1]}, **{"3.8": encoded()}),
        crafted(EVERY, **{"2": encoded()}),
        crafted(EVERY, **{"2.8.1": encoded()}),
        crafted(EVERY, **{"two.8": encoded()}),
        crafted(EVERY, **{"2.7": encoded()}),
        crafted(EVERY, **{"2.0": encoded()}),
        crafted(EVERY, **{"2.-8": encoded()}),
        crafted(EVERY, **{"2.99999999999999999999": encoded()}),
        crafted(EVERY, **{"2.8": encoded()[:-1]}),
        crafted(EVERY, **{"2.8": encoded().view(torch.bfloat16)}),
        crafted(EVERY, **{"2.8": encoded().view(2, -1)}),
    ],
)
def test_bytes_that_are_no_templates_of_the_model_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="these are not templates of this model's layers"):
        Templates.from_bytes(data, {LAYER: CAUSAL})


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_damaged_bytes_are_refused_or_read_but_nothing_else(data: st.DataObject) -> None:
    sound = np.frombuffer(templates_of(CAUSAL, 6, [6]).to_bytes(), np.uint8).copy()
    for _ in range(data.draw(st.integers(1, 3))):
        # Mostly in the header, which says what the rest is.
        sound[data.draw(st.integers(0, min(200, len(sound) - 1)))] = data.draw(st.integers(0, 255))
    try:
        found = Templates.from_bytes(sound.tobytes(), {LAYER: CAUSAL})
    except ValueError:
        return
    for layer in found.layers:
        assert layer == LAYER
        assert found.get(layer, found.longest) is not None
