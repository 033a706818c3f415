# SPDX-License-Identifier: Apache-2.0
"""A layer of which maps serve a part: of the heads, of the rows, of the batch."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from attention_samples import (
    BertAttention,
    LlamaAttention,
    Shape,
    make_module,
    run,
    text,
    whole,
)
from batches import slot
from layer_samples import (
    FAMILIES,
    TOLERANCE,
    Corrections,
    Groups,
    alone,
    difference,
    each_family,
    each_treatment,
    forget,
    found_in,
    heads_of,
    own_map,
    step_with,
    treated,
)
from torch import Tensor

from attncache_vllm.engine.answers import OutputProjection
from attncache_vllm.engine.step import Served
from attncache_vllm.reuse.align import align
from attncache_vllm.reuse.apply import apply_aligned
from attncache_vllm.reuse.correct import Correction
from attncache_vllm.reuse.plan import Source

# -- a part of the heads, a part of the rows, corrections --------------------------------------


def served_heads(module: Any, rows: Tensor, item: Served | None) -> Tensor:
    """Outputs of the heads ``[L, H * d]``: exact, but for what ``item`` serves."""
    query, key, value = heads_of(module, rows)
    heads = module.attn.impl._row(query, key, value).to(rows.dtype).contiguous()
    out: Tensor = heads.flatten(1)
    if item is not None and item.alignment is not None:
        scale, cap = module.attn.impl.scale, module.attn.impl.logits_soft_cap or None
        apply_aligned(item.maps, item.alignment, query, key, value, scale, cap, out)
    elif item is not None:
        probs = item.maps.to_dense()[:, : len(rows), : len(rows)].float()
        for head in item.heads:
            own = value[:, head // item.maps.layout.group].float()
            heads[:, head] = (probs[head] @ own).to(rows.dtype)
    return out


def corrected_by_hand(module: Any, rows: Tensor, out: Tensor, correction: Correction) -> Tensor:
    """``out`` ``[L, H * d]``, corrected from itself and from the values of ``rows``."""
    value = heads_of(module, rows)[2].flatten(1).float()
    of_heads, of_values = correction.weight.float().split([out.shape[1], value.shape[1]])
    out = out.clone()
    out[:, correction.columns()] += out @ of_heads + value @ of_values + correction.bias.float()
    return out


def reference(
    module: Any, rows: Tensor, item: Served | None, correction: Correction | None = None
) -> Tensor:
    """The module's answer to one text, computed head by head."""
    out = served_heads(module, rows, item).float()
    if correction is not None:
        out = corrected_by_hand(module, rows, out, correction)
    if module.shape.output_proj:
        projection = getattr(module, module.output_name)
        out = out @ projection.weight.float().T + projection.bias.float()
    return out.to(rows.dtype)


def correction_of(module: Any, heads: list[int], seed: int = 0) -> Correction:
    """A correction of which both parts matter, of the model's dtype."""
    generator = torch.Generator().manual_seed(seed)
    shape = module.shape
    corrected = len(heads) * shape.head_size
    weight = torch.cat(
        [
            torch.randn(size, corrected, generator=generator) / size**0.5
            for size in (shape.heads * shape.head_size, shape.kv_heads * shape.head_size)
        ]
    )
    bias = torch.randn(corrected, generator=generator) / 4
    return Correction(tuple(heads), weight.to(shape.dtype), bias.to(shape.dtype))


def edited(seed: int, length: int, shape: Shape) -> tuple[np.ndarray, Tensor]:
    """Token ids and hidden states of a text; equal tokens have equal hidden states."""
    draw = np.random.default_rng(seed)
    vocabulary = text(77, 400, shape)
    ids = draw.permutation(400)[:length].astype(np.int32)
    return ids, vocabulary[torch.from_numpy(ids).long()]


def aligned_to(
    module: Any, seed: int, length: int, groups: tuple[int, ...] | None = None
) -> tuple[Tensor, Served]:
    """A text, and what a stored one serves of it from which four tokens in the middle and one more
    were replaced, and three at other places are gone."""
    ids, rows = edited(seed, length, module.shape)
    other = edited(seed + 1, length, module.shape)[0]
    middle = length // 2
    stored = np.concatenate([ids[: middle - 4], other[:4], ids[middle : length - 8]])
    stored = np.concatenate([np.delete(stored, [3, 5]), ids[length - 7 :]]).astype(np.int32)
    entry = text(77, 400, module.shape)[torch.from_numpy(stored).long()]
    alignment = align(ids, stored)
    assert 0 < len(alignment.fresh) < length / 2 and alignment.prefix < length / 2
    return rows, Served("aligned", own_map(module, entry, groups), alignment)


