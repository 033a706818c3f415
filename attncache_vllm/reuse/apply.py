# SPDX-License-Identifier: Apache-2.0
"""What a sequence takes from the attention map of another."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attncache_vllm.reuse.align import Alignment
from attncache_vllm.reuse.layout import MapLayout, Mask
from attncache_vllm.reuse.maps import AttentionMap, kv_index

# Columns beside the values that count what a row keeps: one is used, 16 keep the rows aligned.
_KEPT_COLUMNS = 16
_LEAST_KEPT = 2.0**-100


def apply_map(maps: AttentionMap, value: Tensor, out: Tensor) -> None:
    """Write `map @ value` of the heads that `maps` holds into `out`, as attention would.

    A query shorter than a causal map uses its leading block: row `i` depends on the tokens `0..i`
    only, so that block is the exact map of the prefix, with and without a window. A bidirectional
    map serves its own length only.

    Args:
        maps: map of a sequence of `L` tokens, or of at least `L` if it is causal.
        value: `[L, KV, d]`, any float dtype; the product is computed in this dtype.
        out: `[L, KV * G * d]`; query head `h = kv * G + g` is written to `h * d:(h + 1) * d` where
            `maps.groups` holds `kv`, and left as it is elsewhere.

    Raises:
        ValueError: a shape does not fit the map, or the map does not serve the length.
    """
    layout = maps.layout
    if value.ndim != 3 or value.shape[1] != layout.num_kv_heads:
        raise ValueError(
            f"value must be [L, {layout.num_kv_heads}, d] for this map, "
            f"got {tuple(value.shape)!r}; use maps recorded from the same model"
        )
    length, num_kv_heads, head_size = value.shape
    shortest = 1 if layout.mask.causal else maps.length
    if not shortest <= length <= maps.length:
        raise ValueError(
            f"a {layout.mask} map of {maps.length} tokens serves {shortest} to {maps.length} "
            f"tokens, got {length!r}; match only entries that are long enough"
        )
    if out.shape != (length, layout.num_heads * head_size):
        raise ValueError(
            f"out must be [{length}, {layout.num_heads * head_size}], got {tuple(out.shape)!r}; "
            "allocate one row per token and head_size columns per query head"
        )
    heads = kv_index(maps.groups)
    out_heads = out.view(length, num_kv_heads, layout.group, head_size).permute(1, 2, 0, 3)
    value_heads = value.transpose(0, 1)[heads]
    if isinstance(heads, slice):
        maps.multiply(value_heads, out_heads[heads], length)
        return
    product = value.new_empty(len(heads), layout.group, length, head_size)
    maps.multiply(value_heads, product, length)
    out_heads[heads] = product


def apply_aligned(
    maps: AttentionMap,
    alignment: Alignment,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    soft_cap: float | None,
    out: Tensor,
) -> None:
    """Write the attention of the heads that `maps` holds into `out`, as far as the map is known.

    Rows with a counterpart take the scores of their pairs with counterparts from the map; all other
    scores are computed. With `P` the map, `lse` its log-sum-exps, `e(i)` the counterpart of row
    `i`, `K` the columns with one, `F` the fresh columns, `s` the scores, and only columns that the
    mask shows:

        kept_i = sum of P[e(i), e(j)] over j in K
        mass_i = exp(lse[e(i)]) * kept_i + sum of exp(s[i, f]) over f in F
        out_i  = (exp(lse[e(i)]) * sum of P[e(i), e(j)] v_j over j in K
                  + sum of exp(s[i, f]) v_f over f in F) / mass_i

    This is the merge of two partial softmaxes by their log-sum-exps (FlashInfer, arXiv 2501.01005,
    attention composition): if the stored scores are those of the sequence, it is its attention.
    What the entry's row gave to columns without a counterpart is gone, and the rest is scaled up.
    A row that kept less than 2^-100 is taken to have kept that much, on itself: it answers from the
    fresh columns and, as far as those weigh less still, from its own value. Fresh rows are
    computed exactly, and so, by construction, are the rows of a common prefix of a causal map.

    Scores and merge are float32, products are computed in the dtype of `value`.

    Args:
        maps: map of the entry, with its log-sum-exps.
        alignment: of the sequence's `L` tokens with the entry's.
        query: `[L, H, d]`, after the position encoding, any float dtype.
        key: `[L, KV, d]`, likewise.
        value: `[L, KV, d]`, any float dtype.
        scale: factor on the scores, usually `d ** -0.5`.
        soft_cap: see `exact_map`.
        out: `[L, H * d]`, see `apply_map`; every row is written.

    Raises:
        ValueError: a shape does not fit map or alignment, the map has no log-sum-exps, the cap is
            not a finite number above 0, or a window hides part of the sequence or the entry: then
            which columns a row sees is not the same for both.
    """
    _check_aligned(maps, alignment, query, key, value, out)
    if maps.lse is None:
        raise ValueError(
            "an aligned map must have log-sum-exps, got None; take the map of a stored entry, "
            "templates have none"
        )
    mask, length, head_size = maps.layout.mask, alignment.length, value.shape[2]
    if alignment.is_own_map(mask.causal):
        apply_map(maps, value, out)
        return
    held = kv_index(maps.groups)
    split = (length, maps.layout.num_kv_heads, maps.layout.group, head_size)
    queries = query.view(split).permute(1, 2, 0, 3)[held]
    keys, values = key.transpose(0, 1)[held], value.transpose(0, 1)[held]
    rows, entry_rows, fresh = (
        torch.from_numpy(positions).to(value.device)
        for positions in (alignment.rows, alignment.entry_rows, alignment.fresh)
    )

    def scores_of(some: Tensor, columns: Tensor) -> Tensor:
        """`[n, G, rows, columns]` float32, minus infinity where the mask hides."""
        picked = queries.index_select(2, some)
        scores = _scores(picked.flatten(1, 2), keys.index_select(1, columns), scale, soft_cap)
        scores = scores.view(*picked.shape[:3], len(columns))
        return scores.masked_fill_(some[:, None] < columns, -math.inf) if mask.causal else scores

    answer = values.new_empty(queries.shape)
    columns = torch.arange(length, device=value.device)
    answer[:, :, fresh] = _mix(scores_of(fresh, columns).softmax(-1), values)
    if len(rows):
        total, kept = _kept(maps, values, rows, entry_rows, int(alignment.entry_rows[-1]))
        # Rows in the common prefix of a causal map see exactly the tokens their counterparts saw.
        known = alignment.prefix if mask.causal else 0
        answer[:, :, :known] = total[:, :, :known].to(value.dtype)
        rows, total, kept = rows[known:], total[:, :, known:], kept[:, :, known:]
        lse = maps.lse.view(*queries.shape[:2], maps.length).index_select(2, entry_rows[known:])
        # All that is kept of the stored row is one more column beside the fresh ones.
        scores = torch.cat([scores_of(rows, fresh), (lse + kept.log()).unsqueeze(-1)], dim=-1)
        weights = scores.softmax(-1)
        total = total * (weights[..., -1] / kept).unsqueeze(-1)
        total += _mix(weights[..., :-1], values.index_select(1, fresh))
        answer[:, :, rows] = total.to(value.dtype)
    out.view(split).permute(1, 2, 0, 3)[held] = answer


def _check_aligned(
    maps: AttentionMap, alignment: Alignment, query: Tensor, key: Tensor, value: Tensor, out: Tensor
) -> None:
    layout, length, window = maps.layout, alignment.length, maps.layout.mask.window
    if alignment.entry_length != maps.length:
        raise ValueError(
            f"the alignment must be with an entry of the map's {maps.length} tokens, got "
            f"{alignment.entry_length!r}; align with the tokens of the map's own entry"
        )
    if window is not None and window < max(length, maps.length):
        raise ValueError(
            f"a window must cover the sequence's {length} tokens and the entry's {maps.length}, "
            f"got {window!r}; compute the layer exactly"
        )
    if value.ndim != 3 or value.shape[:2] != (length, layout.num_kv_heads):
        raise ValueError(
            f"value must be [{length}, {layout.num_kv_heads}, d] for this map and alignment, "
            f"got {tuple(value.shape)!r}; pass one whole sequence of the same model"
        )
    head_size = value.shape[2]
    expected = (length, layout.num_heads, head_size)
    if query.shape != expected or key.shape != value.shape:
        raise ValueError(
            f"query must be {expected!r} and key {tuple(value.shape)!r} beside this value, got "
            f"{tuple(query.shape)!r} and {tuple(key.shape)!r}; pass one whole sequence"
        )
    if out.shape != (length, layout.num_heads * head_size):
        raise ValueError(
            f"out must be [{length}, {layout.num_heads * head_size}], got {tuple(out.shape)!r}; "
            "allocate one row per token and head_size columns per query head"
        )


def _kept(
    maps: AttentionMap, values: Tensor, rows: Tensor, entry_rows: Tensor, last_row: int
) -> tuple[Tensor, Tensor]:
    """What the entry's rows give to columns with a counterpart: the sums of `P v` and of `P`.

    The values are put in the entry's order, zero where its token has no counterpart, so that the
    map is multiplied as it lies. A column of ones beside them sums `P` in the same product: what is
    kept is not the small difference of two rounded numbers, however little it is.

    Args:
        values: `[n, L, d]`, of the KV heads that the map holds.
        rows, entry_rows: `[M]`, see `Alignment`.
        last_row: the last of the entry's rows; no row after it is multiplied.

    Returns:
        `[n, G, M, d]` and `[n, G, M]` float32.
    """
    head_size = values.shape[2]
    placed = values.new_zeros(len(values), maps.length, head_size + _KEPT_COLUMNS)
    matched = values.index_select(1, rows)
    placed[:, entry_rows, :head_size] = matched
    placed[:, entry_rows, head_size] = 1
    products = placed.new_empty(len(values), maps.layout.group, last_row + 1, placed.shape[2])
    maps.multiply(placed, products, last_row + 1)
    picked = products.index_select(2, entry_rows).float()
    total, kept = picked[..., :head_size], picked[..., head_size]
    lost = (kept < _LEAST_KEPT).unsqueeze(-1)
    if lost.any():
        total = torch.where(lost, _LEAST_KEPT * matched.unsqueeze(1).float(), total)
    return total, kept.clamp_min(_LEAST_KEPT)


def exact_map(
    query: Tensor, key: Tensor, scale: float, mask: Mask, soft_cap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attention probabilities, `softmax(cap(scale * query @ key^T))`, for recording.

    Args:
        query: `[L, H, d]`, after the position encoding, any float dtype.
        key: `[L, KV, d]`, likewise; `H` is a multiple of `KV`.
        scale: factor on the scores, usually `d ** -0.5`.
        mask: which columns a row sees.
        soft_cap: bounds the scores before the mask as Gemma 2 does (arXiv 2408.00118),
            `cap(s) = soft_cap * tanh(s / soft_cap)`; None leaves them as they are.

    Returns:
        The probabilities, `[H, L, L]` float32, rows sum to 1, zero where the mask hides; and each
        row's log-sum-exp of its visible scores, `[H, L]` float32.

    Raises:
        ValueError: the shapes disagree, or the cap is not a finite number above 0.
    """
    check_scores(query, key, soft_cap)
    length, num_heads, head_size = query.shape
    group = MapLayout(num_heads, key.shape[1], mask).group
    rows = query.transpose(0, 1).reshape(-1, group * length, head_size)
    scores = _scores(rows, key.transpose(0, 1), scale, soft_cap).view(num_heads, length, length)
    scores.masked_fill_(~mask.visible(length, query.device), float("-inf"))
    probs = scores.softmax(-1)
    # A row's largest score and largest probability are of one column: p = exp(s - lse). torch's
    # logsumexp takes as long as all the rest.
    return probs, scores.amax(-1) - probs.amax(-1).log()


