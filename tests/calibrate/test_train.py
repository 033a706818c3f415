# SPDX-License-Identifier: Apache-2.0
from collections.abc import Iterator, Sequence

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attncache_vllm.calibrate.train import (
    MapDigest,
    TrainReport,
    digest,
    map_distance,
    train_projector,
)
from attncache_vllm.reuse.codec import decode_map, encode_map
from attncache_vllm.reuse.feature import Projector
from attncache_vllm.reuse.layout import MapLayout, Mask
from attncache_vllm.reuse.maps import RowBlocks

POSITIONS = (3, 20, 69, 200)
CAUSAL, BIDIRECTIONAL = (Mask(), Mask()), (Mask(causal=False), Mask(causal=False))
masks = st.builds(
    Mask, causal=st.booleans(), window=st.sampled_from([None, 1, 2, 17, 64, 65, 250, 400])
)
lengths = st.one_of(st.integers(4, 320), st.sampled_from([69, 70, 200, 201]))


def stored(probs: Tensor, mask: Mask) -> RowBlocks:
    """``[H, L, L]`` as a store gives it back, two query heads to a KV head if they are even."""
    heads = len(probs)
    layout = MapLayout(heads, heads // 2 if heads % 2 == 0 else heads, mask)
    return decode_map(
        encode_map(probs, probs.new_zeros(probs.shape[:2]), mask), layout, probs.shape[1]
    )


def random_maps(seed: int, length: int, masks: Sequence[Mask] = CAUSAL) -> list[RowBlocks]:
    generator = torch.Generator().manual_seed(seed)
    maps = []
    for mask in masks:
        scores = torch.randn(4, length, length, generator=generator) * 2
        scores.masked_fill_(~mask.visible(length), float("-inf"))
        maps.append(stored(scores.softmax(-1), mask))
    return maps


def mean_total_variation(long: list[RowBlocks], short: list[RowBlocks]) -> float:
    """By definition, with the columns that ``short`` does not have as zeros."""
    rows = []
    for a, b in zip(long, short, strict=True):
        for p in (p for p in POSITIONS if p < b.length):
            ours, theirs = a.to_dense()[:, p].double(), b.to_dense()[:, p].double()
            theirs = F.pad(theirs, (0, a.length - b.length))
            rows.append((ours - theirs).abs().sum(-1).mean() / 2)
    return torch.stack(rows).mean().item()


@settings(deadline=None)
@given(st.tuples(masks, masks), lengths, lengths)
def test_map_distance_is_the_mean_total_variation_of_the_common_rows(
    masks: tuple[Mask, Mask], a: int, b: int
) -> None:
    long, short = random_maps(1, max(a, b), masks), random_maps(2, min(a, b), masks)
    first, second = digest(long, POSITIONS), digest(short, POSITIONS)
    distance = map_distance(first, second)
    assert distance == pytest.approx(mean_total_variation(long, short), abs=1e-3)
    assert distance == map_distance(second, first)
    assert 0 <= distance <= 1.005  # rows of rounded probabilities sum to 1 within 2^-8


@pytest.mark.parametrize("masks", [CAUSAL, BIDIRECTIONAL], ids=["causal", "bidirectional"])
def test_map_distance_is_zero_to_itself_and_one_to_the_opposite(masks: tuple[Mask, Mask]) -> None:
    first, last = torch.zeros(4, 80, 80), torch.eye(80).expand(4, 80, 80)
    first[..., 0] = 1
    a, b = (digest([stored(probs, mask) for mask in masks], POSITIONS) for probs in (first, last))
    assert map_distance(a, a) == 0
    assert map_distance(a, b) == 1


def test_what_a_longer_text_adds_counts_only_where_it_is_seen() -> None:
    short, long = torch.eye(80).expand(4, 80, 80), torch.eye(90).expand(4, 90, 90).clone()
    long[:, 20, 20], long[:, 20, 85] = 0.25, 0.75  # one of three common rows
    for mask, distance in ((Mask(causal=False), 0.25), (Mask(causal=False, window=30), 0.0)):
        visible = torch.where(mask.visible(90), long, 0)
        visible[:, 20, 20] += 1 - visible[:, 20].sum(-1)
        maps = [stored(visible, mask)], [stored(short, mask)]
        ours, theirs = (digest(m, POSITIONS) for m in maps)
        assert map_distance(ours, theirs) == map_distance(theirs, ours) == distance


def test_unequal_lengths_are_charged_by_their_weight() -> None:
    long, short = digest(random_maps(1, 300), POSITIONS), digest(random_maps(2, 75), POSITIONS)
    charged = map_distance(long, short, length_weight=0.4) - map_distance(long, short)
    assert charged == pytest.approx(0.4 * 0.75)
    assert map_distance(long, short, 0.4) == map_distance(short, long, 0.4)


def test_a_digest_holds_what_its_rows_see_and_no_more() -> None:
    maps = random_maps(1, 150, (Mask(), Mask(window=16), Mask(causal=False)))
    found = digest(maps, POSITIONS)
    assert found.positions == (3, 20, 69)
    assert [len(rows) for rows in found.rows] == [4 * (4 + 21 + 70), 4 * (4 + 16 + 16), 4 * 450]
    for stored_map, rows in zip(maps, found.rows, strict=True):
        dense, seen = stored_map.to_dense(), stored_map.layout.mask.visible(150)
        cells = [dense[:, p, seen[p]].flatten() for p in found.positions]
        assert torch.equal(rows, torch.cat(cells).half())


@pytest.mark.parametrize("mask", [Mask(), Mask(window=16)], ids=str)
def test_a_shorter_causal_text_is_compared_with_the_cells_of_its_prefix(mask: Mask) -> None:
    generator = torch.Generator().manual_seed(0)
    probs = torch.rand(4, 300, 300, generator=generator)
    long, short = (digest([stored(probs[:, :n, :n], mask)], POSITIONS) for n in (300, 100))
    assert torch.equal(long.rows[0][: len(short.rows[0])], short.rows[0])
    assert map_distance(long, short) == 0


@pytest.mark.parametrize("positions", [(), (-1, 3), (3, 3), (9, 3), (100, 200)])
def test_positions_that_sample_nothing_sensible_are_refused(positions: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="positions must be ascending"):
        digest(random_maps(1, 100), positions)


def test_maps_of_several_sequences_are_no_digest() -> None:
    with pytest.raises(ValueError, match="maps of one sequence"):
        digest([*random_maps(1, 100), *random_maps(1, 101)], POSITIONS)
    with pytest.raises(ValueError, match="maps of one sequence"):
        digest([], POSITIONS)


def test_digests_of_other_rows_are_not_compared() -> None:
    maps = random_maps(1, 100)
    others = digest(maps, (3, 21)), digest(maps[:1], POSITIONS)
    for other in (*others, digest(random_maps(1, 100, BIDIRECTIONAL), POSITIONS)):
        with pytest.raises(ValueError, match="same layers, heads and positions"):
            map_distance(digest(maps, POSITIONS), other)
    with pytest.raises(ValueError, match="same layers, heads and positions"):
        map_distance(digest(random_maps(1, 200), (3,)), digest(maps, (3, 20)))


def corpus(
    entries: int = 90, common: float = 10, noise: float = 0.3
) -> tuple[Tensor, list[MapDigest]]:
    """Entries whose maps are a function of the pooled input.

    A hidden topic of 4 numbers sets both: row `p` of the map is the softmax of a fixed mixture of
    `p + 1` column scores, the pooled input a fixed mixture plus noise plus a part common to all.
    """
    generator = torch.Generator().manual_seed(0)
    topics = torch.randn(entries, 4, generator=generator)
    scores = torch.einsum("nt,thc->nhc", topics, torch.randn(4, 3, 40, generator=generator))
    future = torch.ones(40, 40, dtype=torch.bool).triu(1)
    maps = scores.unsqueeze(2).masked_fill(future, float("-inf")).softmax(-1)
    pooled = torch.einsum("nt,tsd->nsd", topics, torch.randn(4, 8, 32, generator=generator))
    pooled += noise * torch.randn(pooled.shape, generator=generator)
    pooled += common * torch.randn(8, 32, generator=generator)
    return pooled, [digest([stored(m, Mask())], (7, 15, 39)) for m in maps]


def train(seed: int = 0, epochs: int = 15) -> tuple[Projector, TrainReport]:
    pooled, digests = corpus()
    return train_projector(
        pooled,
        lambda i, j: map_distance(digests[i], digests[j]),
        seed=seed,
        max_pairs=1500,
        epochs=epochs,
    )


@pytest.fixture
def one_thread() -> Iterator[None]:
    """On a busy machine, threads that spin for each other slow small steps a hundredfold."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_features_learn_to_rank_the_map_distances_of_unseen_entries() -> None:
    projector, report = train()
    assert report.rank_correlation > 0.7
    assert report.curve[-1] == (report.train_loss, report.heldout_loss)
    assert report.curve[-1][1] < report.curve[0][1]
    assert (report.pairs, report.epochs, len(report.curve)) == (1500, 15, 15)
    assert report.seconds < 15
    assert not projector.training


@pytest.mark.usefixtures("one_thread")
def test_what_the_training_entries_do_not_span_does_not_decide_the_distances() -> None:
    pooled, digests = corpus(common=0, noise=1)
    _, report = train_projector(
        pooled, lambda i, j: map_distance(digests[i], digests[j]), max_pairs=1500, epochs=15
    )
    assert report.rank_correlation > 0.5  # negative with weights of the usual initial size


def test_held_out_entries_are_in_no_training_pair() -> None:
    pooled, _ = corpus(40)
    asked: list[tuple[int, int]] = []

    def distance(i: int, j: int) -> float:
        asked.append((i, j))
        return 0.5

    _, report = train_projector(pooled, distance, epochs=1)
    heldout, train = asked[: -report.pairs], asked[-report.pairs :]
    assert len(heldout) == 8 * 7 // 2
    assert len(train) == 32 * 31 // 2
    assert {i for pair in heldout for i in pair}.isdisjoint(i for pair in train for i in pair)
    assert len({tuple(sorted(pair)) for pair in asked}) == len(asked)
    assert report.rank_correlation == 0  # equal labels have no ranks


def test_training_is_deterministic_under_its_seed_alone() -> None:
    torch.manual_seed(1)
    first, first_report = train(epochs=2)
    torch.manual_seed(2)
    before = torch.random.get_rng_state()
    second, second_report = train(epochs=2)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert second.to_bytes() == first.to_bytes()
    assert second_report.curve == first_report.curve
    assert train(seed=3, epochs=2)[0].to_bytes() != first.to_bytes()


def test_progress_is_told_after_every_epoch() -> None:
    told: list[tuple[int, float, float]] = []
    pooled, _ = corpus(8)
    _, report = train_projector(
        pooled,
        lambda i, j: abs(i - j) / 8,
        epochs=3,
        on_epoch=lambda epoch, train, heldout: told.append((epoch, train, heldout)),
    )
    assert [epoch for epoch, _, _ in told] == [1, 2, 3]
    assert tuple((train, heldout) for _, train, heldout in told) == report.curve


@pytest.mark.parametrize("shape", [(7, 8, 16), (20, 16)])
def test_too_few_entries_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="N >= 8"):
        train_projector(torch.zeros(shape), lambda i, j: 0.5)


@pytest.mark.parametrize("options", [{"epochs": 0}, {"max_pairs": 0}])
def test_empty_training_is_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        train_projector(torch.zeros(9, 8, 16), lambda i, j: 0.5, **options)


@pytest.mark.parametrize("label", [float("nan"), float("inf"), -0.1])
def test_labels_that_are_no_distances_are_refused(label: float) -> None:
    with pytest.raises(ValueError, match="map distances must be finite"):
        train_projector(torch.randn(9, 8, 16), lambda i, j: label)
    with pytest.raises(ValueError, match="pooled hidden states must be finite"):
        train_projector(torch.full((9, 8, 16), float("nan")), lambda i, j: 0.5)