PARTS = {
    "causal": (0,),
    "bfloat16": (1,),
    "bidirectional": (1,),
    "bidirectional, window": (0, 2, 5),
}

NO_WINDOW = [name for name, (_, shape) in FAMILIES.items() if shape.window is None]


@pytest.mark.parametrize("family", PARTS)
@each_treatment
def test_heads_without_a_map_are_computed_beside_those_with_one(
    family: str, treatment: str
) -> None:
    module = make_module(*FAMILIES[family])
    rows, other = text(1, 65, module.shape), text(2, 65, module.shape)
    exact = alone(module, rows)
    item = Served("template", own_map(module, other, PARTS[family]))
    expected = reference(module, rows, item)
    assert difference(expected, exact) > 10 * TOLERANCE
    steps = treated(module, treatment, groups={"template": PARTS[family]})
    for _ in range(2):  # around the module, the first step also tries whether that can be
        steps.step = step_with([whole(rows)], {0: item})
        forget(module)
        assert difference(run(module, [whole(rows)]), expected) <= TOLERANCE
    # Around the module, queries and keys of the others are computed apart, and the backend attends
    # to them alone. Inside, nothing of the module is skipped.
    shape = module.shape
    rest = (shape.kv_heads - len(PARTS[family])) * shape.heads // shape.kv_heads
    inside = treatment == "scores"
    assert module.qkv.tokens_computed == (65 if inside else 0)
    (call,) = module.attn.impl.calls
    assert (call.tokens, call.heads) == (65, shape.heads if inside else rest)
    written = [slot(0, i) for i in range(65)] if shape.causal else []
    assert module.attn.impl.slots_written == written


