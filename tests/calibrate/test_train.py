# SPDX-License-Identifier: Apache-2.0
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from attncache_vllm.calibrate.train import (
    MapDigest,
    TrainReport,
    digest,
    map_distance,
    train_projector,
)
from attncache_vllm.reuse.apply import RowBlocks
from attncache_vllm.reuse.codec import decode_causal, encode_causal
from attncache_vllm.reuse.feature import Projector

POSITIONS = (3, 20, 69, 200)


def random_maps(seed: int, length: int, layers: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(layers, 4, length, length, generator=generator) * 2
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    return list(scores.masked_fill(future, float("-inf")).softmax(-1))


def row_blocks(probs: Tensor) -> RowBlocks:
    return decode_causal(encode_causal(probs), len(probs), 2, probs.shape[1])


def test_map_distance_is_the_mean_total_variation_of_the_common_rows() -> None:
    long, short = random_maps(1, 300), random_maps(2, 100)
    rows = [
        (a[:, p, : p + 1] - b[:, p, : p + 1]).abs().sum(-1).mean() / 2
        for a, b in zip(long, short, strict=True)
        for p in (3, 20, 69)
    ]
    distance = map_distance(digest(long, POSITIONS), digest(short, POSITIONS))
    assert distance == pytest.approx(torch.stack(rows).mean().item(), abs=1e-3)


def test_map_distance_is_zero_to_itself_one_to_the_opposite_and_symmetric() -> None:
    first, last = torch.zeros(2, 4, 80, 80), torch.eye(80).expand(2, 4, 80, 80)
    first[..., 0] = 1
    a, b = digest(list(first), POSITIONS), digest(list(last), POSITIONS)
    assert map_distance(a, a) == 0
    assert map_distance(a, b) == map_distance(b, a) == 1


def test_unequal_lengths_are_charged_by_their_weight() -> None:
    long, short = digest(random_maps(1, 300), POSITIONS), digest(random_maps(2, 75), POSITIONS)
    charged = map_distance(long, short, length_weight=0.4) - map_distance(long, short)
    assert charged == pytest.approx(0.4 * 0.75)
    assert map_distance(long, short, 0.4) == map_distance(short, long, 0.4)


def test_a_digest_of_stored_maps_is_the_digest_of_the_maps() -> None:
    maps = random_maps(1, 150)
    from_blocks, dense = digest([row_blocks(m) for m in maps], POSITIONS), digest(maps, POSITIONS)
    assert from_blocks.positions == dense.positions == (3, 20, 69)
    torch.testing.assert_close(from_blocks.rows, dense.rows, rtol=2**-8, atol=1e-6)
    assert map_distance(from_blocks, dense) < 2**-9


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
    for other in (digest(maps, (3, 21)), digest(maps[:1], POSITIONS)):
        with pytest.raises(ValueError, match="same layers, heads and positions"):
            map_distance(digest(maps, POSITIONS), other)


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
    return pooled, [digest([m], (7, 15, 39)) for m in maps]


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
