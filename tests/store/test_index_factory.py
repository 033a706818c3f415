# SPDX-License-Identifier: Apache-2.0
"""Which index a store makes, and what one answers that does not look at every entry."""

import faiss
import numpy as np
import pytest

from attncache_vllm.errors import StoreError
from attncache_vllm.store.index import AUTO, FeatureIndex, build_index, chosen_factory

ROWS, DIM = 4096, 16
CODED = "IVF128,PQ8x4fs"
NEVER = float("inf")
EVERY_LENGTH = (1, 2**31)


@pytest.mark.parametrize(
    ("rows", "dim", "factory"),
    [
        (1, 128, "Flat"),
        (8192, 128, "Flat"),
        (8193, 128, "IVF256,PQ64x4fs"),
        (100_000, 128, "IVF512,PQ64x4fs"),
        (100_000, 15, "IVF512,PQ15x4fs"),
        (1_000_000, 128, "IVF2048,PQ64x4fs"),
    ],
)
def test_a_store_is_searched_in_parts_only_when_it_is_large(
    rows: int, dim: int, factory: str
) -> None:
    assert chosen_factory(AUTO, rows, dim) == factory
    assert chosen_factory("IVF8,Flat", rows, dim) == "IVF8,Flat"


@pytest.fixture(scope="module")
def features() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((ROWS, DIM)).astype(np.float32)


def inverted(features: np.ndarray, lengths: list[int]) -> FeatureIndex:
    return FeatureIndex(features, lengths, CODED)


@pytest.mark.parametrize("factory", ["HNSW8", "PQ4", "nonsense", "IVF9999,Flat"])
def test_what_is_no_inverted_file_of_so_many_rows_is_refused(
    features: np.ndarray, factory: str
) -> None:
    with pytest.raises(StoreError, match=f"got '{factory}'; 'auto' always works"):
        build_index(features[:99], factory)


@pytest.mark.parametrize(("factory", "probes"), [(CODED, 32), ("IVF8,SQfp16", 8)])
def test_an_inverted_file_is_looked_through_in_part(
    features: np.ndarray, factory: str, probes: int
) -> None:
    built = build_index(features, factory)
    assert built is not None and built.nprobe == probes


@pytest.mark.parametrize("factory", [CODED, "IVF128,PQ16x4fs", "IVF128,SQfp16"])
def test_an_inverted_file_finds_what_is_near(features: np.ndarray, factory: str) -> None:
    index = FeatureIndex(features, [7] * ROWS, factory)
    queries = features[::16] + np.float32(0.01)
    found = index.search(queries, [EVERY_LENGTH] * len(queries), 1, NEVER)
    right = [row[0].entry_id == 16 * n for n, row in enumerate(found)]
    assert np.mean(right) >= 0.99
    near = [row[0].distance for row, hit in zip(found, right, strict=True) if hit]
    assert near == pytest.approx([0.04] * len(near), abs=1e-3)


def test_of_an_inverted_file_only_entries_of_the_right_lengths_are_proposed(
    features: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However much nearer the others are, and though the lists hold few that will do."""
    searched = []
    search = faiss.IndexIVFPQFastScan.search_preassigned_c

    def counted(index: faiss.Index, *arguments: object, **options: object) -> object:
        searched.append(arguments)
        return search(index, *arguments, **options)

    monkeypatch.setattr(faiss.IndexIVFPQFastScan, "search_preassigned_c", counted)
    lengths = [9 if n % 8 == 0 else 7 for n in range(ROWS)]
    index = inverted(features, lengths)
    found = index.search(features[:32], [(9, 9)] * 32, 5, NEVER)
    assert len(searched) == 1, "queries for the same lengths are asked together"
    assert all(row and {n.length for n in row} == {9} for row in found)
    assert [found[n][0].entry_id for n in range(0, 32, 8)] == list(range(0, 32, 8))


def test_codes_propose_and_features_decide(features: np.ndarray) -> None:
    """Of entries of one kind, which share most of their codes, the nearest comes first, and
    distances are those of the features."""
    random = np.random.default_rng(1)
    kinds = features[random.integers(0, 64, ROWS)]
    near = kinds + np.float32(0.2) * random.standard_normal(kinds.shape).astype(np.float32)
    lengths = random.integers(1, 9, ROWS)
    index = inverted(near, lengths.tolist())
    queries = near[:256] + np.float32(0.01)
    bounds = [(int(length), int(length) + 2) for length in lengths[:256]]
    found = index.search(queries, bounds, 4, NEVER)
    right = 0
    for n, (row, (shortest, longest)) in enumerate(zip(found, bounds, strict=True)):
        exact = np.linalg.norm(near - queries[n], axis=1)
        assert [r.distance for r in row] == pytest.approx([exact[r.entry_id] for r in row])
        assert [r.distance for r in row] == sorted(r.distance for r in row)
        assert len({r.entry_id for r in row}) == 4
        assert all(shortest <= r.length == lengths[r.entry_id] <= longest for r in row)
        right += row[0].entry_id == n
    assert right >= 0.99 * len(found)


def test_of_entries_that_are_the_same_the_first_comes_first() -> None:
    features = np.repeat(np.random.default_rng(2).standard_normal((1024, DIM)), 4, axis=0)
    index = inverted(features.astype(np.float32), [7] * ROWS)
    found = index.search(features[::64].astype(np.float32), [EVERY_LENGTH] * 64, 4, NEVER)
    for n, row in enumerate(found):
        assert [r.entry_id for r in row] == [64 * n + i for i in range(4)]
        assert all(r.distance == 0.0 for r in row)


def test_an_inverted_file_forgets(features: np.ndarray) -> None:
    index = inverted(features, [7] * ROWS)
    queries = features[:64]
    before = index.search(queries, [EVERY_LENGTH] * 64, 2, NEVER)
    assert [row[0].entry_id for row in before] == list(range(64))
    index.forget(*range(0, 64, 2))
    after = index.search(queries, [EVERY_LENGTH] * 64, 1, NEVER)
    gone = [row[0].entry_id if row else None for row in after]
    assert gone[1::2] == list(range(1, 64, 2))
    assert not set(gone) & set(range(0, 64, 2))


def test_queries_of_many_lengths_are_asked_in_a_few_groups(
    features: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = FeatureIndex(features, list(range(1, ROWS + 1)), "Flat")
    asked: list[int] = []
    propose = FeatureIndex._propose

    def counted(self: FeatureIndex, rows: np.ndarray, group: list[int], *arguments: object) -> None:
        asked.append(len(group))
        propose(self, rows, group, *arguments)

    monkeypatch.setattr(FeatureIndex, "_propose", counted)
    bounds = [(10 + n, 2**31) for n in range(64)]
    found = index.search(features[:64], bounds, 3, NEVER)
    assert asked == [64]
    for n, row in enumerate(found):
        distances = np.linalg.norm(features[9 + n :] - features[n], axis=1)
        assert [r.entry_id for r in row] == (np.argsort(distances)[:3] + 9 + n).tolist()