class AllHeadsTogether(LlamaAttention):
    """Queries depend on those of all heads: what a part of them would be cannot be computed."""

    def heads(
        self, hidden_states: Tensor, positions: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = super().heads(hidden_states, positions)
        return query / query.norm(dim=(1, 2), keepdim=True) * 30, key, value


class SizesOfItsOwn(LlamaAttention):
    """Splits queries, keys and values at sizes that are known to its forward only."""

    def heads(
        self, hidden_states: Tensor, positions: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        size = self.shape.head_size
        self.q_size, self.kv_size = self.shape.heads * size, self.shape.kv_heads * size
        return super().heads(hidden_states, positions)


@pytest.mark.parametrize("kind", [AllHeadsTogether, SizesOfItsOwn])
def test_a_module_whose_heads_cannot_be_parted_is_served_inside(
    kind: type[LlamaAttention], caplog: pytest.LogCaptureFixture
) -> None:
    module = make_module(kind)
    rows, other = text(1, 65, module.shape), text(2, 65, module.shape)
    item = Served("template", own_map(module, other, (1,)))
    expected = reference(module, rows, item)
    steps = treated(module, "module", groups={"template": (1,)})
    with caplog.at_level("WARNING"):
        for _ in range(2):
            steps.step = step_with([whole(rows)], {0: item})
            forget(module)
            assert difference(run(module, [whole(rows)]), expected) <= TOLERANCE
    assert [call.tokens for call in module.attn.impl.calls] == [65]
    (message,) = [record.getMessage() for record in caplog.records]
    assert "layer 1 computes all heads where maps serve a part" in message


def test_heads_are_parted_only_where_the_layout_of_the_cache_is_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = make_module()
    monkeypatch.setattr(module.attn.attn_backend, "get_name", lambda: "FLASH_ATTN")
    rows, other = text(1, 65), text(2, 65)
    item = Served("template", own_map(module, other, (1,)))
    steps = treated(module, "module", groups={"template": (1,)})
    steps.step = step_with([whole(rows)], {0: item})
    assert difference(run(module, [whole(rows)]), reference(module, rows, item)) <= TOLERANCE
    assert [call.heads for call in module.attn.impl.calls] == [module.shape.heads]


@pytest.mark.parametrize("family", NO_WINDOW)
@each_treatment
@pytest.mark.parametrize("part", [False, True])
def test_rows_with_a_counterpart_take_their_scores_from_the_map(
    family: str, treatment: str, part: bool
) -> None:
    module = make_module(*FAMILIES[family])
    groups = (module.shape.kv_heads - 1,) if part else None
    rows, item = aligned_to(module, 3, 80, groups)
    exact, expected = alone(module, rows), reference(module, rows, item)
    steps = treated(module, treatment)
    steps.step = step_with([whole(rows)], {0: item})
    forget(module)
    answer = run(module, [whole(rows)])
    assert difference(answer, expected) <= TOLERANCE
    # What the entry knows of another position is not the same where positions matter.
    if isinstance(module, BertAttention):
        assert difference(answer, exact) <= TOLERANCE
    else:
        assert difference(answer, exact) > TOLERANCE
    # The rows before the first edit of a causal text are its own.
    if module.shape.causal:
        known = item.alignment.prefix
        assert known >= 3
        assert difference(answer[:known], exact[:known]) <= TOLERANCE
    # The kernel has nothing to do where all heads are served; keys and values are kept.
    assert [call.tokens for call in module.attn.impl.calls] == ([80] if part else [])
    assert module.attn.impl.slots_written == (
        [slot(0, token) for token in range(80)] if module.shape.causal else []
    )


def test_aligned_rows_are_scaled_and_capped_as_the_layer_does() -> None:
    module = make_module()
    module.attn.impl.logits_soft_cap = 1.5
    module.attn.impl.scale *= 2
    rows, item = aligned_to(module, 3, 80)
    steps = treated(module, "scores")
    steps.step = step_with([whole(rows)], {0: item})
    expected = reference(module, rows, item)
    assert difference(run(module, [whole(rows)]), expected) <= TOLERANCE
    module.attn.impl.logits_soft_cap = 0.0
    assert difference(reference(module, rows, item), expected) > TOLERANCE


@each_family
@each_treatment
@pytest.mark.parametrize("folds", [True, False])
def test_a_correction_belongs_to_its_source_and_is_the_same_folded_or_applied(
    family: str, treatment: str, folds: bool
) -> None:
    module = make_module(*FAMILIES[family])
    if module.shape.output_proj and not folds:
        getattr(module, module.output_name).quant_method = object()
    rows, other = text(1, 65, module.shape), text(2, 65, module.shape)
    correction = correction_of(module, list(range(module.shape.heads)))
    steps = treated(module, treatment, {"template": correction})
    maps = own_map(module, other)
    plain = reference(module, rows, Served("neighbour", maps))
    corrected = reference(module, rows, Served("template", maps), correction)
    # Guards the tests of corrections here: what is read of the values decides as well.
    blind = replace(correction, weight=correction.weight.clone())
    blind.weight[module.shape.heads * module.shape.head_size :] = 0
    unaware = reference(module, rows, Served("template", maps), blind)
    assert min(difference(corrected, other) for other in (plain, unaware)) > 10 * TOLERANCE
    sources: tuple[tuple[Source, Tensor], ...] = (("template", corrected), ("neighbour", plain))
    for source, expected in sources:
        steps.step = step_with([whole(rows)], {0: Served(source, maps)})
        assert difference(run(module, [whole(rows)]), expected) <= TOLERANCE


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 0.01)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_folded_projection_answers_as_correction_and_projection_do(
    dtype: torch.dtype, tolerance: float, bias: bool
) -> None:
    module = make_module(LlamaAttention, Shape(dtype=dtype))
    if not bias:
        module.o_proj.bias = None
    correction = correction_of(module, [0, 1, 2, 4])
    projections = []
    for quant_method in (module.o_proj.quant_method, object()):
        module.o_proj.quant_method = quant_method
        projections.append(OutputProjection(found_in(module), correction))
    folded, applied = projections
    heads = text(5, 70, replace(module.shape, hidden=6 * 16))
    value = text(6, 70, replace(module.shape, hidden=2 * 16)).view(70, 2, 16)
    assert module.o_proj.tokens_computed == 0
    answer = folded(heads.clone(), value)
    assert module.o_proj.tokens_computed == 0  # one product in all
    assert difference(answer, applied(heads.clone(), value)) <= tolerance
    exact = OutputProjection(found_in(module))(heads.clone(), value)
    assert difference(exact, module.o_proj(heads)[0]) == 0


@each_treatment
def test_a_part_that_is_served_is_corrected_from_all_heads_and_values(treatment: str) -> None:
    module = make_module()
    rows, other = text(1, 65), text(2, 65)
    item = Served("template", own_map(module, other, (1,)))
    correction = correction_of(module, item.heads)
    steps = treated(module, treatment, {"template": correction}, {"template": (1,)})
    steps.step = step_with([whole(rows)], {0: item})
    expected = reference(module, rows, item, correction)
    assert difference(expected, reference(module, rows, item)) > 10 * TOLERANCE
    assert difference(run(module, [whole(rows)]), expected) <= TOLERANCE


# -- all of it in one step ---------------------------------------------------------------------


def draw_served(draw: random.Random, module: Any, length: int) -> tuple[Tensor, Served | None]:
    """A text and what serves it, if anything does."""
    shape = module.shape
    rows = text(draw.randrange(10**6), length, shape)
    longer = draw.choice([0, 5]) if shape.causal else 0
    other = text(draw.randrange(10**6), length + longer, shape)
    groups = None if draw.random() < 0.5 else (draw.randrange(shape.kv_heads),)
    match draw.choice(["miss", "neighbour", "template", "aligned"]):
        case "aligned" if shape.window is None and length >= 40:
            return aligned_to(module, draw.randrange(10**6), length, groups)
        case "neighbour":
            return rows, Served("neighbour", own_map(module, other, groups))
        case "template":
            return rows, Served("template", replace(own_map(module, other, groups), lse=None))
        case _:
            return rows, None


@each_family
@each_treatment
@pytest.mark.parametrize("seed", range(6))
def test_all_sources_and_misses_of_a_step_answer_as_each_alone(
    family: str, treatment: str, seed: int
) -> None:
    module = make_module(*FAMILIES[family])
    draw = random.Random(seed)
    lengths = [40, 17, 64, 65, 2, 50, 41, 33]
    drawn = [draw_served(draw, module, length) for length in lengths]
    rows = [whole(tokens) for tokens, _ in drawn]
    items = {index: item for index, (_, item) in enumerate(drawn) if item is not None}
    canaries = tuple(index for index in items if draw.random() < 0.3)
    # A correction has the heads that its source serves: here those that all served rows have.
    corrections: Corrections = {}
    if draw.random() < 0.5:
        corrections["template"] = correction_of(module, [0], seed)
    hits = {index: item for index, item in items.items() if index not in canaries}
    expected = [
        reference(
            module, tokens, hits.get(i), corrections.get(hits[i].source) if i in hits else None
        )
        for i, (tokens, _) in enumerate(drawn)
    ]

    every = tuple(range(module.shape.kv_heads))
    groups: Groups = {"neighbour": every, "template": (0,)}
    steps = treated(module, treatment, corrections, groups)
    for _ in range(2):  # the first step also tries whether heads can be parted
        steps.step = step_with(rows, dict(items), canaries)
        steps.compared.clear()
        forget(module)
        together = run(module, rows)
    for index, (answer, own) in enumerate(zip(together.split(lengths), expected, strict=True)):
        assert difference(answer, own) <= TOLERANCE, (index, hits.get(index))

    around = [
        i
        for i, item in hits.items()
        if treatment == "module"
        and item.alignment is None
        and item.maps.groups == groups[item.source]
    ]
    complete = {i for i, item in hits.items() if item.all_heads} | {*around}
    # Of texts that maps serve a part of, the backend attends to the other heads alone.
    parts = [i for i in around if not hits[i].all_heads]
    shape = module.shape
    rest = shape.heads - shape.heads // shape.kv_heads
    calls = [
        (sum(lengths[i] for i in parts), rest),
        (sum(length for i, length in enumerate(lengths) if i not in complete), shape.heads),
    ]
    found = [(call.tokens, call.heads) for call in module.attn.impl.calls]
    assert found == [(tokens, heads) for tokens, heads in calls if tokens]
    inside = [i for i in range(len(rows)) if i not in around]
    assert module.qkv.tokens_computed == sum(lengths[i] for i in inside)
    written = [slot(i, p) for i in (*parts, *inside) for p in range(lengths[i])]
    assert module.attn.impl.slots_written == (written if shape.causal else [])

    # Canaries are answered exactly, and what would have served them is told.
    assert [seen.served for seen in steps.compared] == [items[index] for index in canaries]
    for index, seen in zip(canaries, steps.compared, strict=True):
        item, shape = items[index], module.shape
        heads = (
            torch.tensor(item.heads)[:, None] * shape.head_size + torch.arange(shape.head_size)
        ).flatten()
        exact = served_heads(module, rows[index].text, None)
        reused = served_heads(module, rows[index].text, item).float()
        if item.source in corrections:
            text_of = rows[index].text
            reused = corrected_by_hand(module, text_of, reused, corrections[item.source])
        assert difference(seen.exact, exact[:, heads]) <= TOLERANCE
        assert difference(seen.reused.float(), reused[:, heads]) <= TOLERANCE
