# SPDX-License-Identifier: Apache-2.0
"""What an attention module with reuse answers; see layer_samples for what it is made of."""

from __future__ import annotations

import random

import pytest
import torch
from attention_samples import (
    Row,
    Shape,
    make_module,
    run,
    text,
    whole,
)
from batches import slot
from layer_samples import (
    CAUSAL,
    FAMILIES,
    TOLERANCE,
    alone,
    difference,
    each_family,
    each_treatment,
    forget,
    found_in,
    own_map,
    step_with,
    treated,
)

from attncache_vllm.engine.answers import ValueProjection

# -- answers -----------------------------------------------------------------------------------


@each_family
@each_treatment
def test_a_texts_own_map_gives_its_own_answer(family: str, treatment: str) -> None:
    module = make_module(*FAMILIES[family])
    steps = treated(module, treatment)
    for length in (1, 2, 33, 64, 65, 131):
        rows = text(length, length, module.shape)
        steps.step = None
        expected = alone(module, rows)
        steps.step = step_with([whole(rows)], {0: own_map(module, rows)})
        forget(module)
        assert difference(run(module, [whole(rows)]), expected) <= TOLERANCE
        assert module.attn.impl.calls == []
        # Around the module nothing but V rows is computed; inside, keys and values are kept.
        kept = [] if treatment == "module" else [slot(0, token) for token in range(length)]
        assert module.qkv.tokens_computed == len(kept)
        assert module.attn.impl.slots_written == (kept if module.shape.causal else [])


@each_family
@each_treatment
def test_another_texts_map_gives_another_answer(family: str, treatment: str) -> None:
    # Guards the tests here: the map decides, and the tolerance tells.
    module = make_module(*FAMILIES[family])
    steps = treated(module, treatment)
    rows, other = text(1, 65, module.shape), text(2, 65, module.shape)
    expected = alone(module, rows)
    steps.step = step_with([whole(rows)], {0: own_map(module, other)})
    assert difference(run(module, [whole(rows)]), expected) > 10 * TOLERANCE


@pytest.mark.parametrize("family", CAUSAL)
@each_treatment
def test_the_causal_map_of_a_longer_text_serves_its_beginning(family: str, treatment: str) -> None:
    module = make_module(*FAMILIES[family])
    steps = treated(module, treatment)
    longer = text(3, 140, module.shape)
    stored = own_map(module, longer)
    for length in (1, 50, 70, 139):
        rows = longer[:length].clone()
        steps.step = None
        expected = alone(module, rows)
        steps.step = step_with([whole(rows)], {0: stored})
        assert difference(run(module, [whole(rows)]), expected) <= TOLERANCE


def draw_rows(draw: random.Random, shape: Shape) -> list[Row]:
    """Whole texts, and if causal a first, a middle and a last chunk, an empty row among them."""
    rows = [whole(text(draw.randrange(10**6), length, shape)) for length in (1, 2, 17, 64, 65)]
    if shape.causal:
        long = [text(draw.randrange(10**6), 90, shape) for _ in range(3)]
        rows += [Row(long[0], 0, 40), Row(long[1], 33, 70), Row(long[2], 65, 90)]
        rows += [Row(long[0], 0, 0)]
    draw.shuffle(rows)
    return rows