def check_scores(query: Tensor, key: Tensor, soft_cap: float | None) -> None:
    """Raise ValueError unless these are what `exact_map` takes."""
    if query.ndim != 3 or key.ndim != 3 or query.shape[::2] != key.shape[::2]:
        raise ValueError(
            "query and key must be [L, heads, d] with equal L and d, "
            f"got {tuple(query.shape)!r} and {tuple(key.shape)!r}; pass one whole sequence"
        )
    _check_cap(soft_cap)


def _check_cap(soft_cap: float | None) -> None:
    if soft_cap is not None and not 0 < soft_cap < math.inf:
        raise ValueError(
            f"soft_cap must be a finite number above 0, got {soft_cap!r}; None is no cap"
        )


def _scores(query: Tensor, key: Tensor, scale: float, soft_cap: float | None) -> Tensor:
    """`cap(scale * query @ key^T)`: `[n, R, d]` and `[n, C, d]` to `[n, R, C]`, in float32."""
    _check_cap(soft_cap)
    scores = torch.bmm(query.float(), key.float().transpose(1, 2))
    if soft_cap is None:
        return scores.mul_(scale)
    return scores.mul_(scale / soft_cap).tanh_().mul_(soft_cap)


def _mix(weights: Tensor, values: Tensor) -> Tensor:
    """`weights` `[n, G, R, C]` times `values` `[n, C, d]`, in the dtype of `values`."""
    product = torch.bmm(weights.flatten(1, 2).to(values.dtype), values)
    return product.view(*weights.shape[:3], values.shape[2])
