# SPDX-License-Identifier: Apache-2.0
"""Which index a store makes, and what one answers that does not look at every entry."""

import faiss
import numpy as np
import pytest

from attncache_vllm.store.index import (
    AUTO,
    FeatureIndex,
    build_index,
    chosen_factory,
    deserialize_index,
    serialize_index,
)

ROWS, DIM, LISTS = 4096, 16, 128
NEVER = float("inf")
EVERY_LENGTH = (1, 2**31)


@pytest.mark.parametrize(
    ("rows", "factory"),
    [
        (1, "Flat"),
        (16_384, "Flat"),
        (16_385, "IVF512,Flat"),
        (100_000, "IVF1024,Flat"),
        (1_000_000, "IVF4096,Flat"),
    ],
)
def test_a_store_is_searched_in_parts_only_when_it_is_large(rows: int, factory: str) -> None:
    assert chosen_factory(AUTO, rows) == factory
    assert chosen_factory("HNSW8", rows) == "HNSW8"


@pytest.fixture(scope="module")
def features() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((ROWS, DIM)).astype(np.float32)


@pytest.fixture(scope="module")
def inverted(features: np.ndarray) -> faiss.Index:
    built = build_index(features, f"IVF{LISTS},Flat")
    # As a store writes and reads it: what is looked through is part of it.
    return deserialize_index(serialize_index(built), ROWS, DIM)


def test_an_inverted_file_finds_what_is_near(features: np.ndarray, inverted: faiss.Index) -> None:
    assert faiss.extract_index_ivf(inverted).nprobe == LISTS // 64
    index = FeatureIndex(inverted, features, [7] * ROWS)
    queries = features[::16] + np.float32(0.01)
    found = index.search(queries, [EVERY_LENGTH] * len(queries), 1, NEVER)
    right = [row[0].entry_id == 16 * n for n, row in enumerate(found)]
    assert np.mean(right) > 0.95
    assert all(row[0].distance == pytest.approx(0.04, abs=1e-3) for row in np.array(found)[right])


def test_a_search_ends_with_the_lists_that_it_looks_through(
    features: np.ndarray, inverted: faiss.Index
) -> None:
    # An eighth of the entries would do, and the lists hold a 64th of all: fewer than are wanted.
    asked: list[int] = []

    class Counting:
        def search(self, queries: np.ndarray, proposals: int) -> tuple[np.ndarray, np.ndarray]:
            asked.append(proposals)
            answer: tuple[np.ndarray, np.ndarray] = inverted.search(queries, proposals)
            return answer

    lengths = [9 if n % 8 == 0 else 7 for n in range(ROWS)]
    index = FeatureIndex(Counting(), features, lengths)
    [found] = index.search(features[:1], [(9, 9)], 400, NEVER)
    assert 1 <= len(found) < 400
    assert found[0].entry_id == 0
    assert {neighbour.length for neighbour in found} == {9}
    assert len(asked) == 1