@each_family
@each_treatment
@pytest.mark.parametrize("seed", range(4))
def test_hits_and_misses_of_a_step_answer_as_each_alone_in_any_order(
    family: str, treatment: str, seed: int
) -> None:
    module = make_module(*FAMILIES[family])
    draw, steps = random.Random(seed), treated(module, treatment)
    rows = draw_rows(draw, module.shape)
    candidates = [index for index, row in enumerate(rows) if row.whole]
    hits = sorted(draw.sample(candidates, draw.randint(1, len(candidates))))
    maps = {index: own_map(module, rows[index].text) for index in hits}
    expected = [alone(module, row.text)[row.start : row.stop] for row in rows]

    # What earlier steps computed of the texts is in the KV cache.
    forget(module)
    if any(row.start for row in rows):
        run(module, [Row(row.text, 0, row.start) for row in rows])
    module.qkv.tokens_computed = 0
    module.attn.impl.slots_written.clear()
    module.attn.impl.calls.clear()
    steps.step = step_with(rows, maps)
    padding = draw.choice([0, 0, 3])
    together = run(module, rows, padding)

    lengths = [row.stop - row.start for row in rows]
    for index, (answer, own) in enumerate(
        zip(together[: sum(lengths)].split(lengths), expected, strict=True)
    ):
        if len(own):
            assert difference(answer, own) <= TOLERANCE, index
    missed = [index for index, length in enumerate(lengths) if length and index not in hits]
    tokens = sum(lengths[index] for index in missed)
    # The backend attends to the misses only, in one call; their keys and values are written to the
    # slots of their own tokens. Around the module those of hits are not even computed.
    assert [c.tokens for c in module.attn.impl.calls] == ([tokens] if missed else [])
    computed = missed if treatment == "module" else range(len(rows))
    written = [slot(r, p) for r in computed for p in range(rows[r].start, rows[r].stop)]
    assert module.qkv.tokens_computed == (tokens if treatment == "module" else len(together))
    assert module.attn.impl.slots_written == (written if module.shape.causal else [])


def test_misses_reach_the_backend_with_the_lengths_of_their_contexts() -> None:
    module = make_module()
    steps = treated(module, "module")
    long = text(1, 90)
    rows = [Row(long, 40, 90), whole(text(2, 20)), Row(long, 0, 30)]
    steps.step = step_with(rows, {1: own_map(module, rows[1].text)})
    run(module, rows)
    (seen,) = module.attn.impl.calls
    common = seen.metadata.common
    assert common.query_start_loc.tolist() == [0, 50, 80]
    assert common.seq_lens.tolist() == common.seq_lens_cpu_upper_bound.tolist() == [90, 30]
    assert (common.num_reqs, common.num_actual_tokens) == (2, 80)
    assert (common.max_query_len, common.max_seq_len) == (50, 90)
    assert common.positions.tolist() == [*range(40, 90), *range(30)]
    assert common.block_table_tensor[:, 0].tolist() == [1, 3]


@pytest.mark.parametrize("family", ["causal", "BERT"])
def test_tokens_behind_the_batch_are_answered_with_zeros(family: str) -> None:
    module = make_module(*FAMILIES[family])
    steps = treated(module, "module")
    rows = [whole(text(1, 20, module.shape)), whole(text(2, 30, module.shape))]
    expected = [alone(module, row.text) for row in rows]
    for hits in ([0], [1], [0, 1]):
        steps.step = step_with(rows, {index: own_map(module, rows[index].text) for index in hits})
        together = run(module, rows, padding=6)
        assert len(together) == 56
        assert not together[50:].any()
        for answer, own in zip(together[:50].split([20, 30]), expected, strict=True):
            assert difference(answer, own) <= TOLERANCE


@each_family
@each_treatment
def test_without_hits_the_module_runs_on_the_whole_batch_untouched(
    family: str, treatment: str
) -> None:
    module = make_module(*FAMILIES[family])
    rows = [whole(text(1, 20, module.shape)), whole(text(2, 30, module.shape))]
    expected = run(module, rows)
    steps = treated(module, treatment)
    for step in (None, step_with(rows, {})):
        forget(module)
        steps.step = step
        assert torch.equal(run(module, rows), expected)
        assert [call.tokens for call in module.attn.impl.calls] == [50]


# -- V rows ------------------------------------------------------------------------------------


@each_family
def test_value_rows_outlive_the_repacking_of_the_weights(family: str) -> None:
    module = make_module(*FAMILIES[family])
    rows = text(1, 20, module.shape)
    expected = module.heads(rows, None)[2]
    projection = ValueProjection(found_in(module))
    module.qkv.weight.data.zero_()
    module.qkv.bias.data.zero_()
    torch.testing.assert_close(projection(rows), expected)


def test_value_rows_of_a_projection_without_bias() -> None:
    module = make_module()
    module.qkv.bias = None
    rows = text(1, 20)
    expected = module.heads(rows, None)[2]
    torch.testing.assert_close(ValueProjection(found_in(module))(rows), expected)
