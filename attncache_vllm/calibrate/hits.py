# SPDX-License-Identifier: Apache-2.0
"""What serves texts that are known beforehand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from attncache_vllm.calibrate.edits import Tokens
from attncache_vllm.engine.calibrate import HitOf
from attncache_vllm.engine.step import Hit, Served
from attncache_vllm.engine.step import Sequence as Row
from attncache_vllm.reuse.plan import Source


def hits_by_text(
    source: Source, texts: Sequence[Tokens], served: Sequence[Mapping[int, Served]]
) -> HitOf:
    """Serve each of ``texts``, told by its tokens, what stands in its place in ``served``."""
    found = {
        tokens.tobytes(): Hit(source, by_layer)
        for tokens, by_layer in zip(texts, served, strict=True)
    }

    def hit_of(row: Row) -> Hit | None:
        assert row.token_ids is not None
        return found[row.token_ids.tobytes()]

    return hit_of
